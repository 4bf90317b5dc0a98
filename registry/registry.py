"""From a reference to verified files: which source has it, in which order they are asked, and why that one.

A name is looked up in the project's `lora-rt.toml`, the store, the adapters that installed packages ship, and the
sources that plugins add. A name may have one adapter per base: the base in use decides.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_rt.errors import LoraRtError
from lora_rt.registry.bases import ANYWAY, BaseIdentity, digests_apart, use_base
from lora_rt.registry.compositions import NamedComposition, NamedCompositions, NamedTerm
from lora_rt.registry.errors import (
    ChangedAdapterError,
    HubError,
    RejectedAdapterError,
    StoreError,
    UnknownAdapterError,
    WrongBaseError,
)
from lora_rt.registry.files import CONFIG
from lora_rt.registry.hub.pull import obtain
from lora_rt.registry.paths import at_path, read_path
from lora_rt.registry.pinned import PinnedNames
from lora_rt.registry.project import LOCK_FILE
from lora_rt.registry.records import Damaged, Record, read
from lora_rt.registry.reference import Reference, is_name
from lora_rt.registry.resolved import Resolved, changes, read_folder
from lora_rt.registry.shadowing import say_hidden
from lora_rt.registry.shipped import Shipped, shipped
from lora_rt.registry.store import Store

Source = tuple[str, Callable[[str, Any], Any]]


class Registry:
    """Everything that can be resolved from one working directory."""

    def __init__(
        self,
        home: Path | None = None,
        project: str | os.PathLike[str] | None = None,
        sources: Sequence[Source] = (),
        *,
        allow_base_mismatch: bool = False,
    ) -> None:
        """
        Args:
            home: where the store lies; `$LORA_RT_HOME` or the user's data folder by default.
            project: the folder whose `lora-rt.toml` and `lora-rt.lock` count; the working directory by default.
            sources: what plugins add, `(label, find)` with `find(name, base)` giving a path or None.
            allow_base_mismatch: take adapters that state another base than the one in use, if their shapes fit.
        """
        self.allow_base_mismatch = allow_base_mismatch
        self.store = Store(home)
        self.folder = Path.cwd() if project is None else Path(project).absolute()
        self.pinned = PinnedNames(self.folder, self.store)
        self.compositions = NamedCompositions(
            self.store.root / "mixes", self.pinned.compositions, self._say_what_it_hides
        )
        self.sources = sources  # not looked at here: that would import every plugin

    def resolve(
        self, reference: Reference | str, base: BaseIdentity | None = None, *, offline: bool = False
    ) -> Resolved:
        """The adapter that a reference means for this base, its files compared with what was recorded of them.

        Raises:
            LoraRtError: unknown, for other bases only, not reachable, or not what was pinned.
        """
        item = self.find(reference, base, offline=offline)
        problems = changes(item.folder, item.files) if item.digests.recorded is not None else []
        item.sha256  # noqa: B018  # hashed now, so that a file that can't be is refused here
        if problems:
            text = f"adapter {item.name!r} in the store is damaged"
            raise ChangedAdapterError(text, next_step=f"Run: lora-rt verify {item.name}", problems=problems)
        return item

    def find(
        self,
        reference: Reference | str,
        base: BaseIdentity | None = None,
        *,
        offline: bool = False,
        allow_base_mismatch: bool = False,
    ) -> Resolved:
        """The same without a look at the weights: for whoever only asks, or reads the files once and checks them then.

        With `allow_base_mismatch` a name that exists for other bases alone is found as well.

        Raises:
            LoraRtError: unknown, for other bases only, or not reachable.
        """
        reference = Reference.of(reference)
        if reference.kind == "path":
            return at_path(self.folder, reference, why="it is a path")
        try:
            if reference.kind == "hub":
                return self._from_hub(reference, offline)
            return self._named(reference, base, offline, allow_base_mismatch or self.allow_base_mismatch)
        except (HubError, UnknownAdapterError) as error:
            if (self.folder / reference.target / CONFIG).is_file():
                error.next_step = f"There is an adapter in a folder of that name: write ./{reference.target}"
            raise

    def installed(self) -> list[Resolved]:
        """Everything that can be resolved by name without the network, by name and base."""
        found: dict[tuple[str, str, str], Resolved] = {}
        for item in [*self.pinned.installed(), *self.store.installed(), *self._all_shipped()]:
            found.setdefault((item.name, item.card.base.id if item.card else "", item.sha256), item)
        return [found[key] for key in sorted(found)]

    def names(self) -> list[str]:
        """Every name that resolves."""
        return sorted({*self.pinned.sources(), *(item.name for item in self.installed())})

    def clashing(self, name: str) -> list[str]:
        """Where adapters of a composition's name come from: in a composition they are hidden by it."""
        return [item.source for item in self.installed() if item.name == name]

    def check_adapter_name(self, name: str) -> None:
        """Before an adapter gets a name: that no composition has it, which would be used in its place.

        Raises:
            StoreError: one has.
        """
        if name in self.compositions.names():
            source = self.compositions.source(name)
            text = f"{name!r} is a composition ({source}), which would be used in place of an adapter of that name"
            step = "Choose another name" + (f", or remove it: lora-rt rm {name}" if source == "tuned here" else "")
            raise StoreError(text, next_step=step)

    def composition_problems(self, composition: NamedComposition) -> list[str]:
        """Every term that leads nowhere, or to other files than its weight was found for; no requests are made."""
        base = BaseIdentity(composition.base, None, "")
        problems = [problem for term in composition.terms if (problem := self._term_problem(term, base))]
        if composition.mode:
            try:
                self.compositions.state(composition)
            except StoreError as error:
                problems += error.problems
        return problems

    def _term_problem(self, term: NamedTerm, base: BaseIdentity) -> str:
        if term.sha256 and is_name(term.reference):
            with suppress(LoraRtError):  # the name may mean another adapter by now, and that one still be there
                self.resolve(f"{term.reference}@{term.sha256}", base, offline=True)
                return ""
        try:
            found = self.resolve(term.reference, base, offline=True)
        except LoraRtError as error:
            return f"{term.reference}: {error.message}"
        if term.sha256 and found.sha256 != term.sha256:
            return f"{term.reference}: is {found.sha256[:12]} now ({found.source}), and was tuned as {term.sha256[:12]}"
        return ""

    def _named(self, reference: Reference, base: BaseIdentity | None, offline: bool, anyway: bool) -> Resolved:
        seen: list[Resolved] = []
        for tier, candidates in enumerate(self._tiers(reference.target, base, offline)):
            fitting = [item for item in candidates if _revision_fits(item, reference.revision)]
            if (item := _for_base(fitting, base)) is not None:
                if tier == 0:
                    say_hidden(item.name, item.why.partition(" is ")[2], self._hidden(item.name, item.sha256))
                return item
            seen += fitting
        if seen and anyway:
            return seen[0]
        if seen and base is not None:
            raise _wrong_base(reference, base, seen)
        raise self._unknown(reference)

    def _hidden(self, name: str, sha256: str) -> tuple[str, ...]:
        """What the name means in other folders, where that is something else."""
        records = [read(path) for path in self.store.records.paths_of(name)]
        own = [item.source if isinstance(item, Record) else "damaged" for item in records if not _is(item, sha256)]
        found = [f"your own ({source})" for source in own[:1]]
        return (*found, *(f"the one shipped with {item.package}" for item in shipped() if item.name == name))

    def _say_what_it_hides(self, composition: NamedComposition) -> None:
        name, locked = composition.name, self.pinned.compositions()
        if self.compositions.own(name) is None:
            say_hidden(name, f"the composition of {LOCK_FILE}", self._hidden(name, composition.sha256))
        elif all(item.sha256 != composition.sha256 for item in locked if item.name == name):
            say_hidden(name, "your own composition", (f"another one in {LOCK_FILE}",))

    def _tiers(self, name: str, base: BaseIdentity | None, offline: bool) -> Iterator[list[Resolved]]:
        yield self.pinned.find(name, offline=offline)
        yield [self.store.resolved(record) for record in self.store.records.named(name)]
        yield [found for item in shipped() if item.name == name for found in _read_shipped(item)]
        yield self._plugin_sources(name, base)

    def _all_shipped(self) -> list[Resolved]:
        found = []
        for item in shipped():
            # A broken one must not hide the others; `lora-rt doctor` says what is wrong with it.
            with suppress(RejectedAdapterError):
                found += _read_shipped(item)
        return found

    def _plugin_sources(self, name: str, base: BaseIdentity | None) -> list[Resolved]:
        found = []
        for label, find in self.sources:
            place = find(name, base)
            if place is not None:
                why = f"{name!r} was found by the plugin source {label}"
                found.append(read_path(Path(place), name=name, source=f"plugin {label}", why=why))
        return found

    def _from_hub(self, reference: Reference, offline: bool) -> Resolved:
        """From the store where it has the repository at this revision, otherwise from the Hub by way of the store."""
        item = obtain(self.store, reference, offline=offline)
        return replace(item, why=f"{reference.target} is a repository of the Hub")

    def _unknown(self, reference: Reference) -> UnknownAdapterError:
        compositions = self.compositions.names()
        if reference.target in compositions:
            text = f"{reference.target!r} is a composition, and here an adapter is needed"
            return UnknownAdapterError(text, next_step=f"lora-rt show {reference.target} lists its adapters")
        names = self.names()
        near = difflib.get_close_matches(reference.target, [*names, *compositions], n=3, cutoff=0.5)
        text = f"there is no adapter {reference.text!r}"
        if reference.target in names:
            have = [item.revision or item.sha256[:12] for item in self.installed() if item.name == reference.target]
            text = f"there is no revision {reference.revision!r} of {reference.target!r}; there is {', '.join(have)}"
        elif reference.text.replace(".", "", 1).isdecimal():
            text += "; a weight stands behind a name and a colon, as in emotion:0.7"
        elif reference.text == "base":
            text += "; weight 0 lets the base speak alone, as in emotion:0"
        elif near:
            text += f"; did you mean {' or '.join(repr(name) for name in near)}?"
        return UnknownAdapterError(text, next_step="See: lora-rt list")


