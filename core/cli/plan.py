"""`lora-rt plan`: how much memory a base takes, told from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from lora_rt.core.base.choices import PRECISIONS, check_precision
from lora_rt.core.base.source import parse_base
from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.options import Json, usage
from lora_rt.core.cli.session import starting
from lora_rt.core.cli.wrapping import show_table
from lora_rt.core.memory.workload import Device, Use, Workload
from lora_rt.core.step.settings import check_targets
from lora_rt.core.training.processes import speaking_once
from lora_rt.errors import UsageError
from lora_rt.plugins.contract.cli import known_device

if TYPE_CHECKING:
    from lora_rt.core.memory.estimate import MemoryPlan
    from lora_rt.core.memory.fit import Fit
    from lora_rt.core.memory.inference import InferenceMemory
    from lora_rt.core.memory.training import TrainingMemory


def plan(
    base: Annotated[
        str | None,
        typer.Argument(metavar="BASE", help='"default", a folder, a .gguf file, or a hub id\\[@revision].'),
    ] = None,
    base_option: Annotated[str | None, typer.Option("--base", help="The same, as other commands take it.")] = None,
    precision: Annotated[
        str, typer.Option("--precision", help=f"{', '.join(PRECISIONS)}; all of them if left out.")
    ] = "",
    device: Annotated[
        str,
        typer.Option(
            "--device", callback=known_device, help="auto, cpu or cuda; it need not be there to be planned for."
        ),
    ] = "auto",
    r: Annotated[int, typer.Option("--r", help="Rank of an adapter.")] = 16,
    target_modules: Annotated[
        str, typer.Option("--target-modules", help="Layer names, roles (attention, mlp) or all-linear.")
    ] = "q_proj,v_proj",
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once.")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sequence, prompt and answer.")] = 512,
    labels: Annotated[
        int | None, typer.Option("--labels", help="Tokens of a sequence that carry loss in training; all if left out.")
    ] = None,
    adapters: Annotated[int, typer.Option("--adapters", help="Adapters resident for inference.")] = 1,
    processes: Annotated[
        int | None,
        typer.Option("--processes", help="Processes that share the batch of a training step; the launcher's, else 1."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate the memory that a base takes, from its configuration alone: weights, adapters, KV cache, training."""
    with speaking_once() as launched:
        if not launched.first:
            return
    if None not in (base, base_option):
        raise UsageError("there can be one base", next_step="Give it as an argument or with --base, not both")
    chosen_base = next((given for given in (base, base_option) if given is not None), "default")
    chosen = [check_precision(precision)] if precision else list(PRECISIONS)
    kind: Device | None = None if device == "auto" else "cpu" if device == "cpu" else "cuda"
    workload = Workload(
        device=kind or "cpu",
        r=r,
        target_modules=tuple(word.strip() for word in target_modules.split(",") if word.strip()),
        batch=batch,
        seq=seq,
        adapters=adapters,
        labels=seq - 1 if labels is None else labels,
        processes=launched.count if processes is None else processes,
        sharded=launched.sharded,
    )
    with usage():
        workload.check()
    check_targets(workload.target_modules, parse_base(chosen_base))
    with starting():
        from lora_rt.core.memory import estimate, fit

        workload = workload if kind else replace(workload, device=estimate.device_here())
    with err.status(f"planning {escape(chosen_base)}"):
        made = estimate.plan_memory(estimate.read_config(chosen_base), chosen, workload)
    if as_json:
        print_json(fit.document(made))
    else:
        _print(made, fit.fits(made))


