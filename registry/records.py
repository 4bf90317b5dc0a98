"""The store's index: one small JSON file per record, `names/<name>/<base>.json`, which points at an object.

A record appears and changes by one rename, so it is always whole. The file's name is made of the base it is for, so a
name holds at most one adapter per base. Names are given by people (`pull`, `train`, `tune`) and by nobody else: what
is fetched because a project, a lock or a composition asks for `org/repo` is recorded under `names/@org--repo/` (for
`org/repo//folder` under `names/@org--repo@@folder/`), and its name is the repository's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from lora_rt.registry import durable, strict_json
from lora_rt.registry.card import AdapterCard
from lora_rt.registry.errors import StoreError
from lora_rt.registry.files import MEGABYTE, UnusableFileError, combined, open_plain
from lora_rt.registry.models import Pins, Sha256, Text, problems_of, validated
from lora_rt.registry.reference import hub_place, is_hub_target, is_name

ANY_BASE = "any"


@dataclass(frozen=True, slots=True)
class Record:
    """An installed adapter: its name and base, where it came from, and the digests of its files."""

    name: Text
    base: Text
    source: Text
    revision: Text | None
    requested: Text | None
    sha256: Sha256
    files: Pins

    @property
    def is_named(self) -> bool:
        """Whether a person gave it a name; others are reached by their repository alone."""
        return "/" not in self.name

    @property
    def origin(self) -> str:
        """Its source as a sentence has it, behind a noun: "from hub org/repo", "trained here"."""
        return f"from {self.source}" if self.source.startswith("hub ") else self.source


@dataclass(frozen=True, slots=True)
class Damaged:
    """A record that can't be read, and why."""

    name: str
    path: Path
    reason: str

    @property
    def message(self) -> str:
        """What is wrong, in one line."""
        return f"the record of {self.name!r} in the store is damaged: {self.path} {self.reason}"

    @property
    def todo(self) -> str:
        """How to get rid of it."""
        return f"lora-rt rm {self.name}, then pull or train it again"


def record_key(card: AdapterCard | None, record: Record) -> str:
    """The file name, without its ending, of a record: made of the base, of one without a name of what was asked for."""
    if not record.is_named:
        return hashlib.sha256((record.requested or "").encode()).hexdigest()[:16]
    if card is None:
        return ANY_BASE
    return hashlib.sha256(card.base.id.encode()).hexdigest()[:16]


class Records:
    """The records under one folder. Reading needs no lock; writing happens under the store's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Record]:
        """Every readable record, by name and base."""
        return [found for path in self.paths() if isinstance(found := read(path), Record)]

    def damaged(self, name: str | None = None) -> list[Damaged]:
        """Every record that can't be read, of one name or of all."""
        paths = self.paths() if name is None else self.paths_of(name)
        return [found for path in paths if isinstance(found := read(path), Damaged)]

    def named(self, name: str) -> list[Record]:
        """The records of one name, one per base.

        Raises:
            StoreError: one of them is damaged; the name then means nothing, rather than something else.
        """
        for damaged in self.damaged(name):
            raise StoreError(damaged.message, next_step=damaged.todo)
        return [found for path in self.paths_of(name) if isinstance(found := read(path), Record)]

    def folders(self) -> list[Path]:
        """One folder per name, also of names that a killed process did not finish."""
        return [path for path in _entries(self.folder) if path.is_dir()]

    def paths(self) -> list[Path]:
        """The files of all records, readable or not."""
        return [path for folder in _entries(self.folder) for path in _records_in(folder)]

    def paths_of(self, name: str) -> list[Path]:
        """The files of the records of one name, readable or not; none where it is not a name."""
        if not is_name(name) and not is_hub_target(name):
            return []
        folder = self._folder(name)
        # By exact name: a file system may ignore case, we do not.
        return _records_in(folder) if folder in _entries(self.folder) else []

    def write(self, record: Record, key: str) -> None:
        """Write a record; the old one of this name and base is replaced in one step."""
        folder = self._folder(record.name)
        folder.mkdir(parents=True, exist_ok=True)
        durable.sync_folder(self.folder)
        durable.write_text(folder / f"{key}.json", json.dumps(asdict(record), indent=2) + "\n")

    def remove(self, path: Path) -> None:
        """Remove one record, and its name with its last."""
        durable.remove(path)
        if path.parent.is_dir() and not _records_in(path.parent):
            shutil.rmtree(path.parent, ignore_errors=True)
        durable.sync_folder(self.folder)

    def _folder(self, name: str) -> Path:
        repo, inner = hub_place(name)
        place = repo.replace("/", "--") + (f"@@{inner.replace('/', '@')}" if inner else "")
        return self.folder / (f"@{place}" if "/" in name else name)


def read(path: Path) -> Record | Damaged | None:
    """One record, or None where the file is gone by now."""
    folder = path.parent.name if path.suffix == ".json" else path.name
    repo, _, inner = folder.removeprefix("@").partition("@@")
    place = repo.replace("--", "/", 1) + (f"//{inner.replace('@', '/')}" if inner else "")
    name = place if folder.startswith("@") else folder
    try:
        with open_plain(path, MEGABYTE) as (file, _):
            record = validated(Record, strict_json.loads(file.read()))
    except FileNotFoundError:
        return None
    except (UnusableFileError, strict_json.InvalidJsonError) as error:
        return Damaged(name, path, str(error))
    except ValidationError as error:
        return Damaged(name, path, f"is not a record: {problems_of(error)[0]}")
    if record.name != name:
        return Damaged(name, path, f"is the record of {record.name!r}")
    if combined(record.files) != record.sha256:
        return Damaged(name, path, "states a sha256 that does not follow from those of its files")
    return record


def _records_in(folder: Path) -> list[Path]:
    """The records in the folder of a name. What is no folder stands for itself: it is a damaged one."""
    if not folder.is_dir():
        return [folder] if not folder.name.startswith(".") else []
    return [path for path in _entries(folder) if path.suffix == ".json" and not path.name.startswith(".")]


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted. A folder that can't be listed is not an empty one."""
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except OSError as error:
        if isinstance(error, FileNotFoundError) or not folder.parent.is_dir():
            return []
        text = f"{folder} can not be read: {error.strerror}"
        raise StoreError(text, next_step="Check its permissions, or set LORA_RT_HOME to a folder of yours") from error
