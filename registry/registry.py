"""From a reference to verified files: which source has it, in which order they are asked, and why that one.

A name is looked up in the project's `lora-rt.toml`, the store, the adapters that installed packages ship, and the
sources that plugins add. A name may have one adapter per base: the base in use decides.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.errors import ChangedAdapterError, RejectedAdapterError, UnknownAdapterError, WrongBaseError
from lora_rt.registry.inspection.adapter import folder_problems
from lora_rt.registry.project import Project, read_project
from lora_rt.registry.reference import Reference, is_name
from lora_rt.registry.resolved import Resolved, changes, read_folder
from lora_rt.registry.shipped import shipped
from lora_rt.registry.store import Store

Source = tuple[str, Callable[[str, Any], Any]]


class Registry:
    """Everything that can be resolved from one working directory."""

    def __init__(self, home: Path | None = None, project: Path | None = None, sources: Sequence[Source] = ()) -> None:
        """
        Args:
            home: where the store lies; `$LORA_RT_HOME` or the user's data folder by default.
            project: the folder whose `lora-rt.toml` and `lora-rt.lock` count; the working directory by default.
            sources: what plugins add, `(label, find)` with `find(name, base)` giving a path or None.
        """
        self.store = Store(home)
        self.folder = (project or Path.cwd()).absolute()
        self.sources = tuple(sources)

    def resolve(
        self, reference: Reference | str, base: BaseIdentity | None = None, *, offline: bool = False
    ) -> Resolved:
        """The adapter that a reference means for this base.

        Raises:
            LoraRtError: unknown, for other bases only, not reachable, or not what was pinned.
        """
        if isinstance(reference, str):
            reference = Reference.parse(reference)
        if reference.kind == "path":
            return self._at_path(reference, "it is a path")
        if reference.kind == "hub":
            return self._from_hub(reference, base, offline)
        return self._named(reference, base, offline)

    def installed(self) -> list[Resolved]:
        """Everything that can be resolved by name without the network, by name and base."""
        found = [*self._project_installed(), *self.store.installed(), *self._shipped()]
        return sorted(found, key=lambda item: (item.name, item.card.base.id if item.card else ""))

    def names(self) -> list[str]:
        """Every name that resolves."""
        project = self._project()
        return sorted({*(project.adapters if project else ()), *(item.name for item in self.installed())})

    def _named(self, reference: Reference, base: BaseIdentity | None, offline: bool) -> Resolved:
        seen: list[Resolved] = []
        for candidates in self._tiers(reference, base, offline):
            fitting = [item for item in candidates if _revision_fits(item, reference.revision)]
            for item in fitting:
                if base is None or item.card is None or item.card.base.matches(base):
                    return self._whole(item)
            seen += fitting
        if seen and base is not None:
            raise _wrong_base(reference, base, seen)
        raise self._unknown(reference)

    def _tiers(self, reference: Reference, base: BaseIdentity | None, offline: bool) -> Iterator[list[Resolved]]:
        name = reference.target
        yield self._project_sources(name, base, offline)
        yield [self.store.resolved(record) for record in self.store.records.named(name)]
        yield self._shipped(name)
        yield self._plugin_sources(name, base)

    def _project(self) -> Project | None:
        return read_project(self.folder)

    def _project_sources(self, name: str, base: BaseIdentity | None, offline: bool) -> list[Resolved]:
        project = self._project()
        if project is None or name not in project.adapters:
            return []
        found = []
        for source in project.adapters[name]:
            why = f"{name!r} is {source.text} in {project.file.name}"
            if source.kind == "path":
                found.append(self._at_path(source, why, name=name))
            else:
                found.append(self._from_hub(source, base, offline, name=name, why=why))
        return found

    def _project_installed(self) -> list[Resolved]:
        project = self._project()
        if project is None:
            return []
        found = []
        for name, sources in project.adapters.items():
            for source in sources:
                if source.kind == "path" and self._path(source).is_dir():
                    found.append(self._at_path(source, f"{name!r} is {source.text} in {project.file.name}", name=name))
        return found

    def _shipped(self, name: str | None = None) -> list[Resolved]:
        found = []
        for item in shipped():
            if item.folder is not None and name in (None, item.name):
                source = f"shipped with {item.package}"
                found.append(read_folder(item.folder, name=item.name, source=source, why=f"{item.name!r} is {source}"))
        return found

    def _plugin_sources(self, name: str, base: BaseIdentity | None) -> list[Resolved]:
        found = []
        for label, find in self.sources:
            place = find(name, base)
            if place is not None:
                why = f"{name!r} was found by the plugin source {label}"
                found.append(_read_path(Path(place), name=name, source=f"plugin {label}", why=why))
        return found

    def _path(self, reference: Reference) -> Path:
        return self.folder / Path(reference.target).expanduser()

    def _at_path(self, reference: Reference, why: str, name: str | None = None) -> Resolved:
        folder = self._path(reference)
        own = name or folder.resolve().name
        if not is_name(own):
            own = (
                "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in own).strip("-")
                or "adapter"
            )
        return _read_path(folder, name=own, source=reference.target, why=why)

    def _from_hub(
        self,
        reference: Reference,
        base: BaseIdentity | None,
        offline: bool,
        name: str | None = None,
        why: str | None = None,
    ) -> Resolved:
        """From the store where it has the repository at this revision, otherwise from the Hub by way of the store."""
        from lora_rt.registry.hub.pull import find_installed, pull

        found = find_installed(self.store, reference)
        if found:
            item = self._whole(self.store.resolved(found[0]))
        else:
            item = pull(self.store, reference, name=name, offline=offline)
        return replace(item, name=name or item.name, why=why or f"{reference.target} is a repository of the Hub")

    @staticmethod
    def _whole(item: Resolved) -> Resolved:
        """The item, after its files were compared with their digests."""
        problems = changes(item.folder, item.files)
        if problems:
            raise ChangedAdapterError(
                f"adapter {item.name!r} in the store is damaged",
                next_step=f"lora-rt verify {item.name}",
                problems=problems,
            )
        return item

    def _unknown(self, reference: Reference) -> UnknownAdapterError:
        names = self.names()
        near = difflib.get_close_matches(reference.target, names, n=3, cutoff=0.5)
        text = f"there is no adapter {reference.text!r}"
        if reference.target in names:
            have = [item.revision or item.sha256[:12] for item in self.installed() if item.name == reference.target]
            text = f"there is no revision {reference.revision!r} of {reference.target!r}; there is {', '.join(have)}"
        elif near:
            text += f", near are {', '.join(near)}"
        return UnknownAdapterError(text, next_step="lora-rt list")


def _read_path(folder: Path, *, name: str, source: str, why: str) -> Resolved:
    problems = folder_problems(folder)
    if problems and not folder.exists():
        raise UnknownAdapterError(problems[0], next_step="Check the path")
    if problems:
        raise RejectedAdapterError(f"adapter {name!r} is refused: {problems[0]}", problems=problems)
    return read_folder(folder, name=name, source=source, why=why)


def _revision_fits(item: Resolved, revision: str | None) -> bool:
    """A revision of a name is its commit or the beginning of one, its tag or branch, or the beginning of its digest."""
    if revision is None:
        return True
    if item.requested == revision:
        return True
    return len(revision) >= 7 and any(value and value.startswith(revision) for value in (item.revision, item.sha256))


def _wrong_base(reference: Reference, base: BaseIdentity, seen: Sequence[Resolved]) -> WrongBaseError:
    bases = sorted({item.card.base.id for item in seen if item.card})
    return WrongBaseError(
        f"{reference.text!r} is for {', '.join(bases)}, in use is {base.id}", next_step=f"Use --base {bases[0]}"
    )
