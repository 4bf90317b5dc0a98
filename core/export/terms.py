"""The terms of a composition, read from disk: which adapters, and with which weight in which block of the base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_rt.core.base.configuration import weight_files
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.export import ExportError
from lora_rt.core.export.outline import Outline
from lora_rt.core.requests.composition import Composition, Term
from lora_rt.core.requests.named import check_pin, expanded
from lora_rt.core.requests.reading import own_weights_in, read_adapter
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import AdapterView
from lora_rt.plugins.manager import ModeHost
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved


@dataclass(frozen=True, slots=True)
class ExportTerm:
    """One adapter and its weight in every block; `after` is the text that it waits for, where it does.

    `decided` names who decides its weight at inference, where it stands in a named composition with a mode.
    """

    resolved: Resolved
    adapter: ResidentAdapter
    weights: tuple[float, ...]
    after: str | None = None
    decided: str = ""

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.adapter.name

    @property
    def condition(self) -> str | None:
        """What its weight depends on at inference, None where on nothing."""
        return f"{self.after or ''}{self.decided}" or None

    @property
    def weight(self) -> float:
        """Its weight; the mean over the blocks where it differs between them."""
        first = self.weights[0]
        return first if set(self.weights) == {first} else sum(self.weights) / len(self.weights)

    def weight_in(self, block: int | None) -> float:
        """Its weight in one block; outside the blocks, as in an output head, the mean."""
        return self.weight if block is None else self.weights[block]

    def document(self) -> dict[str, Any]:
        """The term for `--json`; `layers` only where the weight differs between them."""
        card = self.resolved.card
        facts = {
            "name": self.name,
            "weight": self.weight,
            "mode": self.adapter.mode,
            "source": self.resolved.source,
            "revision": self.resolved.revision,
            "sha256": self.resolved.sha256,
            "licence": card.licence if card else "",
        }
        return facts if len(set(self.weights)) == 1 else {**facts, "layers": list(self.weights)}


def read_terms(
    composition: Composition, registry: Registry, base: Outline
) -> tuple[list[ExportTerm], list[LoraRtError]]:
    """Every term, named compositions expanded and repeated adapters united, inspected and read; and what failed."""
    found: list[ExportTerm] = []
    failures: list[LoraRtError] = []
    for term in composition.terms:
        try:
            found += [_read(part, registry, base) for part in expanded(term, registry.compositions, base.facts)]
        except LoraRtError as error:
            failures.append(error)
    return _united(found), failures


Fingerprint = tuple[str, str | None, tuple[float, ...]]
"""The digest of an adapter's files, the condition under which it acts, and its weight in every block."""


def find_terms(composition: Composition, registry: Registry, base: Outline) -> list[Fingerprint]:
    """What `read_terms` would read, without a look at the weights.

    Raises:
        LoraRtError: a term can't be found.
    """
    parts = [part for term in composition.terms for part in expanded(term, registry.compositions, base.facts)]
    return [(registry.find(p.reference, base.identity).sha256, _condition(p), _weights(p, base)) for p in parts]


def key_of(base: Outline, terms: Sequence[Fingerprint]) -> str:
    """One digest over a base and the adapters over it, each once, in any order; those without a weight do not count."""
    totals: dict[tuple[str, str | None], tuple[float, ...]] = {}
    for sha256, after, weights in terms:
        before = totals.get((sha256, after), (0.0,) * len(weights))
        totals[sha256, after] = tuple(a + b for a, b in zip(before, weights, strict=True))
    acting = sorted((sha, after or "", [w.hex() for w in ws]) for (sha, after), ws in totals.items() if any(ws))
    said = [asdict(base.identity), base.facts.layers, acting]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def check_static(terms: Sequence[ExportTerm], modes: ModeHost, base: Outline) -> tuple[list[str], list[LoraRtError]]:
    """Notes on adapters whose mode could act at inference and does not; and the terms that are not static.

    A term that waits for a text has no constant weight, nor has one of a composition whose mode decides; and whether an
    adapter's own mode gates this one, or decides its weight, is for that mode to say (`lora_rt_static`).
    """
    failures: list[LoraRtError] = [_dynamic(t.name, f"it waits for {t.after!r}") for t in terms if t.after]
    failures += [_dynamic(term.name, term.decided) for term in terms if term.decided]
    notes = []
    for term in terms:
        adapter = term.adapter
        try:
            acts = modes.acting_hooks(adapter.mode)
            view = AdapterView(adapter.name, adapter.card, adapter.state, base.facts)
            why = modes.why_not_static(adapter.mode, view) if acts else ""
        except LoraRtError as error:
            failures.append(error)
            continue
        if why:
            failures.append(_dynamic(term.name, f"its mode {adapter.mode!r} {why}"))
        elif acts:
            notes.append(f"{term.name}: its mode {adapter.mode!r} can act at inference, and leaves this one alone")
    return notes, failures


def _read(part: Term, registry: Registry, base: Outline) -> ExportTerm:
    anyway, folder = registry.allow_base_mismatch, base.source.path
    resolved = registry.find(part.reference, base.identity)
    inspected = inspect_adapter(
        resolved.folder,
        name=resolved.name,
        linears=base.shapes | base.embeddings,
        base=None if anyway else base.identity,
        sha256=resolved.digests.sha256_recorded,
        own=None if folder is None or not folder.is_dir() else own_weights_in(weight_files(folder)),
        load=True,
    )
    check_pin(part, resolved.name, inspected.sha256)
    weights = _weights(part, base)
    if any(weights) and (extras := inspected.extras):  # without a weight it adds nothing, whatever it holds
        text = f"{resolved.name} holds {' and '.join(extras)}, which is not exported"
        otherwise = "" if inspected.invocation else ", or export it with PEFT: merge_and_unload()"  # which aLoRA lacks
        raise ExportError(text, next_step=f"Compose with it at run time{otherwise}")
    if any(weights) and any(module.of_weight and module.module in base.transposed for module in inspected.modules):
        text = (
            f"{resolved.name} adapts weights as they lie in memory (target_parameters), turned, which is not exported"
        )
        raise ExportError(text, next_step="Export it with PEFT: merge_and_unload()")
    adapter = read_adapter(inspected, resolved.name)
    return ExportTerm(resolved.read(inspected.files), adapter, weights, part.after, _decided(part))


def _weights(part: Term, base: Outline) -> tuple[float, ...]:
    """The weight of a term in every block."""
    return tuple(part.weight * factor for factor in part.layers or (1.0,) * base.facts.layers)


def _condition(part: Term) -> str | None:
    return f"{part.after or ''}{_decided(part)}" or None


def _decided(part: Term) -> str:
    """Who decides its weight at inference, where it is not what is written."""
    return f"the mode {part.mode!r} of the composition {part.composition!r} decides its weight" if part.mode else ""


def _united(terms: Sequence[ExportTerm]) -> list[ExportTerm]:
    """The same adapter twice is one adapter with both weights: its rank counts once."""
    kept: dict[tuple[str, str | None, str], ExportTerm] = {}
    for term in terms:
        key = term.resolved.sha256, term.after, term.decided
        if key in kept:
            total = tuple(a + b for a, b in zip(kept[key].weights, term.weights, strict=True))
            kept[key] = replace(kept[key], weights=total)
        else:
            kept[key] = term
    return list(kept.values())


def _dynamic(name: str, why: str) -> ExportError:
    return ExportError(
        f"{name!r} has no static equivalent: {why}", next_step="Use --static to export it as if it were always on"
    )
