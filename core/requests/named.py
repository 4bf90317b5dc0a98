"""Named compositions inside compositions: `my-mix:0.5` stands for its terms, each weight times 0.5.

`RequestNames` tells what a bare name means during one request: a named composition, or an adapter.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

from lora_rt.core.requests.composition import Term
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry.bases import BaseIdentity, use_base
from lora_rt.registry.compositions import NamedComposition, NamedCompositions
from lora_rt.registry.reference import Reference


class NamedLookup(Protocol):
    """Where named compositions are found: the store, or what stands in front of it for one request."""

    def get(self, name: str) -> NamedComposition | None:
        """The composition of a name, or None."""


def check_pin(term: Term, name: str, sha256: str) -> None:
    """Compare the digest of the adapter that was found with the one that the term's weights were tuned for.

    Raises:
        LoraRtError: they differ.
    """
    if term.sha256 and sha256 != term.sha256:
        text = f"{term.composition!r} was tuned for other files of {name!r}: {term.sha256[:12]}, not {sha256[:12]}"
        raise LoraRtError(text, next_step="Tune it again with: lora-rt tune")


def raise_all(failures: Sequence[LoraRtError], summary: str, kind: type[LoraRtError] = LoraRtError) -> None:
    """Raise what was collected: one as it is, several as one that names them all, none not at all."""
    if len(failures) == 1:
        raise failures[0]
    if failures:
        lines = [line for error in failures for line in (str(error).splitlines()[0], *error.problems)]
        raise kind(summary, problems=lines, next_step="Correct each of these:")


def named_composition(term: Term, compositions: NamedLookup) -> NamedComposition | None:
    """The named composition that a term means, or None where it means an adapter."""
    reference = term.reference
    return compositions.get(reference.target) if reference.kind == "name" and reference.revision is None else None


def expanded(term: Term, compositions: NamedLookup, base: BaseFacts) -> list[Term]:
    """The adapters of a term: itself, or the terms of the named composition that it means.

    Raises:
        LoraRtError: it was tuned for another base.
    """
    named = named_composition(term, compositions)
    if named is None:
        return [term]
    problems = []
    if BaseIdentity(named.base, None, "").contradicts(BaseIdentity(base.id, None, "")):
        problems.append(f"it is for {named.base}, in use is {base.id}")
    if any(len(item.layers) not in (0, base.layers) for item in named.terms):
        problems.append(f"it has weights for another number of layers than {base.layers}")
    if problems:
        text = f"the composition {named.name!r} does not fit this base: {'; '.join(problems)}"
        raise LoraRtError(text, next_step=f"{use_base(named.base)}, or tune it again")
    return [
        Term(
            Reference.parse(i.reference), term.weight * i.weight, term.after, i.layers, i.sha256, named.name, named.mode
        )
        for i in named.terms
    ]


class RequestNames:
    """Finds named compositions, each read once for all rows; an adapter that the caller loaded comes before one."""

    def __init__(self, compositions: NamedCompositions, loaded: Container[str]) -> None:
        """`loaded` are the resident names that the caller was given."""
        self._compositions = compositions
        self._loaded = loaded
        self._found: dict[str, NamedComposition | None] = {}

    def get(self, name: str) -> NamedComposition | None:
        """The composition that a name means, or None where it means an adapter.

        Raises:
            StoreError: its file is damaged.
        """
        if name in self._loaded:
            return None
        if name not in self._found:
            self._found[name] = self._compositions.get(name)
        return self._found[name]
