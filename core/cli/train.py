"""`lora-rt train`: trains one adapter and puts it into the store."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lora_rt.core.base.precision import check_device
from lora_rt.core.base.source import parse_base
from lora_rt.core.cli import options
from lora_rt.core.cli.console import compose_hint
from lora_rt.core.cli.console import out as console
from lora_rt.core.cli.session import session, starting
from lora_rt.core.step.settings import TrainSettings, check_targets
from lora_rt.core.training.data import read_lines
from lora_rt.plugins.manager.finding import OURS

if TYPE_CHECKING:
    from lora_rt.core.training.run import TrainResult


def train(
    register: Annotated[
        str, typer.Argument(metavar="REGISTER", help="The register that the adapter is to express; also its name.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data", metavar="DATA", help="JSON lines, a list, Parquet, a folder of them, or org/name of a data set."
        ),
    ],
    mode: Annotated[str, typer.Option("--mode", help="What it is trained for; see: lora-rt plugins.")] = "output-only",
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", metavar="DATA", help="Examples to measure on; a tenth of the data if left out."),
    ] = None,
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    r: Annotated[int, typer.Option("--r", help="Rank.")] = 16,
    alpha: Annotated[float, typer.Option("--alpha", help="Scale; the adapter acts with alpha/r.")] = 32,
    target_modules: Annotated[
        str, typer.Option("--target-modules", help="Layer names, roles (attention, mlp) or all-linear.")
    ] = "q_proj,v_proj",
    dropout: Annotated[float, typer.Option("--dropout", help="LoRA dropout.")] = 0.05,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate of a cosine schedule.")] = 1e-3,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 3,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences per step.")] = 8,
    accumulation: Annotated[
        int | None,
        typer.Option("--accumulation", help="Run a step's sequences in so many parts; picked by the free memory."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute activations twice instead of keeping them; picked by the free memory.",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", help="adamw or paged-adamw-8bit; the latter on CUDA, the former on a CPU."),
    ] = None,
    seed: options.Seed = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the mode; may be given several times."),
    ] = None,
    scene_types: Annotated[
        str, typer.Option("--scene-types", help="Scene types the adapter is for, comma-separated.")
    ] = "",
    template_var: options.TemplateVar = None,
    special_tokens: options.SpecialTokens = False,
    licence: Annotated[str, typer.Option("--licence", help="The adapter's licence, e.g. Apache-2.0.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the same run.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Put the adapter there instead of into the store.")
    ] = None,
) -> None:
    """Train an adapter for REGISTER on JSON lines and publish it with its card."""
    settings = TrainSettings(
        register=register,
        mode=mode,
        data=data,
        held_out=held_out,
        base=base,
        precision=precision,
        device=device,
        r=r,
        alpha=alpha,
        target_modules=tuple(_words(target_modules)),
        dropout=dropout,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        seed=seed,
        options=options.mode_options(option or []),
        scene_types=tuple(_words(scene_types)),
        licence=licence,
        **options.text_format(template_var, special_tokens),
    )
    _check(settings)
    from lora_rt.core.training.run import train as run

    _report(run(settings, out=out, resume=resume), settings, out)


def _check(settings: TrainSettings) -> None:
    """What can be said before torch is imported, which takes seconds, and before a base is loaded."""
    source = parse_base(settings.base)
    check_device(settings.device)
    with options.usage():
        settings.check()
    check_targets(settings.target_modules, source)
    modes = session().modes
    with nullcontext() if any(record.name == settings.mode for record in modes.records) else options.usage():
        modes.require(settings.mode)
    # Which fields a stranger's mode reads is known only when it has seen the base; ours read these.
    ours = any(record.name == settings.mode and record.package == OURS for record in modes.records)
    for path in (settings.data, settings.held_out):
        if path is not None:
            read_lines(path, ("scene", "text") if ours else (), chats=True)
    with starting():
        import lora_rt.core.training.run  # noqa: F401


def _report(result: TrainResult, settings: TrainSettings, out: Path | None) -> None:
    loss = f"held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f} nats per token"
    speed = f"{result.steps} steps, {result.tokens_per_second:.0f} tokens/s"
    console.print(f"trained [bold]{escape(result.where)}[/]: {loss}, {speed}", soft_wrap=True)
    hint = compose_hint(out or settings.register, settings.base)
    console.print(escape(hint), soft_wrap=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
