"""Whether a composition can be written down as weights at all.

A term that waits for a text has no constant weight, nor has one of a composition whose mode decides; and an adapter's
own mode may gate it and decide its weight at inference: whether it does so with this one is for the mode to say
(`lora_rt_static`).
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_rt.core.export import ExportError
from lora_rt.core.export.outline import Outline
from lora_rt.core.export.terms import ExportTerm
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import AdapterView
from lora_rt.plugins.manager import ModeHost


def check_static(terms: Sequence[ExportTerm], modes: ModeHost, base: Outline) -> tuple[list[str], list[LoraRtError]]:
    """Notes on adapters whose mode could act at inference and does not; and the terms that are not static."""
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


def _dynamic(name: str, why: str) -> ExportError:
    return ExportError(
        f"{name!r} has no static equivalent: {why}", next_step="Use --static to export it as if it were always on"
    )
