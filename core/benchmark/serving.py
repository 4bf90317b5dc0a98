"""Clients of a server under load: what it carries, how long they wait, and how it holds.

The server is a process of its own; the clients are in this one, which holds no model while it times their waits, over
the loopback. Arrivals are a Poisson process. Every request has a composition of its own, of two adapters, and wants
exactly so many tokens. Times count from the moment when a request has been sent: what a client does before is its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import httpx2

from lora_rt.core.benchmark.workloads import text_of

if TYPE_CHECKING:
    from lora_rt.core.runtime import Runtime

_PROMPTS = ("rain, tin roof, unpaid bill", "frozen rope, harbour", "a spare key under the third stone", "last train")
_CHAT = "/v1/chat/completions"
_FILLING, _LONG = 200, 30  # prompts at most, and how often each repeats its words: some hundred tokens
_LEAVING = 10  # of so many requests to a server that has too many, one client goes away after its first token


@dataclass(frozen=True)
class Wish:
    """One request: a prompt, a composition as name -> weight, and exactly so many tokens."""

    prompt: str
    weights: Mapping[str, float]
    tokens: int

    def body(self, llama: Sequence[str] = ()) -> dict[str, Any]:
        """The JSON that is sent: to ours, or to llama.cpp's server that has these adapters."""
        message = {"role": "user", "content": self.prompt}
        settings = {"temperature": 0, "max_tokens": self.tokens, "stream": True}
        usual = {"messages": [message], **settings, "stream_options": {"include_usage": True}}
        if llama:
            scales = [{"id": place, "scale": self.weights.get(name, 0.0)} for place, name in enumerate(llama)]
            return usual | {"lora": scales, "ignore_eos": True}
        return usual | {"model": text_of(self.weights.items()), "min_tokens": self.tokens}


@dataclass
class Served:
    """What became of one request; seconds from its sending to its status, its first token, and between pieces.

    `tokens` are counted by the server; `left` is whether the client went away.
    """

    status: int = 0
    answered: float = 0.0
    first: float = 0.0
    between: list[float] = field(default_factory=list)
    tokens: int = 0
    left: bool = False


def wishes(count: int, tokens: int, names: Sequence[str]) -> list[Wish]:
    """Requests whose compositions all differ, of two adapters each."""
    dice = random.Random(0)
    pairs = list(combinations(names, 2))
    return [
        Wish(
            f"{_PROMPTS[n % len(_PROMPTS)]}, {n}",
            {name: round(dice.uniform(0.1, 0.9), 3) for name in pairs[n % len(pairs)]},
            tokens,
        )
        for n in range(count)
    ]


def generated(runtime: Runtime, asked: Sequence[Wish], at_once: int) -> float:
    """Tokens per second of `Runtime.generate`, so many rows in one batch."""
    began = time.perf_counter()
    for start in range(0, len(asked), at_once):
        part = asked[start : start + at_once]
        settings = {"max_new_tokens": part[0].tokens, "min_new_tokens": part[0].tokens}
        runtime.generate([wish.prompt for wish in part], [text_of(wish.weights.items()) for wish in part], **settings)
    return sum(wish.tokens for wish in asked) / (time.perf_counter() - began)


def at_once(url: str, bodies: Sequence[Mapping[str, Any]], many: int) -> tuple[list[Served], float]:
    """So many clients, each of which asks again as soon as it is answered; the seconds that all of it took."""

    async def run() -> tuple[list[Served], float]:
        async with _client(url, many) as client:
            began = time.perf_counter()
            found = await asyncio.gather(*(_ask(client, body) for body in bodies))
            return found, time.perf_counter() - began

    return asyncio.run(run())


def arriving(
    url: str, bodies: Sequence[Mapping[str, Any]], per_second: float, seconds: float | None = None
) -> list[Served]:
    """Requests that arrive by a Poisson process, whether the others are answered or not.

    Args:
        seconds: how long they go on arriving, the same ones over again, and of some the client goes away; once each
            where left out.
    """

    async def run() -> list[Served]:
        dice, tasks = random.Random(1), []
        async with _client(url) as client:
            end = None if seconds is None else time.perf_counter() + seconds
            number = 0
            while number < len(bodies) if end is None else time.perf_counter() < end:
                leaves = end is not None and number % _LEAVING == _LEAVING - 1
                tasks.append(asyncio.ensure_future(_ask(client, bodies[number % len(bodies)], leaves)))
                number += 1
                await asyncio.sleep(dice.expovariate(per_second))
            return await asyncio.gather(*tasks)

    return asyncio.run(run())


def fill(url: str, asked: Wish) -> None:
    """Let a server of ours keep as many prompts as it ever will: what is in memory then is what it needs."""
    kept = -1
    for number in range(_FILLING):
        prompt = f"{number} {asked.prompt} " * _LONG
        found, _ = at_once(url, [Wish(prompt, asked.weights, 2).body()], 1)
        before, kept = kept, _count(url, "lora_rt_prefix_bytes ")
        if found[0].status != 200 or kept <= before:
            return


def rows_of(url: str) -> int:
    """Rows that a server of ours has, running and waiting, by its own count."""
    return _count(url, "lora_rt_rows_waiting ", "lora_rt_rows_running ")


def _count(url: str, *named: str) -> int:
    """The sum of these numbers of its metrics."""
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(named)))


def summary(found: Sequence[Served], tokens: int) -> dict[str, Any]:
    """Milliseconds that clients waited, and how many were served whole, refused, went away and failed."""
    served = [one for one in found if one.status == 200 and one.tokens == tokens]
    refused = [one.answered for one in found if one.status == 429]
    left = sum(one.left for one in found)
    return {
        "served": len(served),
        "refused": len(refused),
        "left": left,
        "failed": len(found) - len(served) - len(refused) - left,
        "first_ms": _spread([one.first for one in served]),
        "between_ms": _spread([gap for one in served for gap in one.between]),
        "refused_ms": _spread(refused),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median and 99th percentile, ms."""
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49] * 1000, 1), "p99": round(cuts[98] * 1000, 1)}


def _client(url: str, at_once: int | None = None) -> httpx2.AsyncClient:
    """So many requests are under way at once, each with a connection; the others wait here, and it does not count."""
    limits = httpx2.Limits(max_connections=at_once, max_keepalive_connections=64)
    return httpx2.AsyncClient(base_url=url, timeout=httpx2.Timeout(600, pool=None), limits=limits)


async def _ask(client: httpx2.AsyncClient, body: Mapping[str, Any], leaves: bool = False) -> Served:
    found, last = Served(), time.perf_counter()

    async def trace(event: str, _facts: Mapping[str, Any]) -> None:
        nonlocal last
        if event == "http11.send_request_body.complete":
            last = time.perf_counter()

    try:
        async with client.stream("POST", _CHAT, json=body, extensions={"trace": trace}) as answer:
            sent, found.status = last, answer.status_code
            found.answered = time.perf_counter() - sent
            async for piece in _pieces(answer):
                if piece.get("usage"):
                    found.tokens = piece["usage"]["completion_tokens"]
                if not any(choice.get("delta", {}).get("content") for choice in piece["choices"]):
                    continue
                now = time.perf_counter()
                if found.first:
                    found.between.append(now - last)
                else:
                    found.first = now - sent
                last = now
                if leaves:
                    found.left = True
                    break
    except httpx2.HTTPError:
        found.status = 0
    return found


async def _pieces(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    if answer.status_code != 200:
        await answer.aread()
        return
    async for line in answer.aiter_lines():
        if line.startswith("data: {") and "choices" in (piece := json.loads(line[6:])):
            yield piece
