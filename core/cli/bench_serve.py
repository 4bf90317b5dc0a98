"""`lora-rt bench serve`: what a server carries, how long its clients wait, and how it holds under too much."""

from __future__ import annotations

import statistics
import threading
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from rich.table import Table

from lora_rt.core.benchmark import servers, serving
from lora_rt.core.benchmark.serving import Wish
from lora_rt.core.cli import options
from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.session import session
from lora_rt.errors import UsageError

if TYPE_CHECKING:
    from lora_rt.core.runtime import Runtime

_SHARES = (0.5, 0.9)
_TURNS = 3
_LONG = ("overload", "soak")
_LOOK = 1.0  # seconds between two looks at a server's memory
_SETTLING = 10.0  # seconds after which a row of a client that has gone counts as left behind


def serve(
    requests: Annotated[int, typer.Option("--requests", min=2, help="Requests, each with its own composition.")] = 64,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each answer.")] = 64,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Answers that are given at once.")] = 16,
    adapters: Annotated[
        str, typer.Option("--adapters", metavar="NAME,...", help="Adapters; each request mixes two of them.")
    ] = "logic,emotion,body,archetype",
    overload: Annotated[
        float,
        typer.Option("--overload", min=0, help="Seconds under ten times the load that it carries; 0 leaves this out."),
    ] = 0,
    soak: Annotated[
        float, typer.Option("--soak", min=0, help="Seconds under half the load that it carries; 0 leaves this out.")
    ] = 0,
    llama: Annotated[
        str,
        typer.Option(
            "--llama", metavar="PYTHON", help="Also measure llama.cpp's server, by this Python that has xllamacpp."
        ),
    ] = "",
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure `lora-rt serve` beside `Runtime.generate` of the same rows: tokens per second, and how long one waits."""
    from lora_rt.core.base.machine import Watch, machine, versions

    names = adapters.replace(",", " ").split()
    if len(names) < 2:
        raise UsageError("a request has two adapters", next_step="Name at least two: --adapters logic,emotion")
    asked = serving.wishes(requests, tokens, names)
    document: dict[str, Any] = {"versions": versions(), "load": Watch().load}
    document |= {"requests": requests, "tokens": tokens, "rows": rows}
    own = ["--base", base, "--precision", precision, "--device", device, "--max-rows", str(rows)]
    with servers.ours([*own, "--max-queue", str(4 * rows)]) as (url, process):
        with session().runtime(base, precision, device) as runtime:
            document |= {"machine": machine(runtime.parts.base.device), **_beside_generate(url, asked, rows, runtime)}
        document |= _one_by_one(url, asked)
        bodies, carried = [wish.body() for wish in asked], document["served_tokens_per_s"] / tokens
        for share in _SHARES:
            _says(f"arrivals at {share:.0%} of what it carries")
            document[f"at_{share:.0%}"] = serving.summary(serving.arriving(url, bodies, carried * share), tokens)
        for name, length, rate in zip(_LONG, (overload, soak), (10 * carried, carried / 2), strict=True):
            if length:
                _says(f"{name}: {length:g} seconds, once as many prompts are kept as may be")
                serving.fill(url, asked[0])
                document[name] = _held(url, process, asked, rate, length)
    if llama:
        document |= _beside_llama(llama, base, names, asked, rows, document["machine"]["threads"])
        document["ratio_to_llama"] = round(document["served_tokens_per_s"] / document["llama_tokens_per_s"], 2)
    if as_json:
        print_json(document)
    else:
        _print(document)


def _says(text: str) -> None:
    err.print(text, style="dim", markup=False)


def _beside_generate(url: str, asked: list[Wish], rows: int, runtime: Runtime) -> dict[str, Any]:
    """Tokens per second of `Runtime.generate` and of the server in turns.

    Of the server it is the median, and of its ratio to `generate` right before and after it.
    """
    tokens, bodies = asked[0].tokens, [wish.body() for wish in asked]
    serving.generated(runtime, asked[:rows], rows)
    serving.at_once(url, bodies[:rows], rows)
    _says(f"generating {len(asked)} answers in batches of {rows}, then by the server")
    beside, speeds = [serving.generated(runtime, asked, rows)], []
    for _ in range(_TURNS):
        found, seconds = serving.at_once(url, bodies, rows)
        speeds.append(len(asked) * tokens / seconds)
        beside.append(serving.generated(runtime, asked, rows))
    ratios = [2 * speed / sum(pair) for speed, pair in zip(speeds, pairwise(beside), strict=True)]
    return {
        "generate_tokens_per_s": [round(value, 1) for value in beside],
        "served_tokens_per_s": round(statistics.median(speeds), 1),
        "ratio_to_generate": round(statistics.median(ratios), 3),
        "at_once": serving.summary(found, tokens),
    }


def _one_by_one(url: str, asked: list[Wish]) -> dict[str, float]:
    """Tokens per second of the server where a client waits for each answer."""
    bodies = [wish.body() for wish in asked[: max(2, len(asked) // 8)]]
    found, seconds = serving.at_once(url, bodies, 1)
    return {"one_at_a_time_tokens_per_s": round(len(found) * asked[0].tokens / seconds, 1)}


def _beside_llama(
    python: str, base: str, names: list[str], asked: list[Wish], rows: int, threads: int
) -> dict[str, Any]:
    """Tokens per second of llama.cpp's server, for as many clients at once, with the scales of each request."""
    _says("llama.cpp's server")
    tokens, bodies = asked[0].tokens, [wish.body(names) for wish in asked]
    with (
        TemporaryDirectory(prefix="lora-rt-bench-") as folder,
        servers.llama_cpp(python, base, names, rows, threads, Path(folder)) as (url, _),
    ):
        serving.at_once(url, bodies[:2], 2)
        found, seconds = serving.at_once(url, bodies, rows)
    said = sum(one.tokens for one in found)
    return {"llama_tokens_per_s": round(said / seconds, 1), "llama_at_once": serving.summary(found, tokens)}