def _print(made: MemoryPlan, fits: Mapping[int, Mapping[Use, Fit | None]]) -> None:
    w = made.workload
    facts = f"{made.parameters / 1e6:,.0f} M parameters, {int(made.base.text.num_hidden_layers)} layers"
    adapter = f"adapters of rank {w.r} on {', '.join(w.target_modules)}"
    out.print(f"[bold]{escape(made.base.name)}[/]: {facts}; {escape(adapter)}", soft_wrap=True)
    device = "a CPU" if w.device == "cpu" else "a CUDA device"
    out.print()
    _show_rows(f"inference, {w.batch} x {w.seq} tokens on {device}; GiB", _inference_rows(made))
    out.print()
    size = f"{w.rows('training')} x {w.seq} tokens on {device}; GiB"
    if w.processes > 1:
        size = f"each of {w.processes} processes {size} in each, and in all{', FSDP' if w.sharded else ''}"
    _show_rows(f"training, {size} (* with gradient checkpointing)", _training_rows(made))
    out.print()
    copies = [f"{gib(i.inference.copies)} in {i.precision}" for i in made.precisions if i.inference.copies]
    if copies:
        text = f"dense copies for speed, where half of the free memory holds them: at most {', '.join(copies)}"
        out.print(text, soft_wrap=True)
    for line in _fit_lines(w, fits):
        out.print(escape(line), soft_wrap=True)
    out.print(escape(_summary(made)), soft_wrap=True)


def _show_rows(title: str, rows: list[dict[str, str]]) -> None:
    """A table, or blocks below one another where its figures are too long for one."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1)
    )
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    if out.measure(table, options=out.options.update(width=100_000)).maximum <= out.width:
        out.print(table)
    else:
        out.print(title)
        show_table(out, list(rows[0]), [list(row.values()) for row in rows])


def _inference_rows(made: MemoryPlan) -> list[dict[str, str]]:
    def row(memory: InferenceMemory) -> dict[str, int]:
        return {
            "weights": memory.weights,
            "adapters": memory.adapters + memory.stacked + memory.narrow,
            "KV cache": memory.kv_cache,
            "activ.": memory.activations + memory.workspace,
            **({"process": made.process} if made.process else {}),
            "total": memory.total + made.process,
        }

    return [{"precision": item.precision, **_shown(row(item.inference))} for item in made.precisions]


def _training_rows(made: MemoryPlan) -> list[dict[str, str]]:
    count = made.workload.processes

    def row(memory: TrainingMemory, again: TrainingMemory | None) -> dict[str, int | None]:
        peaks = memory.peak + made.process, None if again is None else again.peak + made.process
        in_all = {"all": peaks[0] * count, "all*": None if peaks[1] is None else peaks[1] * count}
        return {
            "weights": memory.weights,
            "adapter": memory.adapter,
            "grads": memory.gradients,
            "optimizer": memory.optimizer,
            "activ.": memory.per_batch + memory.workspace,
            **({"process": made.process} if made.process else {}),
            "peak": peaks[0],
            "peak*": peaks[1],
            **(in_all if count > 1 else {}),
        }

    return [{"precision": i.precision, **_shown(row(i.training, i.checkpointed))} for i in made.precisions]


def _shown(row: dict[str, int] | dict[str, int | None]) -> dict[str, str]:
    return {name: "-" if size is None else gib(size) for name, size in row.items()}


def gib(size: int) -> str:
    """A size in GiB, three digits at most."""
    value = size / 2**30
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"


def _fit_lines(w: Workload, fits: Mapping[int, Mapping[Use, Fit | None]]) -> list[str]:
    lines = []
    for size, found in fits.items():
        parts = [f"{use} {_told(fit, w.rows(use), w.seq)}" for use, fit in found.items()]
        lines.append(f"{size} GB: {'; '.join(parts)}")
    return lines


def _told(fit: Fit | None, batch: int, seq: int) -> str:
    if fit is None:
        return "does not fit"
    how = fit.precision + (" with checkpointing" if fit.checkpointing else "")
    if (fit.batch, fit.seq) == (batch, seq):
        return f"in {how}, {gib(fit.size)} GiB (a batch of about {fit.most} would fit)"
    return f"in {how} with at most {fit.batch} x {fit.seq} tokens"


def _summary(made: MemoryPlan) -> str:
    least = min(made.precisions, key=lambda item: item.inference.total)
    train = min(made.precisions, key=lambda item: item.training.peak)
    text = f"least: {gib(least.inference.total + made.process)} GiB to run ({least.precision}), "
    text += f"{gib(train.training.peak + made.process)} GiB to train ({train.precision})"
    if train.checkpointed is not None:
        text += f", {gib(train.checkpointed.peak + made.process)} GiB with checkpointing"
    if (count := made.workload.processes) > 1:
        text += f", in each of {count} processes"
    return text
