"""The subcommands. Results are one line each, so that they can be piped into one another; --json keeps line breaks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_rt.core.cli import options
from lora_rt.core.cli.bridge.items import field_of, read_items

if TYPE_CHECKING:
    from lora_rt.core.bridge.hyper import HyperBridge

app = typer.Typer(help="Compress texts to scenes, expand scenes to texts.", no_args_is_help=True)

Adapter = Annotated[str, typer.Option("--adapter", help="The bridge, or a composition with it: 'bridge emotion:0.4'.")]
Data = Annotated[Path | None, typer.Option("--data", metavar="F.jsonl", help="One JSON object per line instead.")]
Candidates = Annotated[
    int, typer.Option("--candidates", min=1, help="Texts per scene; the one that compresses back best is kept.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of the candidates after the first.")]
Texts = Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Standard input, a line each, if left out.")]
Scenes = Annotated[list[str] | None, typer.Argument(metavar="SCENE", help="Standard input, a line each, if left out.")]


class Side(StrEnum):
    """Where a round trip starts."""

    scene = "scene"
    text = "text"


@app.command()
def compress(
    texts: Texts = None,
    data: Data = None,
    adapter: Adapter = "bridge",
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Text to scene."""
    given = read_items(texts or [], data, "text")
    scenes = _bridge(adapter, base, precision, device).compress(given)
    _show([{"text": text, "scene": scene} for text, scene in zip(given, scenes, strict=True)], ["scene"], as_json)


@app.command()
def expand(
    scenes: Scenes = None,
    data: Data = None,
    candidates: Candidates = 1,
    seed: Seed = 0,
    adapter: Adapter = "bridge",
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Scene to text."""
    given = read_items(scenes or [], data, "scene")
    texts = _bridge(adapter, base, precision, device).expand(given, candidates=candidates, seed=seed)
    _show([{"scene": scene, "text": text} for scene, text in zip(given, texts, strict=True)], ["text"], as_json)


@app.command()
def roundtrip(
    items: Annotated[list[str] | None, typer.Argument(metavar="ITEM", help="Standard input if left out.")] = None,
    start: Annotated[Side, typer.Option("--from", help="What the items are.")] = Side.scene,
    data: Data = None,
    candidates: Candidates = 1,
    seed: Seed = 0,
    adapter: Adapter = "bridge",
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Scene to text to scene, or with --from text the other way round."""
    from lora_rt.core.bridge.rounds import onward

    given = read_items(items or [], data, start.value)
    bridge = _bridge(adapter, base, precision, device)
    from_scene = start is Side.scene
    keys = ("scene", "text") if from_scene else ("text", "scene")

    def expand(items: Sequence[str]) -> list[str]:
        return bridge.expand(items, candidates=candidates, seed=seed)

    between = expand(given) if from_scene else bridge.compress(given)
    back = onward(bridge.compress, between) if from_scene else onward(expand, between)
    rows = [dict(zip((*keys, "back"), row, strict=True)) for row in zip(given, between, back, strict=True)]
    _show(rows, [*keys, "back"], as_json)


@app.command()
def cycle(
    out: Annotated[Path, typer.Option("--out", metavar="F.jsonl", help="Where the lines go; a new file.")],
    texts: Annotated[Path | None, typer.Option("--texts", metavar="F.jsonl", help="Texts that have no scene.")] = None,
    scenes: Annotated[
        Path | None, typer.Option("--scenes", metavar="F.jsonl", help="Scenes that have no text.")
    ] = None,
    adapter: Adapter = "bridge",
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
) -> None:
    """Give unpaired texts and scenes a partner, to train on beside the pairs (`train --mode bridge`)."""
    from lora_rt.core.bridge.cycle import cycle_pairs, write_lines

    lone_texts = field_of(texts, "text") if texts else []
    lone_scenes = field_of(scenes, "scene") if scenes else []
    lines = cycle_pairs(_bridge(adapter, base, precision, device), lone_texts, lone_scenes)
    write_lines(out, lines)
    typer.echo(f"{len(lines)} lines in {out}", err=True)


def _bridge(adapter: str, base: str, precision: str, device: str) -> HyperBridge:
    """The bridge; what can be wrong with its name is found out before the base is loaded."""
    from lora_rt.core.cli.compose.request import look_up
    from lora_rt.core.requests.composition import Composition

    composition = Composition.parse(adapter)
    look_up(composition)
    from lora_rt.core.bridge.hyper import HyperBridge
    from lora_rt.core.runtime import Runtime

    return HyperBridge(Runtime.load(base, precision=precision, device=device), composition)


def _show(rows: Sequence[dict[str, str]], shown: Sequence[str], as_json: bool) -> None:
    from lora_rt.core.cli.console import print_json

    if as_json:
        print_json(list(rows))
        return
    for row in rows:
        for key in shown:
            line = " ".join(row[key].split())
            typer.echo(line if len(shown) == 1 else f"{key:>5}  {line}")
        if len(shown) > 1:
            typer.echo()
