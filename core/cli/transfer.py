"""A progress bar for files on their way, on standard error; silent where that is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID


@contextmanager
def transfer() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function to call with a file's name, the bytes that arrived since the last call, and its size."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from lora_rt.core.cli.console import err

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
