"""`lora-rt bridge`. Results are one line each, so that they can be piped into one another; --json keeps line breaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_rt.plugins.contract import Services, UsageError
from lora_rt.plugins.contract.cli import Json, OverBase, RepetitionPenalty, Temperature, TopK, TopP, spread
from lora_rt.plugins.contract.terminal import harmless
from lora_rt.plugins.modes.bridge.cycle import check_items, check_new_file, cycle_pairs, write_lines
from lora_rt.plugins.modes.bridge.hyper import HyperBridge, onward
from lora_rt.plugins.modes.bridge.items import read_items
from lora_rt.plugins.modes.bridge.table import bridge_table

Adapter = Annotated[str, typer.Option("--adapter", help="The bridge, or a composition with it: 'bridge emotion:0.4'.")]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="F.jsonl", help="Items from this file instead, one JSON object per line."),
]
Candidates = Annotated[
    int, typer.Option("--candidates", min=1, help="Texts per scene; the one that compresses back best is kept.")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", min=1, help="The longest answer, in tokens; 32 for scenes and 96 for texts if left out."
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Makes samples repeatable; greedy answers need none.")
]
Texts = Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Standard input, a line each, if left out.")]
Scenes = Annotated[list[str] | None, typer.Argument(metavar="SCENE", help="Standard input, a line each, if left out.")]


@dataclass(frozen=True)
class Asked(OverBase):
    """The options of every command that lets a bridge answer."""

    adapter: Adapter = "bridge"
    max_new_tokens: MaxNewTokens = None
    temperature: Temperature = 0.0
    top_p: TopP = None
    top_k: TopK = 0
    repetition_penalty: RepetitionPenalty = None
    seed: Seed = 0

    @property
    def over(self) -> dict[str, Any]:
        """The base's options alone."""
        return {name: getattr(self, name) for name in asdict(OverBase())}

    @property
    def sampling(self) -> dict[str, Any]:
        """What the bridge is told of how to choose; what was not given is the bridge's to say."""
        given = {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_p", "repetition_penalty")}
        return {"seed": self.seed, "top_k": self.top_k} | {n: value for n, value in given.items() if value is not None}


def group(services: Services) -> typer.Typer:
    """The group of commands."""
    app = typer.Typer(help="Compress texts to scenes, expand scenes to texts.", no_args_is_help=True)
    commands = Commands(services)
    for command in (commands.compress, commands.expand, commands.roundtrip, commands.cycle, commands.measure):
        app.command()(spread(command))
    app.command("eval", hidden=True)(spread(commands.measure))  # as a user of `lora-rt eval` would guess
    return app


class Commands:
    """The subcommands, over what lora-rt gives them."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def compress(self, asked: Asked, texts: Texts = None, data: Data = None, as_json: Json = False) -> None:
        """Text to scene."""
        given = self._items(texts, data, "text")
        scenes = self._bridge(asked).compress(given, **asked.sampling)
        rows = [{"text": text, "scene": scene} for text, scene in zip(given, scenes, strict=True)]
        self._show(rows, ["scene"], as_json)

    def expand(
        self,
        asked: Asked,
        scenes: Scenes = None,
        data: Data = None,
        candidates: Candidates = 1,
        as_json: Json = False,
    ) -> None:
        """Scene to text."""
        given = self._items(scenes, data, "scene")
        texts = self._bridge(asked).expand(given, candidates=candidates, **asked.sampling)
        rows = [{"scene": scene, "text": text} for scene, text in zip(given, texts, strict=True)]
        self._show(rows, ["text"], as_json)

    def roundtrip(
        self,
        asked: Asked,
        items: Annotated[list[str] | None, typer.Argument(metavar="ITEM", help="Standard input if left out.")] = None,
        start: Annotated[Literal["scene", "text"], typer.Option("--from", help="What the items are.")] = "scene",
        data: Data = None,
        candidates: Candidates = 1,
        as_json: Json = False,
    ) -> None:
        """Scene to text to scene, or with --from text the other way round."""
        given = self._items(items, data, start)
        bridge = self._bridge(asked)

        def expand(items: Sequence[str]) -> list[str]:
            return bridge.expand(items, candidates=candidates, **asked.sampling)

        def compress(items: Sequence[str]) -> list[str]:
            return bridge.compress(items, **asked.sampling)

        first, second = (expand, compress) if start == "scene" else (compress, expand)
        keys = ("scene", "text") if start == "scene" else ("text", "scene")
        between = first(given)
        rows = [
            dict(zip((*keys, "back"), row, strict=True))
            for row in zip(given, between, onward(second, between), strict=True)
        ]
        self._show(rows, [*keys, "back"], as_json)

    def cycle(
        self,
        asked: Asked,
        out: Annotated[
            Path, typer.Option("--out", metavar="F.jsonl", help="A new file for the pairs, one JSON object per line.")
        ],
        texts: Annotated[
            Path | None, typer.Option("--texts", metavar="F.jsonl", help="Texts that have no scene.")
        ] = None,
        scenes: Annotated[
            Path | None, typer.Option("--scenes", metavar="F.jsonl", help="Scenes that have no text.")
        ] = None,
    ) -> None:
        """Give unpaired texts and scenes a partner, to train on beside the pairs (`train --mode bridge`)."""
        check_new_file(out)
        lone_texts = self._field(texts, "text") or []
        lone_scenes = self._field(scenes, "scene") or []
        check_items(lone_texts, lone_scenes)
        lines = cycle_pairs(self._bridge(asked), lone_texts, lone_scenes, **asked.sampling)
        write_lines(out, lines)
        typer.echo(f"{len(lines)} lines in {out}", err=True)

    def measure(
        self,
        over: OverBase,
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
        seed: Annotated[
            int, typer.Option("--seed", min=0, help="The same seed gives the same candidates and random controls.")
        ] = 0,
        as_json: Json = False,
    ) -> None:
        """What bridges do on pairs that they have not seen: both directions, beside controls, with intervals."""
        specs = adapters or ["bridge"]
        pairs = {name: self._services.read_lines(Path(file), ("scene", "text")) for name, file in map(_named, data)}
        compared = [one_direction] if one_direction else []
        runtime = self._services.runtime(*specs, *compared, **asdict(over))
        from lora_rt.plugins.modes.bridge.measure import SECTIONS, BridgeSettings, lengths, measure_bridge

        for examples in pairs.values():
            self._services.check_fit(examples, lengths(runtime, examples), runtime)
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

    def _bridge(self, asked: Asked) -> HyperBridge:
        runtime = self._services.runtime(asked.adapter, **asked.over)
        bridge = HyperBridge(runtime, asked.adapter)
        modes = {info.mode for info, _ in runtime.terms(bridge.composition or "bridge")}
        if "bridge" not in modes:
            named = ", ".join(sorted(modes))
            text = f"warning: {asked.adapter} was not trained as a bridge (its mode: {named})"
            typer.echo(f"{text}, so it may not understand the direction asked for", err=True)
        return bridge

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
