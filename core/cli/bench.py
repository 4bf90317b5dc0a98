"""`lora-rt bench`: ours, the base alone and its peers in one table, measured in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_rt.core.cli import options

if TYPE_CHECKING:
    from lora_rt.core.benchmark.workloads import Workload

SYSTEMS = ("base", "generate", "ours", "peft-set", "peft-cat", "peft-mixed")


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="A small set, for a first look.")] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="The grid of rows, residents and targets; takes long.")] = False,
    workloads: Annotated[
        str, typer.Option("--workloads", metavar="NAME,...", help="Of these names or patterns alone (rows16-*).")
    ] = "",
    systems: Annotated[str, typer.Option("--systems", metavar="NAME,...", help=f"{', '.join(SYSTEMS)}.")] = "",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="How often everything is measured.")] = 5,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of the processor; all if left out.")] = None,
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure lora-rt beside the base alone and PEFT, on the same base, prompts and adapters, interleaved."""
    chosen = _workloads(quick, sweep, workloads)
    names = _systems(systems)
    document, shown = _run(chosen, names, repeats, threads, base, precision, device)
    from lora_rt.core.cli.console import out, print_json

    if as_json:
        print_json(document)
    else:
        out.print(shown)


def _split(text: str) -> list[str]:
    return [name for name in text.replace(",", " ").split() if name]


def _workloads(quick: bool, sweep: bool, names: str) -> list[Workload]:
    from lora_rt.core.benchmark.workloads import DEFAULT, QUICK, SWEEP, choose_workloads

    return choose_workloads(_split(names), QUICK if quick else SWEEP if sweep else DEFAULT)


def _systems(names: str) -> list[str]:
    from lora_rt.core.benchmark.workloads import refuse_unknown

    wanted = _split(names) or list(SYSTEMS)
    refuse_unknown("system", [name for name in wanted if name not in SYSTEMS], SYSTEMS)
    return [name for name in SYSTEMS if name in wanted]


def _run(
    chosen: list[Workload],
    names: list[str],
    repeats: int,
    threads: int | None,
    base: str,
    precision: str,
    device: str,
) -> tuple[dict[str, Any], Any]:
    import tempfile

    import torch
    from rich.progress import Progress

    from lora_rt.core.base.load import load_base
    from lora_rt.core.benchmark.lab import Lab
    from lora_rt.core.benchmark.machine import machine, versions
    from lora_rt.core.benchmark.results import rows, settings
    from lora_rt.core.benchmark.session import Measured, measure
    from lora_rt.core.benchmark.systems.all import make_systems
    from lora_rt.core.benchmark.table import results_table
    from lora_rt.core.cli.console import err

    if threads is not None:
        torch.set_num_threads(threads)
    measured: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="lora-rt-bench-") as folder:
        lab = Lab(load_base(base, precision, device), Path(folder))
        systems = make_systems(names, lab)
        with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
            task = progress.add_task("measuring", total=len(chosen) * len(systems) * (repeats + 1))
            report = lambda what: progress.update(task, advance=1, description=what)  # noqa: E731
            try:
                for item in measure(chosen, systems, repeats, report):
                    measured.append(item)
            except KeyboardInterrupt:
                pass
    found = rows(measured, names)
    document = {
        "machine": machine(lab.device),
        "versions": versions(),
        "base": lab.base.identity.id,
        "precision": precision,
        "workloads": settings(measured),
        "rows": found,
    }
    return document, results_table(measured, found, names)
