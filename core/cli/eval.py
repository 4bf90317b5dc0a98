"""`lora-rt eval`: the register x adapter matrix on data files, or with --bridge what a bridge does on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_rt.core.cli import options

if TYPE_CHECKING:
    from lora_rt.core.evaluation.matrix import Matrix


def evaluate(
    specs: Annotated[
        list[str],
        typer.Argument(metavar="SPEC", help="One composition per argument: emotion, or 'emotion:0.7 logic:0.3'."),
    ],
    data: Annotated[
        list[str], typer.Option("--data", metavar="NAME=F.jsonl", help="A data set; may be given several times.")
    ],
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="F.png", help="Draw the matrix into this file.")
    ] = None,
    bridge: Annotated[
        bool, typer.Option("--bridge", help="SPECs are bridges: measure both directions, beside controls.")
    ] = False,
    one_direction: Annotated[
        str | None,
        typer.Option("--one-direction", metavar="REF", help="For --bridge: an adapter of scene -> text alone."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For --bridge: of candidates and of random controls.")] = 0,
    as_json: options.Json = False,
) -> None:
    """Mean negative log-likelihood per response token of every data set, under the base and every composition."""
    from lora_rt.core.cli.compose.request import look_up
    from lora_rt.core.cli.console import out, print_json
    from lora_rt.core.requests.composition import Composition

    for composition in [Composition.parse(spec) for spec in specs]:
        look_up(composition)
    if bridge:
        _evaluate_bridges(specs, _read(data), base, precision, device, one_direction, seed, as_json)
        return
    matrix = _measure(specs, _read(data), base, precision, device)
    if plot is not None:
        from lora_rt.core.evaluation.plot import plot_matrix

        plot_matrix(matrix, plot)
    if as_json:
        print_json(matrix.document())
        return
    from lora_rt.core.evaluation.table import matrix_table

    out.print(matrix_table(matrix))


def _read(data: list[str]) -> dict[str, list[dict[str, Any]]]:
    from lora_rt.core.training.data import DataError, read_pairs

    wrong = [item for item in data if not item.partition("=")[0] or not item.partition("=")[2]]
    if wrong:
        raise DataError(
            f"--data {wrong[0]!r} names no file", next_step="Write it as NAME=FILE, for instance --data emotion=F.jsonl"
        )
    return {name: read_pairs(Path(path), ("scene", "text")) for name, _, path in (item.partition("=") for item in data)}


def _measure(specs: list[str], data: dict[str, list[dict[str, Any]]], base: str, precision: str, device: str) -> Matrix:
    from rich.progress import Progress

    from lora_rt.core.cli.console import err
    from lora_rt.core.evaluation.matrix import evaluate as measure
    from lora_rt.core.runtime import Runtime

    runtime = Runtime.load(base, precision=precision, device=device)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("evaluating", total=len(data) * (len(specs) + 1))
        return measure(runtime, data, specs, lambda what: progress.update(task, advance=1, description=what))


def _evaluate_bridges(
    specs: list[str],
    data: dict[str, list[dict[str, Any]]],
    base: str,
    precision: str,
    device: str,
    one_direction: str | None,
    seed: int,
    as_json: bool,
) -> None:
    from rich.progress import Progress

    from lora_rt.core.cli.console import err, out, print_json
    from lora_rt.core.evaluation.bridge import SECTIONS, BridgeSettings, measure_bridge
    from lora_rt.core.evaluation.bridge_table import bridge_table
    from lora_rt.core.runtime import Runtime

    runtime = Runtime.load(base, precision=precision, device=device)
    settings = BridgeSettings(seed=seed, one_direction=one_direction)
    found: dict[str, dict[str, Any]] = {name: {} for name in data}
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(data) * len(specs) * len(SECTIONS))
        for name, examples in data.items():
            for spec in specs:
                found[name][spec] = measure_bridge(
                    runtime, spec, examples, settings, lambda what: progress.update(task, advance=1, description=what)
                )
    if as_json:
        print_json({"bridge": found, "examples": {name: len(examples) for name, examples in data.items()}})
        return
    for name, row in found.items():
        for spec, document in row.items():
            out.print(bridge_table(document, f"{spec} on {name}, {len(data[name])} pairs"))
