"""`lora-rt bench`: ours, the base alone and its peers in one table, measured in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lora_rt.core.base.choices import check_device
from lora_rt.core.base.configuration import check_base
from lora_rt.core.base.picture import check_plot
from lora_rt.core.base.source import RANDOM
from lora_rt.core.benchmark.results import draw, noise, shown
from lora_rt.core.benchmark.workloads import (
    DEFAULT,
    QUICK,
    SYSTEMS,
    Origin,
    Workload,
    choose_workloads,
    fitting,
)
from lora_rt.core.cli import options
from lora_rt.core.cli.bench_serve import serve
from lora_rt.core.cli.console import check_output, err, kept_if_unprinted, out, print_json, warn
from lora_rt.core.cli.session import starting

_INTERRUPTED = 130


def bench(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="A small set, for a first look.")] = False,
    workloads: Annotated[
        str, typer.Option("--workloads", metavar="NAME,...", help="Only these, by name or pattern (rows16-*).")
    ] = "",
    systems: Annotated[
        str, typer.Option("--systems", metavar="NAME,...", help=f"Only these, of: {', '.join(SYSTEMS)}.")
    ] = "",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often each is measured.")] = 5,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads to compute with; torch's default if left out.")
    ] = None,
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    random_base: Annotated[
        str | None,
        typer.Option("--random-base", metavar="SIZE", help="A base of random weights instead: tiny, 7b or 13b."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="F.png", help="Draw the ratios into this file.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure lora-rt beside the base alone, PEFT and llama.cpp: the same base, prompts and adapters, interleaved."""
    if context.invoked_subcommand is not None:
        return
    with options.usage():
        chosen = choose_workloads(_split(workloads), QUICK if quick else DEFAULT)
        names = fitting("system", _split(systems), list(SYSTEMS)) or list(SYSTEMS)
        origin = _origin(base, precision, device, random_base)
    check_device(device)
    if plot is not None:
        check_plot(plot)
    if random_base is None:
        check_base(base, precision)
    check_output()
    document, whole = _run(origin, chosen, names, repeats, threads)
    if as_json:
        print_json(document)
    else:
        with kept_if_unprinted(document):
            out.print(shown(document, out.width))
    if unsteady := noise(document):
        warn(unsteady)
    if plot is not None:
        draw(document, plot)
    if not whole:
        raise typer.Exit(_INTERRUPTED)


commands = typer.Typer(rich_markup_mode="rich", add_completion=False)
commands.callback(invoke_without_command=True)(bench)
commands.command("serve")(serve)


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _origin(base: str, precision: str, device: str, random_base: str | None) -> Origin:
    if random_base is not None:
        if base != "default":
            raise typer.BadParameter("there can be one base: --base or --random-base")
        random_base = fitting("random base", [random_base], RANDOM)[0]
    return Origin(base, precision, device, random_base)


def _run(
    origin: Origin, chosen: list[Workload], names: list[str], repeats: int, threads: int | None
) -> tuple[dict[str, Any], bool]:
    """The document, and whether it is whole: of an interrupted run it has what there was."""
    with starting():
        from lora_rt.core.benchmark import session

    with tempfile.TemporaryDirectory(prefix="lora-rt-bench-") as folder:
        return session.run(origin, chosen, names, repeats, threads, Path(folder), _progress(len(chosen)), warn)


@contextmanager
def _progress(workloads: int) -> Iterator[Callable[[int, str], None]]:
    """A bar over the workloads on standard error; told of every repeat."""
    columns = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=workloads)
        yield lambda done, what: progress.update(task, completed=done, description=what)
