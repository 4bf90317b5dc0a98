"""The whole check of one adapter folder. It runs before a byte reaches a model, and names everything that is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_rt.registry import files
from lora_rt.registry.card import AdapterCard, BaseIdentity, parse_card
from lora_rt.registry.errors import ChangedAdapterError, RejectedAdapterError
from lora_rt.registry.files import CARD, CONFIG, LIMITS, MEGABYTE, STATE, WEIGHTS, UnusableFileError
from lora_rt.registry.inspection.bases import base_problems
from lora_rt.registry.inspection.config import read_config
from lora_rt.registry.inspection.modules import Linears, LoraModule, pair_modules
from lora_rt.registry.inspection.safetensors_header import TensorEntry, read_header
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.inspection.values import norm_problems, read_values, value_problems
from lora_rt.registry.reference import is_hub_id, is_name
from lora_rt.registry.strict_json import shown

DEFAULT_MODE = "output-only"
MAX_SHOWN = 60
MAX_STATE_VALUE = 1e6
_BYTES_WORTH_READING = 256 * MEGABYTE


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """An adapter that passed. `files` maps each file's name to its sha256; `sha256` is one digest over them."""

    name: str
    folder: Path
    weights: Path
    modules: tuple[LoraModule, ...]
    card: AdapterCard | None
    mode: str
    state: Path | None
    sha256: str
    files: Mapping[str, str]


def inspect_adapter(
    folder: Path,
    *,
    name: str,
    linears: Linears | None = None,
    base: BaseIdentity | None = None,
    sha256: str | None = None,
) -> InspectedAdapter:
    """Check an adapter folder and say what it holds.

    Args:
        folder: a PEFT directory from anywhere.
        name: what the adapter is to be called.
        linears: every adaptable module of the base, its path to (out_features, in_features); None checks only what can
            be known without a base.
        base: the base in use; an adapter that states another one is refused.
        sha256: the digest the adapter was pinned to.

    Raises:
        RejectedAdapterError: `problems` names everything that is wrong.
        ChangedAdapterError: the adapter is sound, but not the one that was pinned.
    """
    inspection = _Inspection(folder, linears, base)
    problems = [] if is_name(name) or is_hub_id(name) else [f"{shown(name)} is not a name that an adapter can have"]
    problems += inspection.run()
    if problems:
        raise RejectedAdapterError(_summary(name, problems), problems=_bounded(problems))
    found = inspection.found
    combined = files.combined(found)
    if sha256 is not None and combined != sha256:
        raise ChangedAdapterError(
            f"the files of {name} changed: their digest is {combined[:12]}, pinned was {sha256[:12]}",
            next_step=f"lora-rt verify {name}",
        )
    card = inspection.card
    return InspectedAdapter(
        name=name,
        folder=folder,
        weights=folder / WEIGHTS,
        modules=inspection.modules,
        card=card,
        mode=card.mode if card else DEFAULT_MODE,
        state=folder / STATE if STATE in found else None,
        sha256=combined,
        files=found,
    )


def _summary(name: str, problems: Sequence[str]) -> str:
    count = "one thing is" if len(problems) == 1 else f"{len(problems):,} things are"
    return f"adapter {shown(name)} is refused, {count} wrong with it"


def _bounded(problems: Sequence[str]) -> list[str]:
    shown_ones = [problem if len(problem) <= 400 else problem[:400] + "..." for problem in problems[:MAX_SHOWN]]
    more = len(problems) - len(shown_ones)
    return [*shown_ones, f"and {more:,} more"] if more else shown_ones