def _is(record: Record | Damaged | None, sha256: str) -> bool:
    return isinstance(record, Record) and record.sha256 == sha256


def _read_shipped(item: Shipped) -> list[Resolved]:
    if item.folder is None:
        return []
    source = f"shipped with {item.package}"
    return [read_folder(item.folder, name=item.name, source=source, why=f"{item.name!r} is {source}")]


def _for_base(items: Sequence[Resolved], base: BaseIdentity | None) -> Resolved | None:
    """Of the adapters of one name that which was made for this base, or one of which nothing says that it was not."""
    if base is None:
        return items[0] if items else None
    stated = [(item, item.card.base if item.card else None) for item in items]
    certain = [item for item, card in stated if card is not None and card.matches(base)]
    possible = [item for item, card in stated if card is None or not card.contradicts(base)]
    return next(iter([*certain, *possible]), None)


def _revision_fits(item: Resolved, revision: str | None) -> bool:
    """A revision of a name is its commit or the beginning of one, its tag or branch, or the beginning of its digest."""
    if revision is None:
        return True
    if item.requested == revision:
        return True
    return len(revision) >= 7 and any(value and value.startswith(revision) for value in (item.revision, item.sha256))


def _wrong_base(reference: Reference, base: BaseIdentity, seen: Sequence[Resolved]) -> WrongBaseError:
    bases = sorted({item.card.base for item in seen if item.card}, key=lambda one: one.id)
    apart = [digests_apart(one, base) for one in bases]
    named = ", ".join(f"{one.id}{mine}" for one, (mine, _) in zip(bases, apart, strict=True))
    return WrongBaseError(
        f"{reference.text!r} is for {named}, in use is {base.id}{max(used for _, used in apart)}",
        next_step=f"{use_base(bases[0].id)}; {ANYWAY}",
    )
