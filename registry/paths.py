"""Adapters that are used where they lie: references that are paths, and what plugin sources point at."""

from __future__ import annotations

from pathlib import Path

from lora_rt.registry.errors import RejectedAdapterError, UnknownAdapterError
from lora_rt.registry.inspection.adapter import folder_problems
from lora_rt.registry.reference import Reference, is_name
from lora_rt.registry.resolved import Resolved, read_folder


def folder_of(root: Path, reference: Reference) -> Path:
    """The folder that a path means, seen from `root`."""
    return root / Path(reference.target).expanduser()


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
        raise RejectedAdapterError(f"adapter {name!r} is refused: {problems[0]}", problems=problems)
    found = read_folder(folder, name=name, source=source, why=why)
    if not found.files:
        raise UnknownAdapterError(f"there is no adapter in {folder}", next_step="It needs an adapter_config.json")
    return found


def _name_of(folder: Path) -> str:
    own = folder.resolve().name
    if is_name(own):
        return own
    plain = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in own).strip("-")
    return plain[:96] or "adapter"
