"""What the project says about names: `lora-rt.toml` where there is one, and the pins of `lora-rt.lock`.

A name that is locked resolves to exactly what is locked, whatever the store has under that name. It does so in the
project's folder alone: nothing here writes a name into the store.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.errors import ChangedAdapterError, RejectedAdapterError, UnknownAdapterError
from lora_rt.registry.hub.pull import find_installed, install_pinned, obtain
from lora_rt.registry.lock import Locked, check_meanings, read_lock, read_locked_compositions
from lora_rt.registry.paths import at_path, folder_of
from lora_rt.registry.project import LOCK_FILE, PROJECT_FILE, read_project
from lora_rt.registry.reference import Reference
from lora_rt.registry.resolved import Resolved, changes
from lora_rt.registry.store import Store


class PinnedNames:
    """The names of one project folder, read anew at every question."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store

    def sources(self) -> dict[str, list[tuple[Reference, Locked | None, str]]]:
        """Every name with its sources: the reference, its pin, and the file that says so."""
        project, locked = read_project(self.folder), read_lock(self.folder) or []
        found: dict[str, list[tuple[Reference, Locked | None, str]]] = {}
        if project is None:
            for entry in locked:
                found.setdefault(entry.name, []).append((entry.reference, entry, LOCK_FILE))
            return found
        pins = {(entry.name, entry.source): entry for entry in locked}
        for name, references in project.adapters.items():
            found[name] = [(reference, pins.get((name, reference.text)), PROJECT_FILE) for reference in references]
        return found

    def compositions(self) -> list[NamedComposition]:
        """The locked compositions that count here: those that the project lists, without a project all."""
        locked, project = read_locked_compositions(self.folder), read_project(self.folder)
        return [item for item in locked if project is None or item.name in project.compositions]

    def find(self, name: str, *, offline: bool) -> list[Resolved]:
        """The adapters of a name, one per source, installed if need be."""
        sources = self.sources().get(name, [])
        found = [self._obtain(name, *source, offline=offline) for source in sources]
        if len(found) > 1:  # a single one need not be hashed for it
            check_meanings(PROJECT_FILE, [_meaning(item, *source) for item, source in zip(found, sources, strict=True)])
        return found

    def installed(self) -> list[Resolved]:
        """Those that are on this machine already."""
        found = []
        for name, sources in self.sources().items():
            for reference, pin, file in sources:
                # A broken one must not hide the others; using it says what is wrong with it.
                with suppress(RejectedAdapterError, UnknownAdapterError):
                    found += self._present(name, reference, pin, file)
        return found

    def missing(self) -> list[tuple[str, str, str]]:
        """(name, path, the file that says so) of what a project has in a folder that is not there."""
        return [
            (name, reference.target, file)
            for name, sources in self.sources().items()
            for reference, _, file in sources
            if reference.kind == "path" and not folder_of(self.folder, reference).is_dir()
        ]

    def _present(self, name: str, reference: Reference, pin: Locked | None, file: str) -> list[Resolved]:
        why = _why(name, reference, pin, file)
        if reference.kind == "path":
            there = folder_of(self.folder, reference).is_dir()
            return [at_path(self.folder, reference, why=why, name=name)] if there else []
        records = find_installed(self.store, reference)
        if pin is not None:
            records = [record for record in self.store.records.all() if record.sha256 == pin.sha256]
        return [replace(self.store.resolved(record), name=name, why=why) for record in records[:1]]

    def _obtain(self, name: str, reference: Reference, pin: Locked | None, file: str, *, offline: bool) -> Resolved:
        why = _why(name, reference, pin, file)
        if reference.kind == "path":
            item = at_path(self.folder, reference, why=why, name=name)
            return item if pin is None else as_pinned(item, pin)
        if pin is None:
            item = obtain(self.store, reference, name=name, offline=offline)
        else:
            item = install_pinned(self.store, pin, offline=offline)
        return replace(item, name=name, why=why)


def _meaning(item: Resolved, reference: Reference, *_: object) -> tuple[str, str, str, str]:
    base = item.card.base.id if item.card else ""
    return item.name, base, item.sha256, f"{reference.text} ({(item.revision or item.sha256)[:12]})"


def _why(name: str, reference: Reference, pin: Locked | None, file: str) -> str:
    at = f", locked to {(pin.revision or pin.sha256)[:12]}" if pin else ""
    return f"{name!r} is {reference.text} in {file}{at}"


def as_pinned(item: Resolved, pin: Locked) -> Resolved:
    """An adapter that lies in a folder, if its files are those that the lock has.

    Raises:
        ChangedAdapterError: they are others.
    """
    problems = changes(item.folder, pin.files)
    if problems:
        raise ChangedAdapterError(
            f"{item.name} at {item.source} is not what {LOCK_FILE} says",
            next_step="If the change is meant: lora-rt lock",
            problems=problems,
        )
    return item
