"""Which compositions a client may name: names of this machine's store, never a path, a URL or a repository.

A client's text goes where an operator's goes, to the registry. An operator may mean any file and any repository; a
client may not, since the server would then read, fetch and show what was not meant for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_rt.core.requests.composition import Composition, InvalidCompositionError, Term
from lora_rt.core.requests.named import RequestNames, named_composition
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.registry.errors import UnknownAdapterError
from lora_rt.registry.facts import everything_named
from lora_rt.registry.reference import BASE

_LONGEST = 4000  # letters of a composition


class Names:
    """What the names of clients mean here.

    Args:
        allow: references that they may use beside names, exactly as written.
        terms: of a composition, at most.
    """

    def __init__(self, runtime: Runtime, allow: frozenset[str], terms: int) -> None:
        self._runtime = runtime
        self._allow = allow
        self._terms = terms

    def composition(self, model: str, given: Mapping[str, float] | str | None = None) -> Composition | None:
        """The composition of a request, or None for the base alone.

        Args:
            model: a composition's text, "base", or the base's own name.
            given: a composition that stands in its place.

        Raises:
            LoraRtError: it is none, or names what clients may not name; all of its terms are told.
        """
        if given is None and model.strip() in (BASE, self._runtime.base.id):
            return None
        wanted = model if given is None else given
        if isinstance(wanted, str) and wanted.strip() == BASE:
            return None
        if len(wanted) > (_LONGEST if isinstance(wanted, str) else self._terms):
            raise self._too_long()
        composition = Composition.of(wanted)
        assert composition is not None
        if len(composition.terms) > self._terms:
            raise self._too_long()
        failures = [error for term in composition.terms if (error := self._trouble(term))]
        if len(failures) == 1:
            raise failures[0]
        if failures:
            text = f"{len(failures)} terms of {str(composition)[:200]!r} can't be used"
            kind = UnknownAdapterError if all(isinstance(e, UnknownAdapterError) for e in failures) else LoraRtError
            raise kind(text, problems=[str(error) for error in failures], next_step="See: GET /v1/models")
        return composition

    def known(self) -> list[str]:
        """Every name that a client may use, sorted; "base" is not among them."""
        registry = self._runtime.parts.registry
        return sorted({*registry.names(), *registry.compositions.names(), *self._runtime.adapters, *self._allow})

    def bases(self) -> dict[str, str]:
        """The base of each name of the registry that states one: this server's, where one of that name is for it."""
        own = self._runtime.base.id
        rows = sorted(everything_named(self._runtime.parts.registry), key=lambda row: row["base"] == own)
        return {row["name"]: row["base"] for row in rows if row["base"]}

    def _too_long(self) -> LoraRtError:
        text = f"this server takes compositions of at most {self._terms} terms and {_LONGEST} letters"
        return InvalidCompositionError(text, next_step="Use a shorter one")

    def _trouble(self, term: Term) -> LoraRtError | None:
        reference, registry = term.reference, self._runtime.parts.registry
        if reference.text in self._allow:
            return None
        if reference.kind != "name":
            what = "a path" if reference.kind == "path" else "a repository of the Hub"
            text = f"{reference.text[:120]!r} is {what}, and this server takes names only"
            return UnknownAdapterError(text, next_step="See: GET /v1/models. The operator may --allow more")
        try:
            if named_composition(term, RequestNames(registry.compositions, ())) is None:
                known = reference.target in self._runtime.adapters and reference.revision is None
                if not known:
                    registry.find(reference, self._runtime.parts.base.identity, offline=True)
        except LoraRtError as error:
            return error
        return None
