"""A server under load: what it carries beside `Runtime.generate` of the same rows, how long clients wait, how it holds.

The server is a process of its own (`lora-rt serve`); the clients are in this one, over the loopback. Arrivals are a
Poisson process. Every request has a composition of its own, of two adapters.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import httpx2
import psutil

from lora_rt.core.runtime import Runtime

_PROMPTS = ("rain, tin roof, unpaid bill", "frozen rope, harbour", "a spare key under the third stone", "last train")
_CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Wish:
    """One request: a prompt, a composition, and exactly so many tokens."""

    prompt: str
    spec: str
    tokens: int

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        message = {"role": "user", "content": self.prompt}
        limits = {"temperature": 0, "max_tokens": self.tokens, "min_tokens": self.tokens, "stream": True}
        return {"model": self.spec, "messages": [message], **limits}


@dataclass
class Served:
    """What became of one request: its status, seconds to its first token, between tokens, and in all."""

    status: int = 0
    first: float = 0.0
    between: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


def wishes(count: int, tokens: int, names: Sequence[str]) -> list[Wish]:
    """Requests whose compositions all differ, of two adapters each."""
    dice = random.Random(0)
    pairs = list(combinations(names, 2))
    return [
        Wish(
            f"{_PROMPTS[n % len(_PROMPTS)]}, {n}",
            " ".join(f"{name}:{dice.uniform(0.1, 0.9):.3f}" for name in pairs[n % len(pairs)]),
            tokens,
        )
        for n in range(count)
    ]


@contextmanager
def server(*options: str) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a new server, and its process."""
    command = [sys.executable, "-m", "lora_rt", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    assert process.stderr is not None
    try:
        text = ""
        while (found := re.search(r"http://127\.0\.0\.1:\d+(?=/v1)", text)) is None:
            line = process.stderr.readline()
            if not line:
                raise RuntimeError(f"the server did not start: {text}")
            text += line
        reader = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield found[0], psutil.Process(process.pid)
        process.terminate()
        process.wait()
        reader.wait()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def generated(runtime: Runtime, asked: Sequence[Wish], at_once: int) -> float:
    """Tokens per second of `Runtime.generate`, so many rows in one batch."""
    began = time.perf_counter()
    for start in range(0, len(asked), at_once):
        part = asked[start : start + at_once]
        settings = {"max_new_tokens": part[0].tokens, "min_new_tokens": part[0].tokens}
        runtime.generate([wish.prompt for wish in part], [wish.spec for wish in part], **settings)
    return sum(wish.tokens for wish in asked) / (time.perf_counter() - began)


def at_once(url: str, asked: Sequence[Wish], many: int) -> tuple[list[Served], float]:
    """So many clients, each of which asks again as soon as it is answered; the seconds that all of it took."""

    async def run() -> tuple[list[Served], float]:
        gate = asyncio.Semaphore(many)
        async with _client(url) as client:

            async def one(wish: Wish) -> Served:
                async with gate:
                    return await _ask(client, wish)

            began = time.perf_counter()
            found = await asyncio.gather(*(one(wish) for wish in asked))
            return list(found), time.perf_counter() - began

    return asyncio.run(run())


def arriving(url: str, asked: Sequence[Wish], per_second: float, seconds: float | None = None) -> list[Served]:
    """Requests that arrive by a Poisson process, whether the others are answered or not.

    Args:
        seconds: how long they go on arriving, the same ones over again; once each where left out.
    """

    async def run() -> list[Served]:
        dice, tasks = random.Random(1), []
        async with _client(url) as client:
            end = None if seconds is None else time.perf_counter() + seconds
            number = 0
            while number < len(asked) if end is None else time.perf_counter() < end:
                tasks.append(asyncio.ensure_future(_ask(client, asked[number % len(asked)])))
                number += 1
                await asyncio.sleep(dice.expovariate(per_second))
            return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def summary(found: Sequence[Served]) -> dict[str, Any]:
    """Milliseconds that clients waited, and how many were served, refused and failed."""
    served = [one for one in found if one.status == 200 and one.tokens]
    refused = [one.seconds for one in found if one.status == 429]
    return {
        "served": len(served),
        "refused": len(refused),
        "failed": len(found) - len(served) - len(refused),
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


def _client(url: str) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx2.AsyncClient(base_url=url, timeout=600, limits=limits)


async def _ask(client: httpx2.AsyncClient, wish: Wish) -> Served:
    found, began = Served(), time.perf_counter()
    last = began
    try:
        async with client.stream("POST", _CHAT, json=wish.body()) as answer:
            found.status = answer.status_code
            async for piece in _pieces(answer):
                if not piece["choices"][0].get("delta", {}).get("content"):
                    continue
                now = time.perf_counter()
                if found.tokens:
                    found.between.append(now - last)
                else:
                    found.first = now - began
                last, found.tokens = now, found.tokens + 1
    except httpx2.HTTPError:
        found.status = 0
    found.seconds = time.perf_counter() - began
    return found


async def _pieces(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    if answer.status_code != 200:
        await answer.aread()
        return
    async for line in answer.aiter_lines():
        if line.startswith('data: {"id"'):
            yield json.loads(line[6:])
