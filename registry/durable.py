"""Writes that survive a power cut: content first, then the name, then the folder that holds the name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_rt.registry.errors import OccupiedFolderError, StorageError
from lora_rt.registry.files import CONFIG


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk; Windows does so for whoever may write to it alone."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk. Windows can not open folders; there a rename is durable by itself."""
    if os.name == "nt":
        return
    sync_file(path)


def sync_all(folder: Path) -> None:
    """Bring a folder to the disk with all that it holds."""
    for path in (*folder.rglob("*"), folder):
        (sync_folder if path.is_dir() else sync_file)(path)


def move(source: Path, target: Path) -> None:
    """Put a file in the place of another, or where there was none."""
    sync_file(source)
    os.replace(source, target)
    sync_folder(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file with this text; see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file with this, whole or not at all. What a killed writer of it left is removed."""
    for left in abandoned(path.parent, path.name):
        left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        move(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk is reported without one
        raise


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that it holds; it may be gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


_PROBE, _UNFINISHED = ".lora-rt-probe-", ".lora-rt-unfinished-"
_LAST = (CONFIG, "config.json")
"""The files by which a folder is taken for an adapter or a model: they come into it when all others are there."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; what it holds when the block has ended well is then in `target`, else nothing is.

    An empty folder that is there stays the one it is: a mount point or the working directory can't be replaced.

    Raises:
        OccupiedFolderError: something is there already, and it is no empty folder.
    """
    _refuse_occupied(target)
    target = target.resolve()
    there = target.exists()
    around = target if there else target.parent
    around.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=around))
    try:
        yield scratch
        for file in (path for path in scratch.rglob("*") if path.is_file()):
            file.chmod(0o644)  # safetensors keeps others out, and so does mkdtemp
        sync_all(scratch)
        _refuse_occupied(target, besides=scratch.name)
        if there:
            _move_up(scratch)
        else:
            scratch.chmod(0o755)
            os.rename(scratch, target)
            sync_folder(around)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of whatever `target` is when the block has ended well.

    For whoever holds a lock on it: what is left of one that was killed is removed.
    """
    scratch = target.with_name(f"{_UNFINISHED}{target.name}")
    remove(scratch)
    scratch.mkdir()
    try:
        yield scratch
        sync_all(scratch)
        remove(target)
        os.rename(scratch, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move_up(scratch: Path) -> None:
    """Move all that a folder holds into the one above it, or nothing."""
    target = scratch.parent
    moved: list[Path] = []
    try:
        for path in sorted(scratch.iterdir(), key=lambda path: path.name in _LAST):
            if path.name in _LAST:
                sync_folder(target)
            moved.append(path.rename(target / path.name))
        sync_folder(target)
    except BaseException:
        for path in reversed(moved):
            remove(path)
        raise


def check_new_folder(target: Path) -> None:
    """Raise what `new_folder` would raise, before hours are spent on what is to lie there.

    Raises:
        OccupiedFolderError: something is there already, and it is no empty folder.
        StorageError: it can't be made, or a user's home is meant that nobody has.
    """
    if target.parts and target.parts[0].startswith("~"):  # a shell has put in every home that there is
        text = f"{target}: there is no home of a user called {target.parts[0][1:] or 'you'!r}"
        raise StorageError(text, next_step="Give another folder, or the whole path of one")
    _refuse_occupied(target)
    check_writable(target)


def _refuse_occupied(target: Path, besides: str = "") -> None:
    try:
        if target.is_symlink() and not target.exists():
            raise OccupiedFolderError(f"{target} is a link that leads nowhere", next_step="Give a new folder")
        if not target.exists():
            return
        if not target.is_dir():
            raise OccupiedFolderError(f"{target} is there and not empty: it is a file", next_step="Give a new folder")
        # Another process of the same run may be probing, too.
        held = sorted(name for name in os.listdir(target) if name != besides and not name.startswith(_PROBE))
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror}", next_step="Give another folder") from error
    if held:
        text = f"{target} is there and not empty: it holds {', '.join(held[:3])}{' and more' if held[3:] else ''}"
        left = any(name.startswith(_UNFINISHED) for name in held)
        step = ", or remove what a run that was stopped has left in this one" if left else ""
        raise OccupiedFolderError(text, next_step=f"Give a new folder{step}")


def check_writable(folder: Path) -> None:
    """Make a file in the folder, or in the first one above it that is there, and remove it again.

    Raises:
        StorageError: it can't be made, or a folder below can't have its name.
    """
    there = folder.absolute()
    missing = []
    while not os.path.lexists(there):
        missing.append(there.name)
        there = there.parent
    wanted = there
    try:
        with tempfile.TemporaryFile(prefix=_PROBE, dir=there):
            pass
        for name in missing:
            wanted = there / name
            with suppress(FileNotFoundError):
                os.lstat(wanted)  # too long, or with characters that this system takes in no name
    except OSError as error:
        raise StorageError(
            f"nothing can be written into {wanted}: {error.strerror}", next_step="Give a folder that can be written"
        ) from error


_UNWRITTEN = ("PytorchStreamWriter", "inline_container", "unexpected pos", "basic_ios", "iostream")


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Within the block, whatever the libraries raise when a disk is full becomes one kind of error.

    safetensors raises SafetensorError with the system's words in it, torch a RuntimeError of its zip writer.

    Raises:
        StorageError: `what` could not be written.
    """
    try:
        yield
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        raise _unwritten(what, why) from error
    except Exception as error:  # what it is, is told by its class's name or by its words
        if type(error).__name__ == "SafetensorError" or (
            isinstance(error, RuntimeError) and any(word in str(error) for word in _UNWRITTEN)
        ):
            raise _unwritten(what, str(error).splitlines()[0]) from error
        raise


def _unwritten(what: str, why: str) -> StorageError:
    return StorageError(f"{what} can't be written: {why}", next_step="Free some space, or use another disk")


def abandoned(folder: Path, name: str = "*") -> list[Path]:
    """Partial files of a folder whose writer is no longer alive."""
    return [path for path in sorted(folder.glob(f".{name}.*.partial")) if not _is_alive(path.name.split(".")[-2])]


def _is_alive(process: str) -> bool:
    import psutil  # few folders hold partial files

    try:
        return process.isdigit() and bool(psutil.pid_exists(int(process)))
    except OverflowError:  # no process has such a number, but somebody's file does
        return True
