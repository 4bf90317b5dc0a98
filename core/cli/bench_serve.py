"""`lora-rt bench serve`: what a server carries, how long its clients wait, and how it holds under too much."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lora_rt.core.cli import options
from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.session import session
from lora_rt.errors import UsageError

if TYPE_CHECKING:
    import psutil

_SHARES = (0.5, 0.9)


def serve(
    requests: Annotated[int, typer.Option("--requests", min=2, help="Requests, each with its own composition.")] = 64,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each answer.")] = 64,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Answers that are generated at the same time.")] = 16,
    adapters: Annotated[
        str, typer.Option("--adapters", metavar="NAME,...", help="Each request has two of these.")
    ] = "logic,emotion,body,archetype",
    overload: Annotated[
        float, typer.Option("--overload", min=0, help="Seconds of ten times as much as it carries; 0 leaves it out.")
    ] = 0,
    soak: Annotated[
        float, typer.Option("--soak", min=0, help="Seconds at half of what it carries; 0 leaves it out.")
    ] = 0,
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure `lora-rt serve` beside `Runtime.generate` of the same rows: tokens per second, and how long one waits."""
    from lora_rt.core.benchmark import serving
    from lora_rt.core.benchmark.machine import machine, versions

    names = adapters.replace(",", " ").split()
    if len(names) < 2:
        raise UsageError("a request has two adapters", next_step="Name at least two: --adapters logic,emotion")
    asked = serving.wishes(requests, tokens, names)
    with session().runtime(base, precision, device) as runtime:
        serving.generated(runtime, asked[:2], 2)
        own = ["--base", base, "--precision", precision, "--device", device, "--max-rows", str(rows)]
        with serving.server(*own, "--max-queue", str(4 * rows)) as (url, process):
            serving.at_once(url, asked[:2], 2)
            document: dict[str, Any] = {
                "machine": machine(runtime.parts.base.device),
                "versions": versions(),
                "requests": requests,
                "tokens": tokens,
                "rows": rows,
            }
            err.print(f"generating {requests} answers in batches of {rows}, then by the server", style="dim")
            beside = [serving.generated(runtime, asked, rows)]
            found, seconds = serving.at_once(url, asked, rows)
            beside.append(serving.generated(runtime, asked, rows))
            carried = requests * tokens / seconds
            alone, seconds_alone = serving.at_once(url, asked[: max(2, requests // 8)], 1)
            whole = sum(beside) / len(beside)
            document |= {
                "generate_tokens_per_s": [round(value, 1) for value in beside],
                "served_tokens_per_s": round(carried, 1),
                "ratio_to_generate": round(carried / whole, 3),
                "one_at_a_time_tokens_per_s": round(len(alone) * tokens / seconds_alone, 1),
                "at_once": serving.summary(found),
            }
            capacity = requests / seconds
            for share in _SHARES:
                err.print(f"arrivals at {share:.0%} of what it carries", style="dim")
                document[f"at_{share:.0%}"] = serving.summary(serving.arriving(url, asked, capacity * share))
            for name, length, rate in (("overload", overload, 10 * capacity), ("soak", soak, capacity / 2)):
                if length:
                    err.print(f"{name}: {length:g} seconds", style="dim")
                    document[name] = _held(url, process, asked, rate, length)
    if as_json:
        print_json(document)
    else:
        _print(document)


def _held(url: str, process: psutil.Process, asked: Any, rate: float, length: float) -> dict[str, Any]:
    """How the server holds for so many seconds: what clients saw, and its memory (MiB) before and after."""
    from lora_rt.core.benchmark import serving

    before = process.memory_info().rss
    found = serving.arriving(url, asked, rate, length)
    time.sleep(1)
    after = process.memory_info().rss
    return serving.summary(found) | {"rss_mib": [before >> 20, after >> 20], "grown": round(after / before - 1, 4)}


def _print(document: dict[str, Any]) -> None:
    machine = document["machine"]
    out.print(f"{machine['cpu']}, {machine['threads']} threads; {document['requests']} x {document['tokens']} tokens")
    low, high = sorted(document["generate_tokens_per_s"])
    out.print(f"Runtime.generate, {document['rows']} rows in a batch   {low:g}-{high:g} tokens/s")
    ratio = document["ratio_to_generate"]
    served = f"{document['served_tokens_per_s']:g} tokens/s ({ratio:g})"
    out.print(f"the server, {document['rows']} clients at once        {served}")
    out.print(f"the server, one request at a time    {document['one_at_a_time_tokens_per_s']:g} tokens/s")
    table = Table("clients", "served", "refused", "failed", "first token, ms", "between, ms", "refusal, ms", box=None)
    for name in ("at_once", *(f"at_{share:.0%}" for share in _SHARES), "overload", "soak"):
        if (part := document.get(name)) is not None:
            waits = [_shown(part[key]) for key in ("first_ms", "between_ms", "refused_ms")]
            table.add_row(name, str(part["served"]), str(part["refused"]), str(part["failed"]), *waits)
    out.print(table)
    for name in ("overload", "soak"):
        if name in document:
            before, after = document[name]["rss_mib"]
            out.print(f"memory over {name}: {before} -> {after} MiB ({document[name]['grown']:+.1%})")


def _shown(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['p50']:g} / {spread['p99']:g}"
