"""Which adapters a runtime holds: resolves references, checks them against the base, and makes them resident.

Three tables say what a term of a request means. After `load("./voices/emotion", name="mine")` and a request for
"org/logic emotion" they are

    infos     mine: ./voices/emotion     logic: hub org/logic     emotion: the shipped one     what is in the bank
    aliases   "org/logic": logic         "emotion": emotion       references that need not be looked up again
    given     {mine}                                              what `load` returned; wins over the registry

`infos` is replaced and never changed, so that other threads may read it without the lock.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike

from lora_rt.core.base.load import LoadedBase
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.resident import BankError, ResidentAdapter
from lora_rt.core.engine.topology import is_turned
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.requests.answered import AdapterOrigin
from lora_rt.core.requests.composition import Composition, Term
from lora_rt.core.requests.moded import ModedComposition, read_moded
from lora_rt.core.requests.named import RequestNames, check_pin, expanded, named_composition, raise_all
from lora_rt.core.requests.reading import own_weights, read_adapter
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import ModeHost
from lora_rt.registry import files
from lora_rt.registry.card import AdapterCard
from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.errors import UnknownAdapterError, WrongBaseError
from lora_rt.registry.inspection import InspectedAdapter, inspect_adapter
from lora_rt.registry.paths import folder_of
from lora_rt.registry.reference import Reference, check_name, composed
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved

_log = logging.getLogger("lora_rt.requests")


@dataclass(frozen=True, slots=True)
class AdapterInfo(AdapterOrigin):
    """A resident adapter, for people and tables. `rank` is the largest among its modules; `modules` counts them."""

    register: str
    rank: int
    modules: int
    why: str
    card: AdapterCard | None


@dataclass(frozen=True, slots=True, eq=False)
class ResolvedTerm:
    """A term and the adapter that it means, as they were when it was looked up: another thread may unload one.

    `moded` is the named composition that it stands in, where that has a mode.
    """

    term: Term
    info: AdapterInfo
    adapter: ResidentAdapter
    moded: ModedComposition | None = None


class Residents:
    """The resident adapters of one base. Safe to use from several threads."""

    def __init__(
        self,
        base: LoadedBase,
        bank: AdapterBank,
        modes: ModeHost,
        registry: Registry,
        text: TextFormat | None = None,
    ) -> None:
        self._base = base
        self._text = text
        self._bank = bank
        self._modes = modes
        self._registry = registry
        self._lock = threading.RLock()
        self._aliases: dict[str, str] = {}  # text of a reference -> the resident name it was given
        self._stamps: dict[str, list[str]] = {}  # text of a path -> of its files, when they were read
        self._given: frozenset[str] = frozenset()  # names that a caller knows; others came with a composition
        self._moded: dict[str, ModedComposition] = {}  # by digest
        self.infos: Mapping[str, AdapterInfo] = {}

    def load(
        self,
        reference: Reference | str | PathLike[str],
        name: str | None = None,
        *,
        allow_base_mismatch: bool = False,
    ) -> str:
        """Make an adapter resident and return its name; whatever base it states, if that is allowed and it fits.

        Raises:
            LoraRtError: it can't be resolved, is refused by the inspection, or its mode is not installed.
        """
        parsed = Reference.of(reference)
        if name is not None:
            name = composed(name)
            check_name(name)
        with self._lock:  # while it is read, too: two requests for one adapter read it once
            resident = self._load(parsed, name, allow_base_mismatch)
            self._given |= {resident}
        return resident

    def reload(self, reference: Reference, name: str | None = None) -> str:
        """Read the files again that a reference means now; the resident of its name is replaced, if nothing is refused.

        Args:
            name: the resident's; that in the reference where left out.

        Raises:
            LoraRtError: as `load`; what was resident stays.
        """
        with self._lock:
            resident = self._load(reference, name or reference.target)
            self._aliases[reference.text] = resident
        return resident

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            BankError: it is not resident.
        """
        name = composed(name)
        with self._lock:
            self._bank.remove(name)
            self._given -= {name}
            self.infos = {key: info for key, info in self.infos.items() if key != name}
            self._aliases = {text: resident for text, resident in self._aliases.items() if resident != name}
            self._stamps = {text: stamp for text, stamp in self._stamps.items() if text in self._aliases}

    def ensure(self, composition: Composition) -> list[tuple[AdapterInfo, float]]:
        """The adapter and the weight of every term, loading what is not resident yet.

        Raises:
            LoraRtError: terms that can't be loaded; all of them are named.
        """
        return [(item.info, item.term.mean_weight) for item in self.resolved([composition])[0]]

    def resolved(self, compositions: Sequence[Composition | None]) -> list[list[ResolvedTerm]]:
        """Every term of each row with its adapter resident; a named composition stands there as its terms.

        A name is looked up once, so that it means one thing in all rows. No composition, no terms.

        Raises:
            LoraRtError: terms that can't be loaded; all of the row's are named.
        """
        names = RequestNames(self._registry.compositions, self._given)  # one look for all rows of a request
        return [[] if composition is None else self._of_row(composition, names) for composition in compositions]

    def _of_row(self, composition: Composition, names: RequestNames) -> list[ResolvedTerm]:
        found: list[ResolvedTerm] = []
        failures: list[LoraRtError] = []
        for term in composition.terms:
            try:
                parts = [self._resolved(part) for part in expanded(term, names, self._base.facts)]
                # All terms of a named composition have the mode that it has itself, or none.
                found += self._with_mode(term, parts, names) if parts[0].term.mode else parts
            except LoraRtError as error:
                failures.append(error)
        raise_all(failures, f"{len(failures)} terms of {composition} can't be used")
        return found

    def moded(self, name: str) -> ModedComposition | None:
        """The named composition of this name in memory, where it has a mode; its adapters are not loaded for it.

        Raises:
            LoraRtError: it is for another base, or its mode or its tensors are missing.
        """
        names = RequestNames(self._registry.compositions, self._given)
        term = Term(Reference.parse(name))
        named = named_composition(term, names)
        if named is None or not named.mode:
            return None
        expanded(term, names, self._base.facts)
        return self._read_moded(named)

    def _read_moded(self, named: NamedComposition) -> ModedComposition:
        self._modes.require(named.mode)
        with self._lock:
            if named.sha256 not in self._moded:
                self._moded[named.sha256] = read_moded(named, self._registry.compositions)
            return self._moded[named.sha256]

    def _with_mode(self, term: Term, parts: Sequence[ResolvedTerm], names: RequestNames) -> list[ResolvedTerm]:
        """The terms of a named composition with a mode, and what its mode keeps."""
        named = named_composition(term, names)
        assert named is not None
        moded = self._read_moded(named)
        return [replace(part, moded=moded) for part in parts]

    def _resolved(self, term: Term) -> ResolvedTerm:
        with self._lock:  # name, facts and factors are those of one moment
            info = self._pinned(term) if term.sha256 else self._resident(term.reference)
            check_pin(term, info.name, info.sha256)
            return ResolvedTerm(term, info, self._bank.residents[info.name])

    def _resident(self, reference: Reference) -> AdapterInfo:
        info = self.infos.get(reference.target) if reference.kind == "name" and not reference.revision else None
        # That somebody's repository is resident as `emotion` does not make it what `emotion` means: only names that the
        # caller gave, or that the registry knows, do.
        if info is not None and (info.name in self._given or not info.source.startswith("hub ")):
            return info
        return self._found(reference)

    def _pinned(self, term: Term) -> AdapterInfo:
        """The adapter that a named composition was tuned for: a caller's own of that name is another one."""
        same = next((info for info in self.infos.values() if info.sha256 == term.sha256), None)
        if same is not None:
            return same
        reference = term.reference
        if reference.kind == "name" and reference.revision is None:
            # The name may have come to mean another adapter, and the one that is meant still be there behind it.
            with suppress(UnknownAdapterError, WrongBaseError):
                return self._found(Reference.parse(f"{reference.text}@{term.sha256}"))
        return self._found(reference)

    def _found(self, reference: Reference) -> AdapterInfo:
        # Named first: loading replaces the table of infos.
        name = self._aliases.get(reference.text)
        if name is None:
            name = self._load(reference, None)
        elif (now := self._stamp(reference)) and now != self._stamps.get(reference.text):
            name = self.reload(reference, name)  # trained anew, while this one is in memory
        return self.infos[name]

    def _stamp(self, reference: Reference) -> list[str]:
        """What changes with the files at a path; nothing where there are none any more, or it is no path."""
        if reference.kind != "path":
            return []
        with suppress(OSError, LoraRtError):
            folder = folder_of(self._registry.folder, reference)
            return [files.stamp(folder / name) for name in files.present(folder)]
        return []

    def _load(self, reference: Reference, name: str | None, allow_base_mismatch: bool = False) -> str:
        """Find, check against the base and make resident, in one pass over the files."""
        # The registry chooses among adapters of one name by the base that they state; the inspection refuses what was
        # chosen. Without the former the wrong one would be found, without the latter a path would not be checked.
        anyway = allow_base_mismatch or self._registry.allow_base_mismatch
        before = self._stamp(reference)
        resolved = self._registry.find(reference, self._base.identity, allow_base_mismatch=anyway)
        inspected = inspect_adapter(
            resolved.folder,
            name=resolved.name,
            linears=self._bank.topology.shapes,
            base=None if anyway else self._base.identity,
            sha256=resolved.digests.sha256_recorded,
            own=own_weights(self._base.model),
            load=True,
        )
        self._modes.require(inspected.mode)  # before it takes a place in the bank, where nobody could weigh it
        resident = name or self._free_name(inspected)
        self._make_resident(resolved, inspected, resident)
        # Another reference may have led to an adapter that had this name before.
        self._aliases = {text: other for text, other in self._aliases.items() if other != resident}
        self._stamps[reference.text] = before
        if name is None:
            self._aliases[reference.text] = resident
        return resident

    def _free_name(self, inspected: InspectedAdapter) -> str:
        """The adapter's own name, or that with part of its digest where another adapter has it."""
        taken = self.infos.get(inspected.name)
        if taken is None or taken.sha256 == inspected.sha256:
            return inspected.name
        return f"{inspected.name}-{inspected.sha256[:8]}"

    def _make_resident(self, resolved: Resolved, inspected: InspectedAdapter, name: str) -> None:
        adapter = read_adapter(inspected, name)
        turned = [m.module for m in inspected.modules if m.of_weight and is_turned(self._bank.topology, m.module)]
        if turned:
            text = f"{name} adapts the weight of {turned[0]} as it lies in memory (target_parameters), which is turned"
            raise BankError(text, next_step="Merge it into its base with PEFT, and give the result to --base")
        self._bank.add(adapter)
        info = AdapterInfo(
            name=name,
            register=inspected.card.register if inspected.card else name,
            mode=inspected.mode,
            rank=adapter.rank,
            modules=len(adapter.factors),
            source=resolved.source,
            revision=resolved.revision,
            sha256=inspected.sha256,
            why=resolved.why,
            card=inspected.card,
        )
        self.infos = {**self.infos, name: info}
        if info.card and not self._base.identity.digest and not info.card.base.matches(self._base.identity):
            stated, mine = info.card.base.id, self._base.identity.id
            _log.warning("%s was made for %s, and the model in memory is %s: only the shapes agree", name, stated, mine)
        if self._text and info.card and (difference := self._text.differs_from(info.card.training)):
            _log.warning("%s was trained %s", name, difference)
