"""`lora-rt plan`: how much memory a base takes, told from its configuration alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_rt.core.cli.options import Json

if TYPE_CHECKING:
    from lora_rt.core.memory.estimate import MemoryPlan, Workload
    from lora_rt.core.memory.fit import Fit, Use
    from lora_rt.core.memory.inference import InferenceMemory
    from lora_rt.core.memory.training import TrainingMemory


def plan(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help='"default", a folder, a .gguf file, or a hub id[@revision].')
    ] = "default",
    precision: Annotated[
        str, typer.Option("--precision", help="float32, bfloat16, float16, int8 or int4; all if left out.")
    ] = "",
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu or cuda; it need not be there to be planned for.")
    ] = "auto",
    r: Annotated[int, typer.Option("--r", help="Rank of an adapter.")] = 16,
    target_modules: Annotated[
        str, typer.Option("--target-modules", help="Layer names, comma-separated, or all-linear.")
    ] = "q_proj,v_proj",
    batch: Annotated[int, typer.Option("--batch", help="Sequences at once.")] = 8,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sequence, prompt and answer.")] = 512,
    labels: Annotated[
        int | None, typer.Option("--labels", help="Tokens of a sequence that carry loss in training; all if left out.")
    ] = None,
    adapters: Annotated[int, typer.Option("--adapters", help="Adapters resident for inference.")] = 1,
    as_json: Json = False,
) -> None:
    """Estimate the memory that a base takes, from its configuration alone: weights, adapters, KV cache, training."""
    from lora_rt.core.base.precision import PRECISIONS, check_precision
    from lora_rt.core.cli.console import print_json
    from lora_rt.core.memory.config import read_config
    from lora_rt.core.memory.estimate import Workload, plan_memory

    workload = Workload(
        device=_device(device),
        r=r,
        target_modules=tuple(word.strip() for word in target_modules.split(",") if word.strip()),
        batch=batch,
        seq=seq,
        adapters=adapters,
        labels=seq - 1 if labels is None else labels,
    )
    workload.check()
    chosen = [check_precision(precision)] if precision else list(PRECISIONS)
    made = plan_memory(read_config(base), chosen, workload)
    if as_json:
        print_json(_document(made))
    else:
        _print(made)


def _device(name: str) -> Literal["cpu", "cuda"]:
    from lora_rt.core.memory.config import PlanError

    if name == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return "cpu"
    if name.partition(":")[0] == "cuda":
        return "cuda"
    raise PlanError(f"there is no device {name!r} to plan for", next_step="Use auto, cpu or cuda")


def _document(made: MemoryPlan) -> dict[str, Any]:
    """Sizes in bytes."""
    import dataclasses

    from lora_rt.core.memory.fit import DEVICES_GB

    return {
        "base": made.base.name,
        "parameters": made.parameters,
        "workload": {**dataclasses.asdict(made.workload), "optimizer": made.workload.optimizer},
        "process": made.process,
        "precisions": {
            item.precision: {
                "inference": {
                    **dataclasses.asdict(item.inference),
                    "total": item.inference.total + made.process,
                },
                "training": _training_document(item.training, made.process),
                "training_checkpointed": _training_document(item.checkpointed, made.process),
            }
            for item in made.precisions
        },
        "fits": {f"{size} GB": {use: _fit_document(made, use, size) for use in _USES} for size in DEVICES_GB},
    }


_USES: tuple[Use, ...] = ("inference", "training")


def _training_document(memory: TrainingMemory | None, process: int) -> dict[str, int] | None:
    import dataclasses

    return None if memory is None else {**dataclasses.asdict(memory), "peak": memory.peak + process}


def _fit_document(made: MemoryPlan, use: Use, size: int) -> dict[str, Any] | None:
    import dataclasses

    from lora_rt.core.memory.fit import best_fit

    fit = best_fit(made, use, size)
    return None if fit is None else dataclasses.asdict(fit)


def _print(made: MemoryPlan) -> None:
    from rich.markup import escape

    from lora_rt.core.cli.console import out

    w = made.workload
    facts = f"{made.parameters / 1e6:,.0f} M parameters, {int(made.base.text.num_hidden_layers)} layers"
    adapter = f"adapters of rank {w.r} on {', '.join(w.target_modules)}"
    out.print(f"[bold]{escape(made.base.name)}[/]: {facts}; {escape(adapter)}", soft_wrap=True)
    size = f"{w.batch} x {w.seq} tokens on {'a CPU' if w.device == 'cpu' else 'a CUDA device'}; GiB"
    out.print()
    out.print(_table(f"inference, {size}", _inference_rows(made)))
    out.print()
    out.print(_table(f"training, {size} (* with gradient checkpointing)", _training_rows(made)))
    out.print()
    for line in _fit_lines(made):
        out.print(escape(line), soft_wrap=True)
    out.print(escape(_summary(made)), soft_wrap=True)


def _table(title: str, rows: list[dict[str, str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1)
    )
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    return table


def _inference_rows(made: MemoryPlan) -> list[dict[str, str]]:
    def row(memory: InferenceMemory) -> dict[str, int]:
        return {
            "weights": memory.weights,
            "adapters": memory.adapters + memory.stacked,
            "KV cache": memory.kv_cache,
            "activ.": memory.activations + memory.workspace,
            **({"process": made.process} if made.process else {}),
            "total": memory.total + made.process,
        }

    return [{"precision": item.precision, **_shown(row(item.inference))} for item in made.precisions]


def _training_rows(made: MemoryPlan) -> list[dict[str, str]]:
    def row(memory: TrainingMemory, again: TrainingMemory | None) -> dict[str, int | None]:
        return {
            "weights": memory.weights,
            "adapter": memory.adapter,
            "grads": memory.gradients,
            "optimizer": memory.optimizer,
            "activ.": memory.per_batch + memory.workspace,
            **({"process": made.process} if made.process else {}),
            "peak": memory.peak + made.process,
            "peak*": None if again is None else again.peak + made.process,
        }

    return [{"precision": i.precision, **_shown(row(i.training, i.checkpointed))} for i in made.precisions]


def _shown(row: dict[str, int] | dict[str, int | None]) -> dict[str, str]:
    return {name: "-" if size is None else gib(size) for name, size in row.items()}


def gib(size: int) -> str:
    """A size in GiB, three digits at most."""
    value = size / 2**30
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"


def _fit_lines(made: MemoryPlan) -> list[str]:
    from lora_rt.core.memory.fit import DEVICES_GB, best_fit

    lines = []
    for size in DEVICES_GB:
        parts = [f"{use} {_told(best_fit(made, use, size), made.workload)}" for use in _USES]
        lines.append(f"{size} GB: {'; '.join(parts)}")
    return lines


def _told(fit: Fit | None, workload: Workload) -> str:
    if fit is None:
        return "does not fit"
    how = fit.precision + (" with checkpointing" if fit.checkpointing else "")
    if (fit.batch, fit.seq) == (workload.batch, workload.seq):
        return f"in {how}, {gib(fit.size)} GiB (a batch of about {fit.most} would fit)"
    return f"in {how} with at most {fit.batch} x {fit.seq} tokens"


def _summary(made: MemoryPlan) -> str:
    least = min(made.precisions, key=lambda item: item.inference.total)
    train = min(made.precisions, key=lambda item: item.training.peak)
    text = f"least: {gib(least.inference.total + made.process)} GiB to run ({least.precision}), "
    text += f"{gib(train.training.peak + made.process)} GiB to train ({train.precision})"
    if train.checkpointed is not None:
        text += f", {gib(train.checkpointed.peak + made.process)} GiB with checkpointing"
    return text
