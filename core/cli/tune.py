"""`lora-rt tune`: learns the weights of a composition, or the gates of its context adapters, from examples."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from lora_rt.core.cli import options
from lora_rt.core.cli.compose.request import look_up
from lora_rt.core.cli.console import compose_hint, err, out, print_json
from lora_rt.core.cli.session import session, starting
from lora_rt.core.training.data import read_pairs
from lora_rt.core.tuning.names import check_name

if TYPE_CHECKING:
    from lora_rt.core.tuning.session import Fitted, Job
    from lora_rt.registry.compositions import NamedComposition


_PLAIN_EVERY = 10


class Per(StrEnum):
    """What is learned: a weight per adapter, per adapter and layer, or gates per scene type."""

    ADAPTER = "adapter"
    LAYER = "layer"
    SCENE = "scene"


def tune(
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC", help="The adapters; their weights here are where it starts from.")
    ],
    data: options.Data,
    per: Annotated[Per, typer.Option("--per", help="What is learned; scene needs a scene_type in every line.")] = (
        Per.ADAPTER
    ),
    name: Annotated[str, typer.Option("--name", help="The composition's name (--per adapter, layer).")] = "my-mix",
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Put the adapters there, not into the store (scene).")
    ] = None,
    base: options.Base = "default",
    allow_base_mismatch: options.AllowBaseMismatch = False,
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    epochs: Annotated[float, typer.Option("--epochs", min=0.001, help="Passes over the data.")] = 3,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", min=1e-6, max=10, help="Adam's: 0.03 on weights, 0.1 on gates if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples per step.")] = 8,
    seed: options.Seed = 0,
    template_var: options.TemplateVar = None,
    special_tokens: options.SpecialTokens = False,
    as_json: options.Json = False,
) -> None:
    """Learn from examples how much each adapter should say, with base and adapters frozen."""
    composition = options.composition_of(specs)
    if per is not Per.SCENE:
        check_name(name, session().registry)
    look_up(composition, base)
    fields = ("scene", "text", "scene_type") if per is Per.SCENE else ("scene", "text")
    read_pairs(data, fields, chats=True)
    with starting():
        from lora_rt.core.tuning.session import Job

    text = options.text_format(template_var, special_tokens)
    job = Job(composition, data, base, precision, device, allow_base_mismatch=allow_base_mismatch, **text)
    if per is Per.SCENE:
        fitted = _scenes(job, folder, epochs, learning_rate or 0.1, batch_size, seed)
        if as_json:
            print_json({"adapters": list(fitted.places), "registered": fitted.registered, "nll": _losses(fitted)})
        return
    mix = _mix(job, name, per, epochs, learning_rate or 0.03, batch_size, seed)
    if as_json:
        print_json(mix.model_dump(mode="json"))
    else:
        _show(mix, base)


def _mix(
    job: Job, name: str, per: Per, epochs: float, learning_rate: float, batch_size: int, seed: int
) -> NamedComposition:
    from lora_rt.core.tuning.session import tune_mix
    from lora_rt.core.tuning.weights import TuneSettings

    kind: Literal["adapter", "layer"] = "layer" if per is Per.LAYER else "adapter"
    settings = TuneSettings(kind, epochs, batch_size, learning_rate, seed=seed)
    with _Progress() as progress:
        return tune_mix(job, name, settings, progress.advance)


def _scenes(job: Job, folder: Path | None, epochs: float, learning_rate: float, batch_size: int, seed: int) -> Fitted:
    from lora_rt.core.tuning.scenes import SceneSettings
    from lora_rt.core.tuning.session import fit_scenes

    settings = SceneSettings(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    with _Progress() as progress:
        fitted = fit_scenes(job, folder, settings, progress.advance)
    first, last = _losses(fitted)
    err.print(f"recognized {fitted.registered:.0%} of the scene types; {first:.3f} -> {last:.3f} nats per token")
    for place in fitted.places:
        err.print(f"fitted [bold]{escape(place)}[/]", soft_wrap=True)
    return fitted


def _losses(fitted: Fitted) -> tuple[float, float]:
    return fitted.loss_first, fitted.loss_last


def _show(mix: NamedComposition, base: str) -> None:
    table = Table("adapter", "weight", "lowest layer", "highest layer")
    for term in mix.terms:
        mean = sum(term.layers) / len(term.layers) if term.layers else term.weight
        low, high = (f"{min(term.layers):.3f}", f"{max(term.layers):.3f}") if term.layers else ("", "")
        table.add_row(escape(term.reference), f"{mean:.3f}", low, high)
    out.print(table)
    before, after = mix.metrics["nll_before"], mix.metrics["nll_after"]
    out.print(f"{before:.3f} -> {after:.3f} nats per token")
    out.print(escape(compose_hint(mix.name, base)), soft_wrap=True)


class _Progress:
    """A live line in a terminal, a plain line now and then elsewhere."""

    def __enter__(self) -> _Progress:
        self._steps = 0
        self._console = err
        self._status = Status("reading", console=err)
        self._status.start()
        return self

    def __exit__(self, *_failure: object) -> None:
        self._status.stop()

    def advance(self, what: str, loss: float) -> None:
        """One step is done."""
        self._steps += 1
        line = f"{what}: step {self._steps}, loss {loss:.3f}"
        self._status.update(line)
        if not self._console.is_terminal and self._steps % _PLAIN_EVERY == 0:
            self._console.print(line)
