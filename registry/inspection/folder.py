"""One pass over the files of an adapter's folder, from the smallest to the weights; each step says what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path

from lora_rt.registry import files
from lora_rt.registry.bases import base_problems
from lora_rt.registry.card import AdapterCard, BaseIdentity, parse_card
from lora_rt.registry.files import CARD, CONFIG, LIMITS, MEGABYTE, STATE, WEIGHTS, UnusableFileError
from lora_rt.registry.inspection import kinds
from lora_rt.registry.inspection.adapted import Linears, LoraModule, TokenModule
from lora_rt.registry.inspection.config import read_config
from lora_rt.registry.inspection.modules import pair_modules, rank_problems
from lora_rt.registry.inspection.safetensors_header import TensorEntry, read_header
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.inspection.values import RawTensor, ReadFile, TensorFacts, norm_problems, value_problems
from lora_rt.registry.strict_json import shown

MAX_STATE_VALUE = 1e6
_BYTES_WORTH_READING = 256 * MEGABYTE

OwnWeights = Callable[[str, RawTensor], bool | None]
"""Whether the base's own tensor of a name equals one that an adapter's file holds; None where the base has none."""


class Inspection:
    """One run over one folder, file by file; each step returns the problems it found."""

    def __init__(
        self,
        folder: Path,
        linears: Linears | None,
        base: BaseIdentity | None,
        own: OwnWeights | None,
        load: bool,
    ) -> None:
        self.folder, self.linears, self.base, self.own, self.load = folder, linears, base, own, load
        self.tensors: dict[str, RawTensor] = {}
        self.state: Mapping[str, RawTensor] = {}
        self.found: dict[str, str] = {}
        self.card: AdapterCard | None = None
        self.settings: LoraSettings | None = None
        self.modules: tuple[LoraModule, ...] = ()
        self.tokens: tuple[TokenModule, ...] = ()
        self.whole: Mapping[tuple[str, str], str] = {}
        self.biases: dict[str, str] = {}

    def run(self) -> list[str]:
        """Every problem of the folder."""
        problems = self.before_weights()
        if folder_problems(self.folder):
            return problems
        names = files.present(self.folder)
        wrong = self._read_weights(names, bool(problems))
        problems += (self._base_hint() if wrong and not problems else []) + wrong + self._read_state(names)
        for name in sorted(set(names) - set(self.found)):
            problems += self._hash(name)
        return problems

    def before_weights(self) -> list[str]:
        """Problems of the folder, the card and the configuration."""
        problems = folder_problems(self.folder)
        if problems:
            return problems
        names = files.present(self.folder)
        problems = self._read_card(names) + self._read_config(names)
        return problems + self._base_problems()

    def _base_problems(self) -> list[str]:
        configured = None if self.settings is None else self.settings.base_name
        return base_problems(None if self.card is None else self.card.base, configured, self.base)

    def _base_hint(self) -> list[str]:
        """Tensors are wrong: the base that the adapter names, where it is called otherwise than the one in use."""
        named = self.card.base.id if self.card else self.settings.base_name if self.settings else ""
        if self.base is None or self.linears is None or self.base.id in (named, Path(named).name) or not named:
            return []
        return [f"it names the base {shown(named)}, in use is {shown(self.base.id)}"]

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

    def _read_weights(self, names: list[str], is_refused: bool) -> list[str]:
        """Headers first; the values are not read where it is known already that the file is refused and it is large."""
        if missing := kinds.missing_weights(os.listdir(self.folder)):
            return [missing]
        parts = [name for name in names if name == WEIGHTS or files.shard_number(name)]
        self.found.update(dict.fromkeys(parts, ""))
        with ExitStack() as stack:
            opened: dict[str, BufferedReader] = {}
            entries: dict[str, dict[str, TensorEntry]] = {}
            size, problems = 0, []
            for name in parts:
                try:
                    opened[name], bytes_ = stack.enter_context(
                        files.open_plain(self.folder / name, LIMITS[WEIGHTS] - size)
                    )
                    entries[name], wrong = read_header(opened[name], bytes_)
                except UnusableFileError as error:
                    return [f"{name} {error}"]
                size += bytes_
                problems += [f"{name} {problem}" for problem in wrong]
            if problems:
                return problems
            return self._read_tensors(opened, entries, size, is_refused)

    def _read_tensors(
        self,
        opened: Mapping[str, BufferedReader],
        parts: Mapping[str, dict[str, TensorEntry]],
        size: int,
        is_refused: bool,
    ) -> list[str]:
        entries = {key: entry for part in parts.values() for key, entry in part.items()}
        problems = [] if len(entries) == sum(map(len, parts.values())) else ["its parts hold one tensor twice"]
        problems += rank_problems(entries, experts=bool(self.settings and self.settings.parameters))
        copies: Mapping[str, str] = {}
        if self.settings is not None:
            pairing = pair_modules(entries, self.settings, self.linears)
            self.modules, copies = pairing.modules, pairing.copies
            self.tokens, self.whole = pairing.tokens, pairing.whole
            problems += pairing.problems
        if self.linears is not None and self.own is None:
            problems += [f"{shown(key)} is {kinds.of_tensor(key)}" for key in copies]
        if (problems or is_refused) and size > _BYTES_WORTH_READING:
            return [*problems, f"{WEIGHTS}: its {size:,} bytes of values were not looked at"]
        compared = set(copies) if self.own is not None else set()
        keep = compared | (set(entries) - set(copies) if self.load and not problems else set())
        facts: dict[str, TensorFacts] = {}
        for name, file in opened.items():
            read = _read(file, parts[name].values(), keep)
            facts.update(read.facts)
            self.tensors.update(read.tensors)
            self.found[name] = read.sha256
        problems += self._copy_problems(copies)
        wrong = value_problems(facts)
        return problems + (wrong or norm_problems(facts, self.modules))

    def _copy_problems(self, copies: Mapping[str, str]) -> list[str]:
        """Copies of the base's own tensors that are none; all of them are let go."""
        problems = []
        for key, name in copies.items():
            tensor = self.tensors.pop(key, None)
            same = self.own(name, tensor) if self.own is not None and tensor is not None else True
            if same is None:
                problems.append(f"{shown(key)} is {kinds.of_tensor(key)}")
            elif not same and tensor is not None and (words := self._words_of(name, tensor)):
                text = f"{shown(key)} has {tensor.shape[0]:,} tokens, this base {words:,}: it was trained on a base to"
                problems.append(f"{text} which tokens were added; resize the base, and merge it into that")
            elif not same and tensor is not None and self._is_trained(name):
                owner = name.removesuffix(".bias")
                if owner in (self.linears or {}):
                    self.biases[owner] = key
                else:
                    self.whole = {**self.whole, (owner, "bias"): key}
                self.tensors[key] = tensor
            elif not same:
                problems.append(f"{shown(key)} is not the base's own {name}, and no adapter may replace it")
        return problems

    def _words_of(self, name: str, tensor: RawTensor) -> int:
        """How many tokens the base has, where a tensor is an embedding or a head of another number of them; else 0."""
        size = (self.linears or {}).get(name.removesuffix(".weight"), ())
        if len(size) != 2 or len(tensor.shape) != 2 or tensor.shape[1] not in size or tensor.shape[0] in size:
            return 0
        return max(size)

    def _is_trained(self, name: str) -> bool:
        """Whether a tensor that the base has otherwise is a bias, and biases were trained."""
        return self.settings is not None and self.settings.biases and name.endswith(".bias")

    def _read_state(self, names: list[str]) -> list[str]:
        if STATE not in names:
            return [f"{STATE} is missing, the card describes one"] if self.card and self.card.state else []
        try:
            self.found[STATE] = ""
            facts: Mapping[str, TensorFacts] = {}
            with files.open_plain(self.folder / STATE, LIMITS[STATE]) as (file, size):
                entries, problems = read_header(file, size)
                problems += self._state_problems(entries) if not problems else []
                if not problems:
                    read = _read(file, entries.values(), set(entries) if self.load else ())
                    facts, self.found[STATE], self.state = read.facts, read.sha256, read.tensors
        except UnusableFileError as error:
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
            self.found[name] = files.sha256_of(self.folder / name, files.limit_of(name) or 0)
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


def _read(file: BufferedReader, entries: Iterable[TensorEntry], keep: Container[str]) -> ReadFile:
    # numpy is a third of the time that a command takes to start, and most commands read no values.
    from lora_rt.registry.inspection.reading import read_values

    return read_values(file, entries, keep)


def _form(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]} {list(tensor[1])}"
