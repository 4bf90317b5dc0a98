"""The store's index: one small JSON file per name and base, `names/<name>/<base>.json`, which points at an object.

A record appears and changes by one rename, so it is always whole. The file's name is made of the base it is for, so a
name holds at most one adapter per base.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_rt.registry import durable, strict_json
from lora_rt.registry.card import AdapterCard
from lora_rt.registry.files import MEGABYTE, UnusableFileError, open_plain

ANY_BASE = "any"


@dataclass(frozen=True, slots=True)
class Record:
    """An installed adapter: its name and base, where it came from, and the digests of its files."""

    name: str
    base: str
    source: str
    revision: str | None
    requested: str | None
    sha256: str
    files: dict[str, str]


def base_key(card: AdapterCard | None) -> str:
    """The file name, without its ending, of the record of an adapter with this card."""
    if card is None:
        return ANY_BASE
    return hashlib.sha256(card.base.id.encode()).hexdigest()[:16]


class Records:
    """The records under one folder. Reading needs no lock; writing happens under the store's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[Record]:
        """Every readable record, by name and base."""
        return [record for path in self.paths() if (record := read(path)) is not None]

    def named(self, name: str) -> list[Record]:
        """The records of one name, one per base."""
        paths = sorted((self.folder / name).glob("*.json"))
        return [record for path in paths if (record := read(path)) is not None]

    def folders(self) -> list[Path]:
        """One folder per name, also of names that a killed process did not finish."""
        return sorted(path for path in self.folder.glob("*") if path.is_dir())

    def paths(self) -> list[Path]:
        """The files of all records, readable or not."""
        return sorted(self.folder.glob("*/*.json"))

    def write(self, record: Record, key: str) -> None:
        """Write a record; the old one of this name and base is replaced in one step."""
        folder = self.folder / record.name
        folder.mkdir(parents=True, exist_ok=True)
        durable.sync_folder(self.folder)
        durable.write_text(folder / f"{key}.json", json.dumps(asdict(record), indent=2) + "\n")

    def remove(self, name: str, key: str) -> None:
        """Remove one record, and the name with its last."""
        (self.folder / name / f"{key}.json").unlink(missing_ok=True)
        if not any((self.folder / name).glob("*.json")):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        durable.sync_folder(self.folder)


def read(path: Path) -> Record | None:
    """One record, or None where the file is gone or is no record (`lora-rt doctor` names those)."""
    try:
        with open_plain(path, MEGABYTE) as (file, _):
            document = strict_json.loads(file.read())
        return Record(**document) if isinstance(document, dict) else None
    except (FileNotFoundError, UnusableFileError, strict_json.InvalidJsonError, TypeError):
        return None
