"""The whole check of one adapter folder. It runs before a byte reaches a model, and names everything that is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_rt.registry import files
from lora_rt.registry.card import AdapterCard, BaseIdentity
from lora_rt.registry.errors import ChangedAdapterError, RejectedAdapterError
from lora_rt.registry.inspection import kinds
from lora_rt.registry.inspection.adapted import Linears, LoraModule, TokenModule
from lora_rt.registry.inspection.folder import Inspection, OwnWeights
from lora_rt.registry.inspection.values import RawTensor
from lora_rt.registry.reference import is_hub_target, name_problem
from lora_rt.registry.strict_json import shown

DEFAULT_MODE = "output-only"
MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class InspectedAdapter:
    """An adapter that passed.

    `files` maps each file's name to its sha256; `sha256` is one digest over them. Where the inspection was asked to
    load, `tensors` are the factors by key and `state` those of `mode.safetensors`: the very bytes that were checked.
    `tokens` are trained rows of embeddings; `whole` maps (module, weight | bias) of what was trained as a whole, and
    `biases` modules with trained biases, to their keys. `invocation` are the tokens that wake an aLoRA up.
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
    invocation: tuple[int, ...] = ()

    @property
    def extras(self) -> list[str]:
        """What it holds besides A, B and their biases, in words."""
        found = {
            "DoRA": any(module.magnitude_key for module in self.modules),
            "a LoRA of experts or routers": any(m.experts or m.module.endswith(".weight") for m in self.modules),
            "a LoRA of the embedding": any(module.embeds for module in self.modules),
            "trained token rows": bool(self.tokens),
            "modules that were trained as a whole": bool(self.whole),
            "trained biases": bool(self.biases),
            "tokens that wake it up (aLoRA)": bool(self.invocation),
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
    inspection = Inspection(folder, linears, base, own, load)
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
        invocation=inspection.settings.invocation if inspection.settings else (),
    )


def foreseen(folder: Path, *, name: str, base: BaseIdentity | None = None) -> str:
    """The mode of an adapter, from its small files alone: what is wrong with those is said before a base is loaded.

    Raises:
        RejectedAdapterError: card, configuration, base or the names of its files are not what `inspect_adapter` takes.
    """
    inspection = Inspection(folder, None, base, None, load=False)
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