class _Inspection:
    """One run over one folder, file by file; each step returns the problems it found."""

    def __init__(self, folder: Path, linears: Linears | None, base: BaseIdentity | None) -> None:
        self.folder, self.linears, self.base = folder, linears, base
        self.found: dict[str, str] = {}
        self.card: AdapterCard | None = None
        self.settings: LoraSettings | None = None
        self.modules: tuple[LoraModule, ...] = ()

    def run(self) -> list[str]:
        """Every problem of the folder."""
        problems = folder_problems(self.folder)
        if problems:
            return problems
        names = files.present(self.folder)
        problems = self._read_card(names) + self._read_config(names)
        problems += base_problems(self.card, self.settings, self.base)
        problems += self._read_weights(names) + self._read_state(names)
        for name in sorted(set(names) - set(self.found)):
            problems += self._hash(name)
        return problems

    def _small(self, name: str) -> tuple[bytes | None, list[str]]:
        """The whole of a small file, hashed."""
        try:
            with files.open_plain(self.folder / name, LIMITS[name]) as (file, _):
                content = file.read(LIMITS[name] + 1)
        except UnusableFileError as error:
            self.found[name] = ""
            return None, [f"{name} {error}"]
        self.found[name] = files.sha256_bytes(content)
        return content, []

    def _read_card(self, names: list[str]) -> list[str]:
        if CARD not in names:
            return []
        content, problems = self._small(CARD)
        if content is not None:
            self.card, problems = parse_card(content)
        return problems

    def _read_config(self, names: list[str]) -> list[str]:
        if CONFIG not in names:
            return [f"{CONFIG} is missing"]
        content, problems = self._small(CONFIG)
        if content is not None:
            self.settings, problems = read_config(content)
        return problems

    def _read_weights(self, names: list[str]) -> list[str]:
        if WEIGHTS not in names:
            return [_missing_weights(self.folder)]
        try:
            with files.open_plain(self.folder / WEIGHTS, LIMITS[WEIGHTS]) as (file, size):
                entries, problems = read_header(file, size)
                problems = [f"{WEIGHTS} {problem}" for problem in problems]
                if problems:
                    self.found[WEIGHTS] = ""
                    return problems
                if self.settings is not None:
                    self.modules, problems = pair_modules(entries, self.settings, self.linears)
                if problems and size > _BYTES_WORTH_READING:
                    self.found[WEIGHTS] = ""
                    return [*problems, f"{WEIGHTS}: its {size:,} bytes of values were not looked at"]
                facts, self.found[WEIGHTS] = read_values(file, entries.values())
        except UnusableFileError as error:
            self.found[WEIGHTS] = ""
            return [f"{WEIGHTS} {error}"]
        wrong = value_problems(facts)
        return problems + (wrong or norm_problems(facts, self.modules))

    def _read_state(self, names: list[str]) -> list[str]:
        if STATE not in names:
            return [f"{STATE} is missing, the card describes one"] if self.card and self.card.state else []
        try:
            with files.open_plain(self.folder / STATE, LIMITS[STATE]) as (file, size):
                entries, problems = read_header(file, size)
                problems += self._state_problems(entries) if not problems else []
                facts, self.found[STATE] = ({}, "") if problems else read_values(file, entries.values())
        except UnusableFileError as error:
            self.found[STATE] = ""
            return [f"{STATE} {error}"]
        return [f"{STATE} {problem}" for problem in problems or value_problems(facts, MAX_STATE_VALUE)]

    def _state_problems(self, entries: Mapping[str, TensorEntry]) -> list[str]:
        """The state must be what the card says, tensor by tensor."""
        if self.card is None:
            return [f"has no readable {CARD} beside it that says what it is"]
        stated = {key: (tensor.dtype, tensor.shape) for key, tensor in self.card.state.items()}
        given = {key: (entry.dtype, entry.shape) for key, entry in entries.items()}
        problems = [f"lacks {shown(key)}, which the card describes" for key in stated.keys() - given.keys()]
        problems += [f"holds {shown(key)}, which the card does not describe" for key in given.keys() - stated.keys()]
        problems += [
            f"holds {shown(key)} as {_form(given[key])}, the card says {_form(stated[key])}"
            for key in given.keys() & stated.keys()
            if given[key] != stated[key]
        ]
        return sorted(problems)

    def _hash(self, name: str) -> list[str]:
        try:
            self.found[name] = files.sha256_of(self.folder / name, LIMITS[name])
        except UnusableFileError as error:
            return [f"{name} {error}"]
        return []


def folder_problems(folder: Path) -> list[str]:
    """What is wrong with the folder itself: missing, no folder, a link out of its place, names that differ by case."""
    if not os.path.lexists(folder):
        return [f"there is no folder {shown(str(folder))}"]
    if folder.is_symlink() and not folder.resolve().is_relative_to(folder.parent.resolve()):
        return [f"{shown(str(folder))} is a symbolic link that points outside of its place"]
    if not folder.is_dir():
        return [f"{shown(str(folder))} is not a folder"]
    try:
        names = os.listdir(folder)
    except PermissionError:
        return [f"{shown(str(folder))} can not be read"]
    wanted = {name.lower(): name for name in LIMITS}
    return [
        f"{shown(name)} differs from {wanted[name.lower()]} only by case"
        for name in sorted(names)
        if name.lower() in wanted and name != wanted[name.lower()]
    ]


def _form(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]} {list(tensor[1])}"


def _missing_weights(folder: Path) -> str:
    pickles = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    if pickles:
        name = shown(sorted(pickles)[0])
        return f"{WEIGHTS} is missing; {name} is a pickle, which is never opened: save the adapter as safetensors"
    return f"{WEIGHTS} is missing"
