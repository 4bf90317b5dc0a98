"""`lora-rt.toml`, a project's own names, and the named compositions (`lora-rt tune`) that belong to it:

compositions = ["my-mix"]

[adapters]
emotion = "someone/emotion-lora@v1"
mine = "./adapters/mine"
voice = ["someone/voice-smol", "someone/voice-qwen"]     # one per base
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from lora_rt.registry.errors import InvalidReferenceError, ProjectError
from lora_rt.registry.files import MEGABYTE, UnusableFileError, open_plain
from lora_rt.registry.reference import Reference, is_name

PROJECT_FILE = "lora-rt.toml"
LOCK_FILE = "lora-rt.lock"


@dataclass(frozen=True, slots=True)
class Project:
    """The names of one `lora-rt.toml`; each has one source or, for several bases, several."""

    folder: Path
    adapters: dict[str, tuple[Reference, ...]]
    compositions: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """Where the project is written down."""
        return self.folder / PROJECT_FILE


def read_toml(path: Path) -> dict[str, object] | None:
    """A TOML document, or None where there is no file.

    Raises:
        ProjectError: the file is not plain, too large, or no TOML.
    """
    try:
        with open_plain(path, MEGABYTE) as (file, _):
            return tomllib.loads(file.read(MEGABYTE + 1).decode("utf-8"))
    except FileNotFoundError:
        return None
    except (UnusableFileError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ProjectError(f"{path.name} can not be read: {str(error)[:200]}", next_step=f"Correct {path}") from error


def read_project(folder: Path) -> Project | None:
    """The project of a folder, or None where it has no `lora-rt.toml`.

    Raises:
        ProjectError: `problems` names every entry that is wrong.
    """
    document = read_toml(folder / PROJECT_FILE)
    if document is None:
        return None
    table = document.get("adapters", {})
    if not isinstance(table, dict):
        raise ProjectError(
            f"[adapters] of {PROJECT_FILE} is not a table", next_step="Write name = source lines under it"
        )
    adapters: dict[str, tuple[Reference, ...]] = {}
    problems: list[str] = []
    for name, value in table.items():
        try:
            adapters[name] = _sources(name, value)
        except InvalidReferenceError as error:
            problems.append(f"{name}: {error.message}")
    compositions = document.get("compositions", [])
    if not isinstance(compositions, list) or not all(isinstance(n, str) and is_name(n) for n in compositions):
        problems.append('compositions: it is no list of names; write compositions = ["my-mix"] above [adapters]')
    if problems:
        raise ProjectError(
            f"{PROJECT_FILE} has {len(problems)} wrong entries", next_step=f"Correct {PROJECT_FILE}", problems=problems
        )
    assert isinstance(compositions, list)
    return Project(folder, adapters, tuple(dict.fromkeys(compositions)))


def _sources(name: str, value: object) -> tuple[Reference, ...]:
    if not is_name(name):
        raise InvalidReferenceError(f"{name[:80]!r} is not a name that an adapter can have")
    texts = value if isinstance(value, list) else [value]
    references = tuple(Reference.parse(text) for text in texts if isinstance(text, str))
    if not references or len(references) != len(texts):
        raise InvalidReferenceError("its source is neither a text nor a list of texts")
    if any(reference.kind == "name" for reference in references):
        raise InvalidReferenceError("its source must be org/repo or a path, not another name")
    return references
