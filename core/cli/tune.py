"""`lora-rt tune`: learns the weights of a composition, per adapter, layer, scene type or token, from examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from lora_rt.core.cli import options
from lora_rt.core.cli.console import check_output, compose_hint, err, out, print_json
from lora_rt.core.cli.look_up import caution, look_up
from lora_rt.core.cli.session import session, starting
from lora_rt.core.requests.named import named_composition
from lora_rt.core.training.data import read_pairs
from lora_rt.core.tuning.settings import (
    PROMPT_FIELDS,
    Per,
    SceneSettings,
    check_adapters_place,
    check_composition_place,
    settings_for,
)
from lora_rt.registry.reference import composed

if TYPE_CHECKING:
    from lora_rt.core.tuning.session import Fitted
    from lora_rt.registry.compositions import NamedComposition


_PER = (
    "adapter: one weight each. layer: one each in every layer. scene: a gate for every scene type; every line of the "
    "data needs its scene_type. token: weights that are decided anew at every token."
)
_NAME = (
    "Name of the composition that is kept, my-mix if left out. With --per scene: keep the gates in this composition "
    "instead of in the adapters."
)
_PLAIN_EVERY = 10
_INTERRUPTED = 130


@options.spread
def tune(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC", help="The adapters, with the weights to start from.")],
    data: options.Data,
    over: options.OverBase,
    per: Annotated[Per, typer.Option("--per", help=_PER)] = "adapter",
    name: Annotated[str | None, typer.Option("--name", help=_NAME)] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="The mode that decides: router for --per token, context for --per scene with --name.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of that mode; repeatable.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Put the adapters there, not into the store (scene).")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="F.jsonl", help="More prompts with a scene_type, for the classifier (scene)."
        ),
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 3,
    learning_rate: Annotated[
        float | None, typer.Option("--lr", help="Adam's learning rate; if left out 0.03, or 0.1 with --per scene.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples per step.")] = 8,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Learn the weights of a composition from examples, with base and adapters frozen."""
    source = options.source_of(data, "--data")
    assert source is not None
    composition = options.composition_of(specs)
    with options.usage():
        settings = settings_for(
            per,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            named=name is not None and folder is None,
            mode=mode,
            mode_options=options.mode_options(option or []),
            prompts=prompts is not None,
            folder=folder is not None,
        )
    name = "my-mix" if name is None else composed(name)
    opened = session()
    registry = opened.registry
    if isinstance(settings, SceneSettings):
        check_adapters_place(folder, registry)
    else:
        check_composition_place(name, registry)
    session().check(over.base, over.precision, over.device)
    look_up(composition, over.base)
    caution(composition, over.base)  # what is learned starts there
    check_output()
    fields = ("scene", "text", "scene_type") if per == "scene" else ("scene", "text")
    read_pairs(source, fields, chats=True)
    if prompts is not None:
        read_pairs(prompts, PROMPT_FIELDS, chats=True)
    text = over.text()
    with starting():
        from lora_rt.core.tuning.session import Fitted, Job, run

    shared = {"allow_base_mismatch": over.allow_base_mismatch, "prompts": prompts, **text}
    job = Job(composition, source, over.base, over.precision, over.device, **shared)
    known = registry.compositions.source(name)
    if not isinstance(settings, SceneSettings) and name in registry.compositions.own_names():
        err.print(f"{escape(name)} is there already, and will be replaced", soft_wrap=True)
    elif known.startswith("shipped"):
        err.print(f"{escape(name)} will stand before the composition of that name that is {known}", soft_wrap=True)
    for term in composition.terms:
        named = named_composition(term, registry.compositions)
        if named is not None and (named.mode or named.layered):
            start = f"{escape(named.name)} is taken as the weights {escape(str(named))}"
            err.print(f"{start}: what decides beyond them is left out", soft_wrap=True)
    try:
        with _progress() as advance:
            found = run(job, name, folder, settings, advance, registry=registry, modes=opened.modes)
    except KeyboardInterrupt:
        err.print("stopped before the end: nothing is kept")
        raise typer.Exit(_INTERRUPTED) from None
    if isinstance(found, Fitted):
        _show_fitted(found)
    elif not as_json:
        _show(found, over.base)
    if as_json:
        print_json(found.document())


def _show_fitted(fitted: Fitted) -> None:
    losses = f"{fitted.loss_first:.3f} -> {fitted.loss_last:.3f} nats per token"
    err.print(f"{_recognized(fitted.registered, fitted.chance)}; {losses}")
    for place in fitted.places:
        err.print(f"fitted [bold]{escape(place)}[/]", soft_wrap=True)


def _recognized(share: float, chance: float) -> str:
    told = f"recognizes {share:.0%} of the scene types of held-out prompts"
    return f"{told}, no more than whoever always names the most frequent one" if share <= chance else told


def _show(tuned: NamedComposition, base: str) -> None:
    if tuned.mode:  # it has learned by what to decide; these are the weights that it moves
        table = Table("adapter", "starts from")
    else:
        table = Table("adapter", "weight", "lowest layer", "highest layer")
    for term in tuned.terms:
        layers = [term.weight * factor for factor in term.layers]
        low, high = (f"{min(layers):.3f}", f"{max(layers):.3f}") if layers else ("", "")
        table.add_row(escape(term.reference), f"{term.mean_weight:.3f}", *(() if tuned.mode else (low, high)))
    out.print(table)
    if "registered" in tuned.metrics:
        out.print(_recognized(tuned.metrics["registered"], tuned.metrics["registered_by_chance"]))
    before, after = tuned.metrics["nll_before"], tuned.metrics["nll_after"]
    out.print(f"{before:.3f} -> {after:.3f} nats per token")
    out.print(escape(compose_hint(tuned.name, base)), soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A live line in a terminal, a plain line now and then elsewhere; what it gives is called after each step."""
    steps = count(1)
    with Status("reading", console=err) as status:

        def advance(what: str, loss: float) -> None:
            number = next(steps)
            line = f"{what}: step {number}, loss {loss:.3f}"
            status.update(line)
            if not err.is_terminal and number % _PLAIN_EVERY == 0:
                err.print(line)

        yield advance
