"""One spelling per composition: vLLM takes a name for an adapter, and two spellings for two.

    logic:.3 + emotion:0.7   ->   emotion:0.7 logic:0.3 #5e1c2a9b40d1

The mark is the beginning of the export's key: base, files and weights. An adapter that was changed gives another mark,
so that vLLM asks for it anew; who sends the old mark is answered by the old adapter for as long as vLLM has it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lora_rt import Composition, Term

MARK = 12
"""Hex digits of a key that stand behind a composition."""

_MARKED = re.compile(rf"(?P<text>.*\S)\s+#(?P<mark>[0-9a-f]{{{MARK}}})\s*", re.DOTALL)


def parted(name: str) -> tuple[str, str]:
    """The composition and the mark of a name, "" where it has none."""
    found = _MARKED.fullmatch(name)
    return (found["text"], found["mark"]) if found else (name, "")


def marked(composition: Composition, key: str) -> str:
    """The name that vLLM is to know the composition by."""
    return f"{composition} #{key[:MARK]}"


def canonical(composition: Composition) -> Composition:
    """The same in one order, each adapter once, those without a weight left out unless none has one."""
    terms: dict[tuple[str, str | None], Term] = {}
    for term in composition.terms:
        key = term.reference.text, term.after
        known = terms.get(key)
        terms[key] = replace(term, weight=term.weight + known.weight) if known else term
    ordered = [terms[key] for key in sorted(terms, key=lambda key: (key[0], key[1] or ""))]
    acting = [term for term in ordered if term.weight != 0]
    return Composition(tuple(acting or ordered))
