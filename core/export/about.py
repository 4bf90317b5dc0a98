"""What an export says of itself: `register.json` for a PEFT adapter, README.md for everything."""

from __future__ import annotations

from collections.abc import Sequence

from lora_rt.core.export.outline import Outline
from lora_rt.core.export.terms import ExportTerm
from lora_rt.registry.card import AdapterCard
from lora_rt.version import __version__

_LONGEST = 300  # characters of a text in a card


def title(terms: Sequence[ExportTerm]) -> str:
    """The composition by the names of its adapters; the paths that led to them are nobody else's business."""
    return " ".join(f"{term.name}:{_weight(term)}" for term in terms)


def licence(terms: Sequence[ExportTerm]) -> str:
    """The licences of all adapters, which all bind; empty where one states none."""
    stated = [term.resolved.card.licence if term.resolved.card else "" for term in terms]
    return " AND ".join(dict.fromkeys(stated)) if all(stated) else ""


def card(terms: Sequence[ExportTerm], base: Outline, *, left_out: bool) -> AdapterCard:
    """The card of a composition that became one adapter: mode output-only, `training` lists what it was made of."""
    made_of = {f"adapter {number}": _short(_line(term)) for number, term in enumerate(terms, start=1)}
    return AdapterCard(
        register=_short(title(terms)),
        mode="output-only",
        base=base.identity,
        licence=_short(licence(terms)),
        training={"exported_from": _short(title(terms)), "gates_left_out": left_out, **made_of},
        lora_rt=__version__,
    )


def readme(terms: Sequence[ExportTerm], base: Outline, use: str, *, left_out: bool) -> str:
    """The README.md: what it is, what it was made of, how to load it."""
    lines = [f"# {title(terms)}", ""]
    lines += [f"A composition of LoRA adapters over {base.identity.id}, exported by lora-rt {__version__}.", ""]
    lines += [f"- {_line(term)}" for term in terms]
    if left_out:
        lines += ["", "Gates and activation texts of these adapters were left out: they act as if always on."]
    lines += ["", "## Use", "", "```", use, "```", ""]
    return "\n".join(lines)


def _line(term: ExportTerm) -> str:
    found = term.resolved
    stated = found.card.licence if found.card else ""
    parts = [f"{term.name}, weight {_weight(term)}", f"sha256 {found.sha256}", f"licence {stated or 'not stated'}"]
    if not found.source.startswith((".", "/", "~")):
        parts.append(found.source + (f" at {found.revision}" if found.revision else ""))
    return ", ".join(parts)


def _weight(term: ExportTerm) -> str:
    """`0.7`; of weights per layer the mean, said to be one."""
    varies = len(set(term.weights)) > 1
    return f"{term.weight:.4g}(mean over layers)" if varies else f"{term.weight:.12g}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
