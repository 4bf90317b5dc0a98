"""The store: installed adapters, content-addressed, whole or not at all.

    store/objects/<sha256>/      the files of one adapter, never changed after they appear
    store/names/<name>/<base>.json    which object a name means, for one base
    store/names/@<org>--<repo>/  objects of a repository that nobody has given a name
    store/staging/<id>/          files on their way in, with <id>.lock held by the process that writes them
    store/store.lock             held for the moments in which names and objects change

Publishing is: fsync the staged files, rename the folder into objects/, write the record by rename. A kill before the
last rename leaves the old state and an orphan that the next change of the store collects; after it, the new state.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from lora_rt.registry import durable, files
from lora_rt.registry import home as home_folders
from lora_rt.registry.card import read_card
from lora_rt.registry.errors import RejectedAdapterError, StoreError
from lora_rt.registry.files import UnusableFileError
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.records import Record, Records, read, record_key
from lora_rt.registry.reference import check_name, is_hub_target
from lora_rt.registry.resolved import Digests, Resolved

LOCK_SECONDS = 60


class Store:
    """The installed adapters of one home. Safe for any number of processes at once."""

    def __init__(self, home: Path | None = None) -> None:
        self.root = home_folders.store(home)
        self.objects = self.root / "objects"
        self.records = Records(self.root / "names")
        self._staging = self.root / "staging"

    def installed(self) -> list[Resolved]:
        """Every installed adapter, by name and base."""
        return [self.resolved(record) for record in self.records.all()]

    def resolved(self, record: Record) -> Resolved:
        """A record as what a reference resolves to. Its files are not hashed again: the digests are the record's."""
        folder = self.objects / record.sha256
        try:
            card = read_card(folder) if folder.is_dir() else None
        except RejectedAdapterError:
            card = None  # damaged since it was installed; whoever uses the files compares their digests
        why = f"{record.name!r} is {'installed' if record.is_named else 'kept'} in the store, {record.origin}"
        return Resolved(
            name=record.name,
            folder=folder,
            source=record.source,
            revision=record.revision,
            card=card,
            why=why,
            digests=Digests(folder, record.name, record.files, record.sha256),
            requested=record.requested,
        )

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder on the store's file system. It is gone afterwards, or collected if this process dies."""
        self._staging.mkdir(parents=True, exist_ok=True)
        folder = self._staging / uuid.uuid4().hex
        owner = FileLock(folder.with_name(folder.name + ".lock"))
        with self._lock():
            # Under the store's lock, or a collector could take the owner's file in the moment before it is locked.
            owner.acquire()
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(owner.lock_file).unlink(missing_ok=True)
            owner.release()

    def publish(
        self, staged: Path, name: str, *, source: str, revision: str | None, requested: str | None = None
    ) -> Resolved:
        """Install what lies in a staging folder under a name; an adapter of that name for the same base is replaced.

        A name that is `org/repo` is none that anybody gave: see `lora_rt.registry.records`.

        Raises:
            StoreError: the name is none, differs only by case from another, or the store is busy.
            RejectedAdapterError: what lies there is no adapter that may be loaded.
        """
        self._check_name(name, source)
        inspected = inspect_adapter(staged, name=name)
        base = inspected.card.base.id if inspected.card else ""
        record = Record(name, base, source, revision, requested, inspected.sha256, dict(inspected.files))
        key = record_key(inspected.card, record)
        for file in files.present(staged):
            durable.sync_file(staged / file)
        durable.sync_folder(staged)
        with self._lock():
            self._check_case(name)
            self._install(staged, record)
            self.records.write(record, key)
            self._settle(record)
            self._collect()
        return self.resolved(record)

    def check_free(self, name: str, source: str) -> None:
        """Raise what `publish` would raise of this name and of the disk, before an adapter is made.

        Raises:
            StoreError: the name is none, or differs only by case from another.
            StorageError: the store can't be written.
        """
        self._check_name(name, source)
        self._check_case(name)
        durable.check_writable(self._staging)

    def link(self, record: Record) -> Resolved:
        """Write a record for an object that is in the store already: a name or further facts."""
        self._check_name(record.name, record.source)
        with self._lock():
            self._check_case(record.name)
            self.records.write(record, record_key(read_card(self.objects / record.sha256), record))
            self._settle(record)
            self._collect()
        return self.resolved(record)

    def remove(self, name: str) -> list[Resolved]:
        """Remove a name with its adapters of all bases, damaged records too; the removed adapters.

        Raises:
            StoreError: there is no such name.
        """
        with self._lock():
            paths = self.records.paths_of(name)
            if not paths:
                raise StoreError(f"the store has no adapter {name!r}", next_step="See: lora-rt list")
            removed = [self.resolved(record) for path in paths if isinstance(record := read(path), Record)]
            for path in paths:
                self.records.remove(path)
            self._collect()
        return removed

    def collect(self) -> list[Path]:
        """Remove what killed processes left behind; the paths that were removed."""
        if not self.root.is_dir():
            return []
        with self._lock():
            return self._collect()

    def orphans(self) -> list[Path]:
        """Objects without a record, staging folders without a living owner, unfinished records, empty names."""
        names = self.records.folders()
        partial = [path for folder in names for path in durable.abandoned(folder)]
        empty = [folder for folder in names if all(path in partial for path in folder.iterdir())]
        return [*self._unused_objects(), *self._abandoned(), *partial, *empty]

    def _install(self, staged: Path, record: Record) -> None:
        """Move the staged files to their object. A whole object of that content stays, a damaged one is replaced."""
        self.objects.mkdir(parents=True, exist_ok=True)
        target = self.objects / record.sha256
        for stranger in set(os.listdir(staged)) - set(files.present(staged)):
            durable.remove(staged / stranger)
        if target.exists():
            if is_whole(target, record.files):
                return
            self._rename(target, self._staging / f"{record.sha256}.{uuid.uuid4().hex}")
        self._rename(staged, target)
        durable.sync_folder(self.objects)

    def _rename(self, source: Path, target: Path) -> None:
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            text = (
                f"{self.objects} lies on another file system than {self._staging}, so nothing can be moved there whole"
            )
            step = "Let the whole store lie on one: to keep it on another disk, set LORA_RT_HOME to a folder there"
            raise StoreError(text, next_step=step) from error

    def _settle(self, record: Record) -> None:
        """Let the id of its repository mean what was taken last, which has just got a name.

        The record without a name has done its service then, unless other names keep older commits. So has one of the
        same name and commit with fewer files: the Hub's cache had no more of them, not even what says for which base.
        """
        for path in self.records.paths_of(record.name):
            other = read(path)
            if isinstance(other, Record) and _is_part_of(other, record):
                self.records.remove(path)
        if not record.is_named or not record.source.startswith("hub "):
            return
        repo = record.source.removeprefix("hub ")
        same = [other for other in self.records.all() if _asked(other) == _asked(record)]
        if any(other.is_named and other.revision != record.revision for other in same):
            unnamed = replace(record, name=repo)
            self.records.write(unnamed, record_key(None, unnamed))
            return
        for path in self.records.paths_of(repo):
            other = read(path)
            if isinstance(other, Record) and not other.is_named and _asked(other) == _asked(record):
                self.records.remove(path)

    def _collect(self) -> list[Path]:
        gone = self.orphans()
        for path in gone:
            durable.remove(path)
        return gone

    def _unused_objects(self) -> list[Path]:
        if not self.objects.is_dir():
            return []
        records = self.records.all()
        if len(records) != len(self.records.paths()):
            return []  # a record that can not be read may point at any of them
        used = {record.sha256 for record in records}
        return [path for path in sorted(self.objects.iterdir()) if path.name not in used]

    def _abandoned(self) -> list[Path]:
        """Staging folders and lock files whose owner is dead: nobody holds the lock of that name."""
        if not self._staging.is_dir():
            return []
        found = []
        for path in sorted(self._staging.iterdir()):
            owner = path if path.suffix == ".lock" else path.with_name(path.name + ".lock")
            if not owner.exists() or not _is_held(owner):
                found.append(path)
        return found

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.root / "store.lock", timeout=LOCK_SECONDS):
                yield
        except Timeout as error:
            raise StoreError(
                f"another process has held the store for {LOCK_SECONDS} s", next_step="Try again when it is done"
            ) from error

    def _check_name(self, name: str, source: str) -> None:
        if is_hub_target(name) and source == f"hub {name}":
            return
        check_name(name)

    def _check_case(self, name: str) -> None:
        for other in {record.name for record in self.records.all() if record.is_named}:
            if other.casefold() == name.casefold() and other != name:
                raise StoreError(
                    f"the name {name!r} differs only by case from the installed {other!r}", next_step=f"Use {other!r}"
                )


def _asked(record: Record) -> tuple[str, str | None]:
    return record.source, record.requested


def is_whole(folder: Path, expected: dict[str, str]) -> bool:
    """Whether the folder holds exactly these files with these digests."""
    try:
        return files.digests(folder) == expected
    except (UnusableFileError, OSError):
        return False


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _is_part_of(record: Record, whole: Record) -> bool:
    """Whether a record is of the same commit, with fewer files."""
    same = (record.source, record.revision) == (whole.source, whole.revision)
    return same and record.files.keys() < whole.files.keys()
