"""What a reference resolved to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_rt.registry import files
from lora_rt.registry.card import AdapterCard, read_card
from lora_rt.registry.errors import RejectedAdapterError
from lora_rt.registry.files import UnusableFileError


@dataclass(frozen=True)
class Digests:
    """The sha256 of each file of a folder: as they were recorded, or hashed when somebody first asks."""

    folder: Path
    name: str
    recorded: Mapping[str, str] | None = None
    sha256_recorded: str | None = None

    @cached_property
    def files(self) -> Mapping[str, str]:
        """File name -> sha256.

        Raises:
            RejectedAdapterError: one of the files is not a plain file.
        """
        if self.recorded is not None:
            return self.recorded
        try:
            return files.digests(self.folder)
        except UnusableFileError as error:
            raise RejectedAdapterError(f"adapter {self.name!r} is refused: {error}", problems=[str(error)]) from error

    @cached_property
    def sha256(self) -> str:
        """One digest over the files' digests."""
        return self.sha256_recorded or files.combined(self.files)


@dataclass(frozen=True, slots=True)
class Resolved:
    """An adapter on disk, and where it came from.

    `name` is the name it gets when it becomes resident; `source` is made for people ("store", "hub org/repo",
    "shipped with lora-rt 0.1.0", "./path"); `revision` is a full commit where there is one; `why` says in one line
    which rule led here. `requested` is the tag or branch that was asked for.
    """

    name: str
    folder: Path
    source: str
    revision: str | None
    card: AdapterCard | None
    why: str
    digests: Digests
    requested: str | None = None

    @property
    def sha256(self) -> str:
        """One digest over the files' digests; the files are hashed for it where nobody has recorded them."""
        return self.digests.sha256

    @property
    def files(self) -> Mapping[str, str]:
        """File name -> sha256, hashed where nobody has recorded them."""
        return self.digests.files

    def document(self) -> dict[str, Any]:
        """The JSON form, as `lora-rt list --json` has it."""
        return {
            "name": self.name,
            "register": self.card.register if self.card else None,
            "mode": self.card.mode if self.card else "output-only",
            "base": self.card.base.id if self.card else None,
            "source": self.source,
            "revision": self.revision,
            "sha256": self.sha256,
        }

    def read(self, digests: Mapping[str, str]) -> Resolved:
        """The same, with the digests of the files as somebody has read them."""
        return replace(self, digests=Digests(self.folder, self.name, digests))


def read_folder(folder: Path, *, name: str, source: str, why: str) -> Resolved:
    """Resolve to a folder as it lies there; it is not hashed before somebody asks for a digest.

    Raises:
        RejectedAdapterError: its card is no card.
    """
    return Resolved(name, folder, source, None, read_card(folder), why, Digests(folder, name))


def changes(folder: Path, expected: Mapping[str, str]) -> list[str]:
    """How the files of a folder differ from what they were, by name; empty where they do not."""
    if not folder.is_dir():
        return ["its folder is missing"]
    try:
        found = files.digests(folder)
    except UnusableFileError as error:
        return [str(error)]
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is new" for name in sorted(found.keys() - expected.keys())]
    problems += [f"{name} has other bytes" for name in sorted(found) if expected.get(name) not in (None, found[name])]
    return problems
