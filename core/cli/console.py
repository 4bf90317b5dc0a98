"""Where output goes: results to standard output, everything else (progress, notes, errors) to standard error."""

from __future__ import annotations

import json
import logging
import os
import shlex
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from lora_rt.core.base.progress import console
from lora_rt.registry import shadowing
from lora_rt.registry.errors import StorageError

out = console()
err = console(stderr=True)
_ROOM = 1 << 20  # bytes; no table or document of ours is larger


def compose_hint(spec: Path | str, base: str) -> str:
    """The command that tries an adapter out, as a shell takes it, over the base that it is for."""
    given = str(spec) if isinstance(spec, str) or spec.is_absolute() else f"./{spec}"
    over = "" if base == "default" else f" --base {shlex.quote(base)}"
    return f'try it: lora-rt compose {shlex.quote(given)}{over} -p "..."'


def warn(text: str) -> None:
    """One line of warning on standard error."""
    err.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=not err.is_terminal)


def settle_streams() -> None:
    """Let standard streams be what all else takes them for: there, and able to carry any text.

    Those that the caller has closed (`<&-`, `>&-`) are empty, or go nowhere. Characters that a stream's encoding lacks
    are spelled (`\\u65e5`), and what is read that is no character becomes one that every check of a text refuses.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(stream, "reconfigure"):
            with suppress(UnsupportedOperation):  # something was read from it already
                stream.reconfigure(errors="surrogateescape" if name == "stdin" else "backslashreplace")


class _Aside:
    """Standard output while it is kept for a document: its stream, and where its descriptor led."""

    def __init__(self) -> None:
        self.stream = sys.stdout
        self.descriptor: int | None = None
        try:
            self.stream.flush()
            error, output = sys.stderr.fileno(), self.stream.fileno()
            self.descriptor = os.dup(output)
            os.dup2(error, output)
        except (OSError, ValueError):  # it is closed, or a program's own
            pass
        sys.stdout = sys.stderr

    def give_back(self) -> None:
        """Let what is printed go there again."""
        sys.stdout = self.stream
        if self.descriptor is not None:
            os.dup2(self.descriptor, self.stream.fileno())
            os.close(self.descriptor)
            self.descriptor = None


_aside: _Aside | None = None


@contextmanager
def printing_aside() -> Iterator[None]:
    """Within the block what anyone prints, libraries and hooks of plugins too, goes to standard error.

    `print_json` ends it: a document is the last that a command prints.
    """
    global _aside
    _aside = _Aside()
    try:
        yield
    finally:
        _give_back()


def _give_back() -> None:
    global _aside
    if _aside is not None:
        aside, _aside = _aside, None
        aside.give_back()


def print_json(document: Any) -> None:
    """One JSON document and nothing else, not wrapped and not coloured."""
    _give_back()
    with kept_if_unprinted(document):
        sys.stdout.write(_json(document, sys.stdout.encoding))


def _json(document: Any, encoding: str | None) -> str:
    """With every character as it is, or all but ASCII's as `\\u65e5` where the encoding lacks one."""
    text = json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(document, indent=2) + "\n"
    return text


def check_output() -> None:
    """Before work of minutes: that there is room where standard output goes, if that is a file.

    Raises:
        StorageError: its disk is full.
    """
    try:
        kept = _aside.descriptor if _aside is not None else None
        output = sys.stdout.fileno() if kept is None else kept
        if not stat.S_ISREG(os.fstat(output).st_mode) or not hasattr(os, "fstatvfs"):
            return
        disk = os.fstatvfs(output)
    except (OSError, ValueError):  # it is closed, or a program's own
        return
    if disk.f_bavail * disk.f_frsize < _ROOM:
        raise StorageError("the disk is full, and the results would be written to it", next_step="Free some space")


@contextmanager
def kept_if_unprinted(document: Any) -> Iterator[None]:
    """Within the block results are printed. What took minutes is not lost where they can't be: it goes into a file.

    Raises:
        StorageError: standard output can't be written; it says where the document is.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="lora-rt-", suffix=".json", delete=False
        ) as file:
            file.write(_json(document, file.encoding))
        text = f"the results can't be printed: {error.strerror or error}"
        raise StorageError(text, next_step=f"They are kept in {file.name}") from error


def drop_output() -> None:
    """Let what is still to be printed go nowhere: Python would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Notes(logging.Handler):
    """Says what the registry and a base log on standard error, in one line: a name that hides another, for instance."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        err.print(f"[yellow]note:[/] {escape(record.getMessage())}", soft_wrap=not err.is_terminal)


def hear_notes() -> None:
    """Print the notes of registry and requests from now on; each is said once for a command."""
    shadowing.say_hidden.cache_clear()
    for logger in (shadowing.LOGGER, *map(logging.getLogger, ("lora_rt.base", "lora_rt.requests"))):
        if not any(isinstance(handler, Notes) for handler in logger.handlers):
            logger.addHandler(Notes())


@contextmanager
def transfer() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for files on their way, on standard error; silent where that is no terminal.

    Gives a function to call with a file's name, the bytes that arrived since the last call, and its size.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}
        asking = progress.add_task("asking the Hub", total=None)

        def report(name: str, arrived: int, size: int) -> None:
            progress.update(asking, visible=False)
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=size)
            progress.update(tasks[name], advance=arrived)

        yield report
