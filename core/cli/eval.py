"""`lora-rt eval`: the register x adapter matrix on data files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress

from lora_rt.core.base.picture import check_plot
from lora_rt.core.cli import options
from lora_rt.core.cli.console import check_output, err, kept_if_unprinted, out, print_json
from lora_rt.core.cli.look_up import look_up, normalized
from lora_rt.core.cli.session import session
from lora_rt.core.cli.wrapping import show_table
from lora_rt.core.evaluation.knob import Knob
from lora_rt.core.training.data import read_pairs
from lora_rt.errors import UsageError

if TYPE_CHECKING:
    from lora_rt.core.requests.composition import Composition
    from lora_rt.core.runtime import Runtime


@options.spread
def evaluate(
    context: typer.Context,
    specs: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPEC", help="One composition per argument: emotion, or 'emotion:0.7 logic:0.3'."),
    ] = None,
    *,
    data: Annotated[
        list[str], typer.Option("--data", metavar="NAME=F.jsonl", help="A data set; may be given several times.")
    ],
    over: options.OverBase,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="A:B", help="Draw losses over the weight w of A:w B:1-w, for w from 0 to 1."),
    ] = None,
    normalize: options.Normalize = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="F.png", help="Draw the matrix, or the curve, into this file.")
    ] = None,
    bridge: Annotated[bool, typer.Option("--bridge", hidden=True)] = False,
    one_direction: Annotated[str | None, typer.Option("--one-direction", hidden=True)] = None,
    seed: Annotated[int, typer.Option("--seed", hidden=True)] = 0,
    multiply: options.Multiply = None,
    as_json: options.Json = False,
) -> None:
    """Measure how well the base and compositions predict data sets: negative log-likelihood per response token."""
    if bridge:
        shared = ["--base", over.base, "--precision", over.precision, "--device", over.device, "--seed", str(seed)]
        shared += ["--one-direction", one_direction] if one_direction else []
        _measure_bridges(
            context, [*(specs or []), *(word for item in data for word in ("--data", item)), *shared], as_json
        )
        return
    specs = specs or []
    knob = Knob.parse(sweep) if sweep else None
    if knob is not None:
        if normalize is not None and normalize < 1:
            message = f"--sweep draws weights that add up to 1, and --normalize {normalize:g} would change them"
            raise UsageError(message, next_step="Give one of the two, or --normalize 1")
        specs = [*specs, *knob.specs]
    if not specs:
        raise UsageError("there is no composition", next_step="Give one, or the curve of two: --sweep emotion:logic")
    columns: dict[str, Composition] = {}
    for spec in specs:
        composition = normalized(options.composition_of([spec]), normalize)
        # The columns of a knob keep the names by which its curve finds them.
        columns[spec if knob is not None and spec in knob.specs else str(composition)] = composition
    if plot is not None:
        check_plot(plot)
    for composition in columns.values():
        look_up(composition, over.base)
    text = over.text()
    examples = _read(data)
    check_output()
    runtime = session().runtime(over.base, over.precision, over.device, **text)
    from lora_rt.core.evaluation import matrix, shown

    with _progress(runtime, examples, len(columns) + 1, over.precision) as advance:
        losses = matrix.evaluate(runtime, examples, columns, advance)
    # A picture that can't be written after all must not take the figures with it.
    if as_json:
        print_json(losses.document())
    else:
        with kept_if_unprinted(losses.document()):
            out.print(shown.TITLE)
            show_table(out, *shown.matrix_table(losses))
            if knob is not None:
                out.print(knob.drawn(losses), soft_wrap=True)
    if plot is not None:
        shown.plot_matrix(losses, plot) if knob is None else shown.plot_knob(losses, knob, plot)


def _read(data: list[str]) -> dict[str, list[dict[str, Any]]]:
    wrong = [item for item in data if not item.partition("=")[0] or not item.partition("=")[2]]
    if wrong:
        raise UsageError(
            f"--data {wrong[0]!r} names no file", next_step="Write it as NAME=FILE, for instance --data emotion=F.jsonl"
        )
    names = [item.partition("=")[0] for item in data]
    if double := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        text = f"--data names {', '.join(map(repr, double))} more than once"
        raise UsageError(
            text, next_step="Give each data set a name of its own, for instance train=A.jsonl test=B.jsonl"
        )
    return {
        name: read_pairs(Path(path), ("scene", "text"), chats=True)
        for name, _, path in (item.partition("=") for item in data)
    }


@contextmanager
def _progress(
    runtime: Runtime, data: dict[str, list[dict[str, Any]]], columns: int, precision: str
) -> Iterator[Callable[[str], None]]:
    """Says what is measured on what, and shows how far it is; what it gives is told of each cell of the matrix."""
    counts = ", ".join(f"{len(examples)} of {name}" for name, examples in data.items())
    err.print(f"[dim]examples: {escape(counts)}; over {escape(runtime.base.id)} ({precision})[/]", soft_wrap=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("evaluating", total=len(data) * columns)
        yield lambda what: progress.update(task, advance=1, description=what)


def _measure_bridges(context: typer.Context, arguments: list[str], as_json: bool) -> None:
    """What `--bridge` did before the bridge had commands of its own."""
    err.print("[dim]eval --bridge is now: lora-rt bridge measure[/]")
    commands: Any = context.find_root().command
    group = commands.get_command(context, "bridge")
    if group is None:
        raise typer.BadParameter("the mode bridge is not there; see: lora-rt plugins")
    group.main(["measure", *arguments, *["--json"] * as_json], "lora-rt bridge", standalone_mode=False)