def _held(url: str, process: psutil.Process, asked: list[Wish], rate: float, length: float) -> dict[str, Any]:
    """How the server holds for so many seconds: what clients saw, rows left behind, and its memory.

    Memory (MiB) is the median of the first and of the last fifth of the time: a server frees what ended answers held
    now and then, and a look at two moments tells little.
    """
    sizes, over = [process.memory_info().rss], threading.Event()

    def look() -> None:
        while not over.wait(_LOOK):
            sizes.append(process.memory_info().rss)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        found = serving.arriving(url, [wish.body() for wish in asked], rate, length)
    finally:
        over.set()
        looking.join()
    end = time.monotonic() + _SETTLING
    while (behind := serving.rows_of(url)) and time.monotonic() < end:
        time.sleep(0.1)
    few = -(-len(sizes) // 5)
    before, after = (int(statistics.median(part)) for part in (sizes[:few], sizes[-few:]))
    memory = {"rss_mib": [before >> 20, after >> 20], "grown": round(after / before - 1, 4)}
    return serving.summary(found, asked[0].tokens) | {"rows_left_behind": behind} | memory


def _print(document: dict[str, Any]) -> None:
    machine, rows = document["machine"], document["rows"]
    out.print(f"{machine['cpu']}, {machine['threads']} threads; {document['requests']} x {document['tokens']} tokens")
    low, *_, high = sorted(document["generate_tokens_per_s"])
    ratio = document["ratio_to_generate"]
    speeds = {
        f"Runtime.generate, {rows} rows in a batch": f"{low:g}-{high:g}",
        f"the server, {rows} clients at once": f"{document['served_tokens_per_s']:g} ({ratio:g} of generate)",
        "the server, one request at a time": f"{document['one_at_a_time_tokens_per_s']:g}",
    }
    if "llama_tokens_per_s" in document:
        times = document["ratio_to_llama"]
        speeds[f"llama.cpp's server, {rows} clients at once"] = f"{document['llama_tokens_per_s']:g} (ours: {times:g}x)"
    table = Table("", "tokens/s", box=None, show_header=True)
    for what, speed in speeds.items():
        table.add_row(what, speed)
    out.print(table)
    columns = ("clients", "served", "refused", "left", "failed", "first token", "between", "refusal")
    table = Table(*columns, box=None)
    for name in ("at_once", "llama_at_once", *(f"at_{share:.0%}" for share in _SHARES), *_LONG):
        if (part := document.get(name)) is not None:
            waits = [_shown(part[key]) for key in ("first_ms", "between_ms", "refused_ms")]
            table.add_row(name, *(str(part[key]) for key in ("served", "refused", "left", "failed")), *waits)
    out.print(table)
    out.print("(ms, half / 99 of 100 wait no longer, from the moment when a request is sent)")
    for name in _LONG:
        if name in document:
            before, after = document[name]["rss_mib"]
            behind = document[name]["rows_left_behind"]
            memory = f"{before} -> {after} MiB ({document[name]['grown']:+.1%})"
            out.print(f"the {name}: memory in its first and last fifth {memory}; {behind} rows left behind")


def _shown(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(f"{spread[key]:.0f}" if spread[key] >= 10 else f"{spread[key]:.1f}" for key in ("p50", "p99"))
