"""The few files that are ever read of an adapter, opened so that nothing else can be: no pipe, no device, no link.

One kind of link is followed: the Hub client's own cache lays a snapshot out as links into the blobs of the same
repository (`models--org--repo/snapshots/<commit>/file -> ../../blobs/<hash>`). A link out of that folder is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "register.json"
STATE = "mode.safetensors"
README = "README.md"
SHARD_INDEX = "adapter_model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

MEGABYTE = 1 << 20
LIMITS: Mapping[str, int] = {
    CONFIG: MEGABYTE,
    WEIGHTS: 16 * 1024 * MEGABYTE,
    CARD: MEGABYTE,
    STATE: 256 * MEGABYTE,
    README: 4 * MEGABYTE,
    SHARD_INDEX: 16 * MEGABYTE,
}
"""Every file that is read, with the most bytes it may have. A rank-64 adapter of a 70B model has under 4 GB."""

POINTER = b"version https://git-lfs"
"""What a file begins with that Git LFS has put in the place of the real one."""

CHUNK = 4 * MEGABYTE
MAX_SHARDS = 64

_SHARD = re.compile(r"adapter_model-(\d{5})-of-(\d{5})\.safetensors")


class UnusableFileError(Exception):
    """A file that will not be read; the text says why."""


def limit_of(name: str) -> int | None:
    """The most bytes that a file of an adapter may have; None for a name that is never read."""
    return LIMITS[WEIGHTS] if shard_number(name) else LIMITS.get(name)


def shard_number(name: str) -> tuple[int, int] | None:
    """(number, of how many) of a part of a sharded weight file, `adapter_model-00001-of-00002.safetensors`."""
    found = _SHARD.fullmatch(name)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    return (number, count) if 1 <= number <= count <= MAX_SHARDS else None


@contextmanager
def open_plain(path: Path, limit: int) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file for reading and give it with its size in bytes.

    The file is opened without following a link (but those of the Hub client's cache, see above) and without waiting
    for a pipe's other end, and what was opened is what is checked, so that nothing can be swapped in between.

    Raises:
        UnusableFileError: a link, anything but a regular file, or more than `limit` bytes.
        FileNotFoundError: there is no such file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(_blob_of(path) or path, flags)
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


def _blob_of(path: Path) -> Path | None:
    """Where a link of the Hub client's cache leads: a file of the `blobs` of the same repository; else None."""
    if not path.is_symlink():
        return None
    repository = next((p.parent for p in path.absolute().parents if p.name == "snapshots"), None)
    if repository is None or not repository.name.startswith("models--"):
        return None
    blob = Path(os.path.realpath(path))  # of a link that leads to itself: a path as good as any, and opening it fails
    return blob if blob.parent == Path(os.path.realpath(repository)) / "blobs" else None


def present(folder: Path) -> list[str]:
    """Which of the readable files the folder holds, by exact name (a file system may ignore case, we do not).

    Parts of a sharded weight file count only where the whole file is not there.
    """
    return select(os.listdir(folder))


def select(names: Iterable[str]) -> list[str]:
    """Those of these names that are read of an adapter, in a fixed order."""
    there = set(names)
    shards = [] if WEIGHTS in there else sorted(name for name in there if shard_number(name))
    return [name for name in LIMITS if name in there and (name != SHARD_INDEX or shards)] + shards


def weights_in(folder: Path) -> list[str]:
    """The names of a folder's adapter_config.json and of its weights: one file, or the parts of one and their index."""
    return [name for name in present(folder) if name in (CONFIG, WEIGHTS, SHARD_INDEX) or shard_number(name)]


def stamp(path: Path) -> str:
    """What no change of a file leaves as it is: not even one that puts the time of modification back."""
    about = path.stat()
    return f"{about.st_dev}:{about.st_ino}:{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}"


def sha256_bytes(content: bytes) -> str:
    """The sha256 of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def sha256_of(path: Path, limit: int) -> str:
    """The sha256 of a plain file."""
    with open_plain(path, limit) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every readable file of an adapter.

    Raises:
        UnusableFileError: one of them is no plain file or too large.
    """
    found: dict[str, str] = {}
    for name in present(folder):
        try:
            found[name] = sha256_of(folder / name, limit_of(name) or 0)
        except UnusableFileError as error:
            raise UnusableFileError(f"{name} {error}") from error
    return found


def combined(files: Mapping[str, str]) -> str:
    """One digest over the files' digests: the sha256 of what `sha256sum` prints for them, sorted by name."""
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
