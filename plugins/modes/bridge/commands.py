"""`lora-rt bridge`. Results are one line each, so that they can be piped into one another; --json keeps line breaks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_rt.plugins.contract import Services, UsageError
from lora_rt.plugins.contract.cli import Base, Device, Json, Precision
from lora_rt.plugins.contract.terminal import harmless
from lora_rt.plugins.modes.bridge.items import read_items

if TYPE_CHECKING:
    from lora_rt.plugins.modes.bridge.hyper import HyperBridge

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


def group(services: Services) -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Compress texts to scenes, expand scenes to texts.", no_args_is_help=True)
    commands = Commands(services)
    for command in (commands.compress, commands.expand, commands.roundtrip, commands.cycle, commands.measure):
        app.command()(command)
    return app


class Commands:
    """The subcommands, over what lora-rt gives them."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def compress(
        self,
        texts: Texts = None,
        data: Data = None,
        adapter: Adapter = "bridge",
        base: Base = "default",
        precision: Precision = "int4",
        device: Device = "auto",
        as_json: Json = False,
    ) -> None:
        """Text to scene."""
        given = self._items(texts, data, "text")
        scenes = self._bridge(adapter, base, precision, device).compress(given)
        rows = [{"text": text, "scene": scene} for text, scene in zip(given, scenes, strict=True)]
        self._show(rows, ["scene"], as_json)

    def expand(
        self,
        scenes: Scenes = None,
        data: Data = None,
        candidates: Candidates = 1,
        seed: Seed = 0,
        adapter: Adapter = "bridge",
        base: Base = "default",
        precision: Precision = "int4",
        device: Device = "auto",
        as_json: Json = False,
    ) -> None:
        """Scene to text."""
        given = self._items(scenes, data, "scene")
        texts = self._bridge(adapter, base, precision, device).expand(given, candidates=candidates, seed=seed)
        rows = [{"scene": scene, "text": text} for scene, text in zip(given, texts, strict=True)]
        self._show(rows, ["text"], as_json)

    def roundtrip(
        self,
        items: Annotated[list[str] | None, typer.Argument(metavar="ITEM", help="Standard input if left out.")] = None,
        start: Annotated[Side, typer.Option("--from", help="What the items are.")] = Side.scene,
        data: Data = None,
        candidates: Candidates = 1,
        seed: Seed = 0,
        adapter: Adapter = "bridge",
        base: Base = "default",
        precision: Precision = "int4",
        device: Device = "auto",
        as_json: Json = False,
    ) -> None:
        """Scene to text to scene, or with --from text the other way round."""
        given = self._items(items, data, start.value)
        bridge = self._bridge(adapter, base, precision, device)
        from lora_rt.plugins.modes.bridge.hyper import onward

        def expand(items: Sequence[str]) -> list[str]:
            return bridge.expand(items, candidates=candidates, seed=seed)

        from_scene = start is Side.scene
        keys = ("scene", "text") if from_scene else ("text", "scene")
        between = expand(given) if from_scene else bridge.compress(given)
        back = onward(bridge.compress, between) if from_scene else onward(expand, between)
        rows = [dict(zip((*keys, "back"), row, strict=True)) for row in zip(given, between, back, strict=True)]
        self._show(rows, [*keys, "back"], as_json)

    def cycle(
        self,
        out: Annotated[Path, typer.Option("--out", metavar="F.jsonl", help="Where the lines go; a new file.")],
        texts: Annotated[
            Path | None, typer.Option("--texts", metavar="F.jsonl", help="Texts that have no scene.")
        ] = None,
        scenes: Annotated[
            Path | None, typer.Option("--scenes", metavar="F.jsonl", help="Scenes that have no text.")
        ] = None,
        adapter: Adapter = "bridge",
        base: Base = "default",
        precision: Precision = "int4",
        device: Device = "auto",
    ) -> None:
        """Give unpaired texts and scenes a partner, to train on beside the pairs (`train --mode bridge`)."""
        from lora_rt.plugins.modes.bridge.cycle import check_items, check_new_file, cycle_pairs, write_lines

        check_new_file(out)
        lone_texts = self._field(texts, "text") or []
        lone_scenes = self._field(scenes, "scene") or []
        check_items(lone_texts, lone_scenes)
        bridge = self._bridge(adapter, base, precision, device)
        lines = cycle_pairs(bridge, lone_texts, lone_scenes)
        write_lines(out, lines)
        typer.echo(f"{len(lines)} lines in {out}", err=True)

    def measure(
        self,
        data: Annotated[
            list[str],
            typer.Option("--data", metavar="NAME=F.jsonl", help="Held-out pairs; may be given several times."),
        ],
        adapters: Annotated[
            list[str] | None, typer.Argument(metavar="SPEC", help="Bridges, or compositions with one.")
        ] = None,
        one_direction: Annotated[
            str | None, typer.Option("--one-direction", metavar="REF", help="An adapter of scene -> text alone.")
        ] = None,
        seed: Annotated[int, typer.Option("--seed", help="Of candidates and of random controls.")] = 0,
        base: Base = "default",
        precision: Precision = "int4",
        device: Device = "auto",
        as_json: Json = False,
    ) -> None:
        """What bridges do on pairs that they have not seen: both directions, beside controls, with intervals."""
        specs = adapters or ["bridge"]
        pairs = {name: self._services.read_lines(Path(file), ("scene", "text")) for name, file in map(_named, data)}
        compared = [one_direction] if one_direction else []
        runtime = self._services.runtime(*specs, *compared, base=base, precision=precision, device=device)
        from lora_rt.plugins.modes.bridge.measure import SECTIONS, BridgeSettings, measure_bridge
        from lora_rt.plugins.modes.bridge.table import bridge_table

        settings = BridgeSettings(seed=seed, one_direction=one_direction)
        found: dict[str, dict[str, Any]] = {name: {} for name in pairs}
        with self._services.progress("measuring", len(pairs) * len(specs) * len(SECTIONS)) as advance:
            for name, examples in pairs.items():
                for spec in specs:
                    found[name][spec] = measure_bridge(runtime, spec, examples, settings, advance)
        if as_json:
            self._services.print_json({"bridge": found, "examples": {name: len(e) for name, e in pairs.items()}})
            return
        for name, row in found.items():
            for spec, document in row.items():
                self._services.out.print(bridge_table(document, f"{spec} on {name}, {len(pairs[name])} pairs"))

    def _bridge(self, adapter: str, base: str, precision: str, device: str) -> HyperBridge:
        runtime = self._services.runtime(adapter, base=base, precision=precision, device=device)
        from lora_rt.plugins.modes.bridge.hyper import HyperBridge

        return HyperBridge(runtime, adapter)

    def _items(self, arguments: Sequence[str] | None, data: Path | None, field: str) -> list[str]:
        return read_items(arguments or [], self._field(data, field), field)

    def _field(self, path: Path | None, field: str) -> list[str] | None:
        return [str(line[field]) for line in self._services.read_lines(path, (field,))] if path else None

    def _show(self, rows: Sequence[dict[str, str]], shown: Sequence[str], as_json: bool) -> None:
        if as_json:
            self._services.print_json(list(rows))
            return
        for row in rows:
            for key in shown:
                line = harmless(" ".join(row[key].split()))
                typer.echo(line if len(shown) == 1 else f"{key:>5}  {line}")
            if len(shown) > 1:
                typer.echo()


def _named(item: str) -> tuple[str, str]:
    """NAME=FILE, or a file whose name it is."""
    name, equals, file = item.partition("=")
    if not equals:
        return Path(item).stem, item
    if not name or not file:
        raise UsageError(f"--data {item!r} names no file", next_step="Write it as NAME=FILE, or as FILE")
    return name, file
