"""Adapters that are used where they lie: references that are paths, and what plugin sources point at."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lora_rt.registry import files
from lora_rt.registry.errors import InvalidReferenceError, RejectedAdapterError, UnknownAdapterError
from lora_rt.registry.inspection import kinds
from lora_rt.registry.inspection.folder import folder_problems
from lora_rt.registry.reference import BASE, Reference, is_name
from lora_rt.registry.resolved import Resolved, read_folder
from lora_rt.registry.strict_json import shown

_LOOKED_AT = 1_000  # folders below a folder without an adapter, to say where one is


def folder_of(root: Path, reference: Reference) -> Path:
    """The folder that a path means, seen from `root`.

    Raises:
        InvalidReferenceError: it begins with the home of a user that this machine does not have, or is too long.
    """
    try:
        folder = root / Path(reference.target).expanduser()
        os.stat(folder)
    except RuntimeError as error:
        who = reference.target.partition("/")[0]
        text = f"{shown(reference.target)}: this machine has no user {shown(who[1:])}"
        raise InvalidReferenceError(
            text, next_step="Write the whole path, or ./~name for a folder of that name"
        ) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            text = f"the path {shown(reference.target)} is too long: a name in it has more letters than a file may have"
            raise InvalidReferenceError(text, next_step="Check the path") from error
    return folder


def at_path(root: Path, reference: Reference, *, why: str, name: str | None = None) -> Resolved:
    """The adapter at a path; it is named like its folder unless it gets a name."""
    folder = folder_of(root, reference)
    return read_path(folder, name=name or _name_of(folder), source=reference.target, why=why)


def read_path(folder: Path, *, name: str, source: str, why: str) -> Resolved:
    """The adapter in a folder of this machine.

    Raises:
        UnknownAdapterError: there is no such folder, or no adapter in it.
        RejectedAdapterError: the folder or a file in it is not what it seems.
    """
    problems = folder_problems(folder)
    if problems and not folder.exists():
        raise UnknownAdapterError(problems[0], next_step="Check the path")
    if problems:
        text = f"adapter {name!r} is refused: {problems[0]}"
        raise RejectedAdapterError(text, next_step=kinds.way_out(problems, folder))
    names = os.listdir(folder)
    if files.CONFIG not in names and not {files.WEIGHTS, files.CARD} & set(names):
        raise _nothing_there(folder, source, names)
    return read_folder(folder, name=name, source=source, why=why)


def _nothing_there(folder: Path, source: str, names: list[str]) -> UnknownAdapterError:
    """What there is in a folder without an adapter: something else, or one adapter or several below it."""
    if kind := kinds.of_folder(names):
        return UnknownAdapterError(
            f"there is no adapter in {shown(source)}: {kind}", next_step=kinds.way_out([kind], folder)
        )
    below = sorted(_adapters_below(folder))
    if not below:
        return UnknownAdapterError(
            f"there is no adapter in {shown(source)}", next_step="It needs an adapter_config.json"
        )
    places = [f"{source.rstrip('/')}/{place}" for place in below]
    if len(places) == 1:
        text = f"there is no adapter in {shown(source)} itself, but one below it"
        return UnknownAdapterError(text, next_step=f"Use {places[0]}")
    text = f"there is no adapter in {shown(source)} itself, but {len(places)} below it"
    return UnknownAdapterError(text, next_step="Use one of these:", problems=[shown(p) for p in places[:20]])


def _adapters_below(folder: Path) -> list[str]:
    found: list[str] = []
    for count, (place, folders, names) in enumerate(os.walk(folder)):
        depth = len(Path(place).relative_to(folder).parts)
        if files.CONFIG in names and depth:
            found.append(Path(place).relative_to(folder).as_posix())
        if depth >= 3 or count >= _LOOKED_AT:
            folders.clear()
    return found


def _name_of(folder: Path) -> str:
    own = folder.resolve().name
    if is_name(own):
        return own if own != BASE else f"{own}-adapter"
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in own).strip("-")
    return plain[:96] or "adapter"
