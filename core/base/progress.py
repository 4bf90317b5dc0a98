"""Progress of slow steps on standard error: a live line in a terminal, nothing where nobody watches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class PlainConsole(Console):
    """A terminal that gets letters alone: no colour, no bold, no cursor that moves."""

    @property
    def is_dumb_terminal(self) -> bool:
        """Also where TERM names a clever one."""
        return True


def plain_wanted() -> bool:
    """Whether NO_COLOR asks for letters alone (https://no-color.org); rich itself heeds TERM=dumb."""
    return bool(os.environ.get("NO_COLOR"))


def console(*, stderr: bool = False) -> Console:
    """A console of rich's as everything here uses it."""
    if plain_wanted():
        return PlainConsole(stderr=stderr, highlight=False, color_system=None)
    return Console(stderr=stderr, highlight=False)


_console = console(stderr=True)


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
