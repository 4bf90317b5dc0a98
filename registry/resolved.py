"""What a reference resolved to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_rt.registry import files
from lora_rt.registry.card import AdapterCard, read_card
from lora_rt.registry.errors import RejectedAdapterError
from lora_rt.registry.files import UnusableFileError


@dataclass(frozen=True, slots=True)
class Resolved:
    """An adapter on disk, and where it came from.

    `name` is the name it gets when it becomes resident; `source` is made for people ("store", "hub org/repo",
    "shipped with lora-rt 0.1.0", "./path"); `revision` is a full commit where there is one; `sha256` is one digest over
    the files' digests; `why` says in one line which rule led here. `requested` is the tag or branch that was asked for.
    """

    name: str
    folder: Path
    source: str
    revision: str | None
    sha256: str
    card: AdapterCard | None
    why: str
    files: Mapping[str, str] = field(default_factory=dict)
    requested: str | None = None


def read_folder(
    folder: Path, *, name: str, source: str, why: str, revision: str | None = None, requested: str | None = None
) -> Resolved:
    """Resolve to a folder as it lies there, hashed.

    Raises:
        RejectedAdapterError: its card is no card, or one of its files is not a plain file.
    """
    try:
        digests = files.digests(folder)
    except UnusableFileError as error:
        raise RejectedAdapterError(f"adapter {name!r} is refused: {error}", problems=[str(error)]) from error
    return Resolved(
        name=name,
        folder=folder,
        source=source,
        revision=revision,
        sha256=files.combined(digests),
        card=read_card(folder),
        why=why,
        files=digests,
        requested=requested,
    )


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
