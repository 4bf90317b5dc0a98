"""`lora-rt.toml`, a project's own names, and the named compositions (`lora-rt tune`) that belong to it:

compositions = ["my-mix"]

[adapters]
emotion = "someone/emotion-lora@v1"
mine = "./adapters/mine"
voice = ["someone/voice-smol", "someone/voice-qwen"]     # one per base
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from lora_rt.registry.errors import ProjectError
from lora_rt.registry.files import MEGABYTE, UnusableFileError, open_plain
from lora_rt.registry.models import Name, SourceText, problems_of, validated
from lora_rt.registry.reference import Reference

PROJECT_FILE = "lora-rt.toml"
LOCK_FILE = "lora-rt.lock"
_ABOVE = 'write compositions = ["my-mix"] above [adapters]'
_CONFLICT = re.compile(rb"^(<{7}|\|{7}|={7}|>{7})(?=\s|$)", re.MULTILINE)
_KEYS = ("adapters", "compositions")


@dataclass(frozen=True, slots=True)
class Project:
    """The names of one `lora-rt.toml`; each has one source or, for several bases, several."""

    adapters: dict[str, tuple[Reference, ...]]
    compositions: tuple[str, ...] = ()


def _texts(value: Any) -> Any:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("its source is neither a text nor a list of texts")
    return texts


def _names(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"it is not a list of names; {_ABOVE}")
    return value


@dataclass(frozen=True)
class _Document:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    adapters: dict[Name, Annotated[list[SourceText], BeforeValidator(_texts), Field(min_length=1)]] = field(
        default_factory=dict
    )
    compositions: Annotated[list[Name], BeforeValidator(_names)] = field(default_factory=list)


def read_toml(path: Path, next_step: str = "") -> dict[str, object] | None:
    """A TOML document, or None where there is no file; `next_step` is for one that nobody wrote by hand.

    Raises:
        ProjectError: the file is not plain, too large, or not TOML.
    """
    content = b""
    try:
        with open_plain(path, MEGABYTE) as (file, _):
            content = file.read(MEGABYTE + 1)
        return tomllib.loads(content.decode("utf-8-sig"))  # Windows' editor puts a mark before it
    except FileNotFoundError:
        return None
    except (UnusableFileError, ValueError, RecursionError) as error:  # also a number of thousands of digits
        if mark := _CONFLICT.search(content):
            line = content[: mark.start()].count(b"\n") + 1
            text = f"{path.name} holds a conflict that git could not merge ({mark[0].decode()} in line {line})"
            raise ProjectError(text, next_step=f"Resolve the conflict in {path}, or take one side whole") from error
        text = f"{path.name} can not be read: {str(error)[:200]}"
        raise ProjectError(text, next_step=next_step or f"Correct {path}") from error


def _told(problem: str) -> str:
    """A finding in the terms of the file: an adapter by its name, and what a word that is none may mean."""
    place = problem.partition(": ")[0]
    if place.startswith("adapters.compositions"):
        return f"compositions: {_ABOVE}"
    near = get_close_matches(place, _KEYS, 1) if "." not in place and place not in _KEYS else []
    return problem.removeprefix("adapters.") + (f"; the nearest is {near[0]!r}" if near else "")


def read_project(folder: Path) -> Project | None:
    """The project of a folder, or None where it has no `lora-rt.toml`.

    Raises:
        ProjectError: `problems` names every entry that is wrong.
    """
    document = read_toml(folder / PROJECT_FILE)
    if document is None:
        return None
    try:
        found = validated(_Document, document)
    except ValidationError as error:
        problems = [_told(problem) for problem in problems_of(error)]
        text = f"{PROJECT_FILE} can't be used as it is"
        raise ProjectError(text, next_step=f"Correct {folder / PROJECT_FILE}", problems=problems) from error
    adapters = {name: tuple(map(Reference.parse, texts)) for name, texts in found.adapters.items()}
    return Project(adapters, tuple(dict.fromkeys(found.compositions)))
