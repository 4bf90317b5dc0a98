"""What the text of `--base` means: the default, a local folder, a GGUF file or a repository on the Hub."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_rt.errors import LoraRtError, UsageError

DEFAULT = "default"
RANDOM = ("tiny", "7b", "13b")
"""The sizes of bases with random weights, which a GPU is measured with: see `random_base`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class BaseError(LoraRtError):
    """The base can't be found, fetched, converted or loaded."""


@dataclass(frozen=True, slots=True)
class BaseSource:
    """Where a base comes from. `path` is set for folders and GGUF files, `revision` for the Hub alone."""

    kind: Literal["default", "folder", "gguf", "hub"]
    text: str
    path: Path | None = None
    revision: str | None = None


def text_of(base: str | os.PathLike[str]) -> str:
    """A base as text; a path is a folder or a file, never a hub id.

    Raises:
        UsageError: it is neither of the two.
    """
    if isinstance(base, str):
        return base
    try:
        return os.path.abspath(os.fsdecode(base))
    except TypeError as error:
        text = f"a base is a {type(base).__name__}"
        raise UsageError(text, next_step='Give "default", a folder, a .gguf file or a hub id') from error


def parse_base(base: str | os.PathLike[str]) -> BaseSource:
    """Read "default" | directory | file.gguf | hub id[@revision].

    Raises:
        UsageError: it is none of these.
        BaseError: there is no such folder or file, or it holds no model.
    """
    text = text_of(base)
    if text == DEFAULT:
        return BaseSource("default", text)
    if not text.strip():
        raise UsageError("--base is empty", next_step='Give "default", a folder, a .gguf file or a hub id')
    # Of os.path, since these take names that are too long, or of users who are not there, for names of nothing.
    path = Path(os.path.expanduser(text))
    looks_local = text.startswith(("./", "../", "/", "~")) or text.endswith(".gguf")
    if os.path.isdir(path):
        return _folder(text, path.resolve())
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise BaseError(
                f"{text} is a file but not a GGUF file",
                next_step="Give the folder that holds the model, or a .gguf file",
            )
        return BaseSource("gguf", text, path.resolve())
    if looks_local:
        raise BaseError(
            f"there is no base model at {text[:200]}", next_step="Give a folder with a config.json, or a .gguf file"
        )
    name, _, revision = text.partition("@")
    if not _HUB_ID.fullmatch(name) or text.endswith("@"):
        raise UsageError(
            f"{text[:200]!r} is not a base model",
            next_step='Use "default", a folder, a .gguf file or a hub id such as Qwen/Qwen2.5-7B-Instruct[@revision]',
        )
    return BaseSource("hub", name, revision=revision or None)


def _folder(text: str, path: Path) -> BaseSource:
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"Name the file: {text.rstrip('/')}/{ggufs[0]}" if ggufs else "Give a folder that transformers can load"
        if (path / "adapter_config.json").is_file():
            text, hint = f"{text} is an adapter's: it", f"Give --base its base, and compose it: lora-rt compose {path}"
        raise BaseError(f"the folder {text} has no config.json", next_step=hint)
    return BaseSource("folder", text, path)


def sha256_file(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
