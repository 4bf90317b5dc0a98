"""The whole check of one adapter folder. It runs before a byte reaches a model, and names everything that is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lora_rt.registry import files
from lora_rt.registry.bases import base_problems
from lora_rt.registry.card import AdapterCard, BaseIdentity, parse_card
from lora_rt.registry.errors import ChangedAdapterError, RejectedAdapterError
from lora_rt.registry.files import CARD, CONFIG, LIMITS, MEGABYTE, STATE, WEIGHTS, UnusableFileError
from lora_rt.registry.inspection import kinds
from lora_rt.registry.inspection.config import read_config
from lora_rt.registry.inspection.modules import Linears, LoraModule, TokenModule, pair_modules, rank_problems
from lora_rt.registry.inspection.safetensors_header import TensorEntry, read_header
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.inspection.values import RawTensor, TensorFacts, norm_problems, read_values, value_problems
from lora_rt.registry.reference import is_hub_target, name_problem
from lora_rt.registry.strict_json import shown

DEFAULT_MODE = "output-only"
MAX_SHOWN = 60
MAX_STATE_VALUE = 1e6
_BYTES_WORTH_READING = 256 * MEGABYTE

OwnWeights = Callable[[str, RawTensor], bool | None]
"""Whether the base's own tensor of a name equals one that an adapter's file holds; None where the base has none."""


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """An adapter that passed.

    `files` maps each file's name to its sha256; `sha256` is one digest over them. Where the inspection was asked to
    load, `tensors` are the factors by key and `state` those of `mode.safetensors`: the very bytes that were checked.
    `tokens` are trained rows of embeddings; `whole` maps (module, weight | bias) of what was trained as a whole, and
    `biases` modules with trained biases, to their keys.
    """

    name: str
    folder: Path
    modules: tuple[LoraModule, ...]
    card: AdapterCard | None
    mode: str
    sha256: str
    files: Mapping[str, str]
    tensors: Mapping[str, RawTensor] = field(default_factory=dict)
    state: Mapping[str, RawTensor] = field(default_factory=dict)
    tokens: tuple[TokenModule, ...] = ()
    whole: Mapping[tuple[str, str], str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)

    @property
    def extras(self) -> list[str]:
        """What it holds besides A, B and their biases, in words."""
        found = {
            "DoRA": any(module.magnitude_key for module in self.modules),
            "a LoRA of the embedding": any(module.embeds for module in self.modules),
            "trained token rows": bool(self.tokens),
            "modules that were trained as a whole": bool(self.whole),
            "trained biases": bool(self.biases),
        }
        return [what for what, there in found.items() if there]


def inspect_adapter(
    folder: Path,
    *,
    name: str,
    linears: Linears | None = None,
    base: BaseIdentity | None = None,
    sha256: str | None = None,
    own: OwnWeights | None = None,
    load: bool = False,
) -> InspectedAdapter:
    """Check an adapter folder and say what it holds, in one pass over its files.

    Args:
        folder: a PEFT directory from anywhere.
        name: what the adapter is to be called.
        linears: every adaptable module of the base, its path to (out_features, in_features); None checks only what can
            be known without a base.
        base: the base in use; an adapter that states another one is refused.
        sha256: the digest the adapter was pinned to.
        own: compares a tensor with the base's own: PEFT saves copies of the head and of biases beside the factors.
            An equal one is left out, a trained bias kept; without `own` a base takes none, and without `linears` nobody
            can compare yet.
        load: keep the tensors.

    Raises:
        RejectedAdapterError: `problems` names everything that is wrong.
        ChangedAdapterError: the adapter is sound, but not the one that was pinned.
    """
    inspection = _Inspection(folder, linears, base, own, load)
    problems = [] if is_hub_target(name) else name_problem(name)
    problems += inspection.run()
    if problems:
        raise _rejected(name, folder, problems)
    found = inspection.found
    combined = files.combined(found)
    if sha256 is not None and combined != sha256:
        raise ChangedAdapterError(
            f"the files of {name} changed: their digest is {combined}, pinned was {sha256}",
            next_step=f"Run: lora-rt verify {name}",
        )
    card = inspection.card
    return InspectedAdapter(
        name=name,
        folder=folder,
        modules=inspection.modules,
        card=card,
        mode=card.mode if card else DEFAULT_MODE,
        sha256=combined,
        files=found,
        tensors=inspection.tensors,
        state=inspection.state,
        tokens=inspection.tokens,
        whole=inspection.whole,
        biases=inspection.biases,
    )


def foreseen(folder: Path, *, name: str, base: BaseIdentity | None = None) -> str:
    """The mode of an adapter, from its small files alone: what is wrong with those is said before a base is loaded.

    Raises:
        RejectedAdapterError: card, configuration, base or the names of its files are not what `inspect_adapter` takes.
    """
    inspection = _Inspection(folder, None, base, None, load=False)
    problems = inspection.before_weights()
    if not problems:
        problems = [missing] if (missing := kinds.missing_weights(os.listdir(folder))) else []
    if problems:
        raise _rejected(name, folder, problems)
    return inspection.card.mode if inspection.card else DEFAULT_MODE


def _rejected(name: str, folder: Path, problems: Sequence[str]) -> RejectedAdapterError:
    way_out = kinds.way_out(problems, folder)
    return RejectedAdapterError(_summary(name, problems), problems=_bounded(problems), next_step=way_out)


def _summary(name: str, problems: Sequence[str]) -> str:
    count = "one thing is" if len(problems) == 1 else f"{len(problems):,} things are"
    return f"adapter {shown(name)} is refused, {count} wrong with it"


def _bounded(problems: Sequence[str]) -> list[str]:
    shown_ones = [problem if len(problem) <= 400 else problem[:400] + "..." for problem in problems[:MAX_SHOWN]]
    more = len(problems) - len(shown_ones)
    return [*shown_ones, f"and {more:,} more"] if more else shown_ones


class _Inspection:
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
        if self.base is None or self.linears is None or named in ("", self.base.id):
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
            opened: dict[str, BinaryIO] = {}
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
        self, opened: Mapping[str, BinaryIO], parts: Mapping[str, dict[str, TensorEntry]], size: int, is_refused: bool
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
            read = read_values(file, parts[name].values(), keep)
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
                    read = read_values(file, entries.values(), set(entries) if self.load else ())
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


def _form(tensor: tuple[str, tuple[int, ...]]) -> str:
    return f"{tensor[0]} {list(tensor[1])}"
