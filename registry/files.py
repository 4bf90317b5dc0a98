"""The five files that are ever read of an adapter, opened so that nothing else can be: no link, no pipe, no device."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "register.json"
STATE = "mode.safetensors"
README = "README.md"

MEGABYTE = 1 << 20
LIMITS: Mapping[str, int] = {
    CONFIG: MEGABYTE,
    WEIGHTS: 16 * 1024 * MEGABYTE,
    CARD: MEGABYTE,
    STATE: 256 * MEGABYTE,
    README: 4 * MEGABYTE,
}
"""Every file that is read, with the most bytes it may have. A rank-64 adapter of a 70B model has under 4 GB."""

CHUNK = 4 * MEGABYTE


class UnusableFileError(Exception):
    """A file that will not be read; the text says why."""


@contextmanager
def open_plain(path: Path, limit: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading and give it with its size in bytes.

    The file is opened without following a link and without waiting for a pipe's other end, and what was opened is
    what is checked, so that nothing can be swapped in between.

    Raises:
        UnusableFileError: a link, anything but a regular file, or more than `limit` bytes.
        FileNotFoundError: there is no such file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise UnusableFileError("is a symbolic link; copy the file itself here") from error
        if error.errno in (errno.ENXIO, errno.EACCES, errno.EISDIR, errno.ENODEV):
            raise UnusableFileError(f"can not be opened: {os.strerror(error.errno)}") from error
        raise
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise UnusableFileError("is not a regular file")
    with open(descriptor, "rb") as file:
        if facts.st_size > limit:
            raise UnusableFileError(f"has {facts.st_size:,} bytes, more than the {limit:,} that are read")
        yield file, facts.st_size


def present(folder: Path) -> list[str]:
    """Which of the readable files the folder holds, by exact name (a file system may ignore case, we do not)."""
    names = set(os.listdir(folder))
    return [name for name in LIMITS if name in names]


def sha256_bytes(content: bytes) -> str:
    """The sha256 of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path, limit: int) -> str:
    """The sha256 of a plain file, read in chunks of 4 MB."""
    digest = hashlib.sha256()
    with open_plain(path, limit) as (file, _):
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every readable file of an adapter.

    Raises:
        UnusableFileError: one of them is no plain file or too large.
    """
    found: dict[str, str] = {}
    for name in present(folder):
        try:
            found[name] = sha256_of(folder / name, LIMITS[name])
        except UnusableFileError as error:
            raise UnusableFileError(f"{name} {error}") from error
    return found


def combined(files: Mapping[str, str]) -> str:
    """One digest over the files' digests: the sha256 of what `sha256sum` prints for them, sorted by name."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
