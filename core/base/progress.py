"""Progress of slow steps on standard error: a live line in a terminal, nothing where nobody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_console = Console(stderr=True)


@contextmanager
def step(description: str) -> Iterator[None]:
    """A spinner with the elapsed time while the block runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal) as progress:
        progress.add_task(description, total=None)
        yield


@contextmanager
def download(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar in bytes; the block calls what it is given with (bytes so far, bytes in all)."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console, transient=True, disable=not _console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
