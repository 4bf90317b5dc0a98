"""Under load, every answer is the one that is given alone."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import httpx2
import openai

from lora_rt.core.runtime import Runtime
from support.serving import Live, asked

REQUESTS, AT_ONCE = int(os.environ.get("SERVE_REQUESTS", "300")), int(os.environ.get("SERVE_AT_ONCE", "16"))
ADMIN = "the operator's own"
PROMPTS = (
    "rain, tin roof",
    "a",
    "two and two. So: four",
    "the unpaid bill on the table and a late bus " * 3,
    "so it is",
)
BROKEN: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"model": "one"}',
    b'{"model": "one", "messages": []}',
    b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "one[\\ud800]", "messages": [{"role": "user", "content": "a"}]}',
    b'{"model": "one", "messages": [{"role": "user", "content": 3}], "temperature": NaN}',
    b"\xff\xfe",
    b"[" * 5000,
)


def spec_of(dice: random.Random) -> str:
    names = dice.sample(["one", "two", "fading", "huge"], 2)
    terms = [f"{name}:{dice.uniform(-1.5, 1.5):.3f}" for name in names]
    kind = dice.randrange(4)
    if kind == 0:
        return "base"
    if kind == 1:
        terms[0] += dice.choice(["[So:]", "[ ]", "[e]"])
    return " ".join(terms[: dice.choice([1, 2, 2])])


def wish_of(dice: random.Random) -> dict[str, Any]:
    kinds: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 1.1, "top_p": 0.9}, {"temperature": 0.8})
    settings = {"seed": dice.randrange(99), "max_tokens": dice.randrange(1, 12), "n": dice.choice([1, 1, 2])}
    return asked(dice.choice(PROMPTS), model=spec_of(dice), **(settings | dice.choice(kinds)))


def alone(runtime: Runtime, wish: dict[str, Any]) -> list[str]:
    spec = None if wish["model"] == "base" else wish["model"]
    settings = {key: wish[key] for key in ("temperature", "top_p") if key in wish}
    return [
        runtime.generate(
            [wish["messages"][0]["content"]],
            [spec],
            max_new_tokens=wish["max_tokens"],
            seed=wish["seed"] + number,
            **settings,
        )[0]
        for number in range(wish["n"])
    ]


def test_every_answer_under_load_equals_the_one_given_alone(server: Live, runtime: Runtime) -> None:
    """Among cancelled streams and bodies that are none; gated, waking and plain compositions, and the base."""
    dice = random.Random(7)
    wishes = [wish_of(dice) for _ in range(REQUESTS)]
    found: dict[int, list[str]] = {}

    async def ask(client: openai.AsyncOpenAI, plain: httpx2.AsyncClient, gate: asyncio.Semaphore, number: int) -> None:
        async with gate:
            if number % 10 == 3:
                body = BROKEN[number // 10 % len(BROKEN)]
                kind = {"Content-Type": "application/json"}
                answer = await plain.post("/v1/chat/completions", content=body, headers=kind)
                assert answer.status_code == 400, answer.text
                assert answer.json()["error"]["message"]
            elif number % 10 == 6:
                async with await client.chat.completions.create(**wishes[number], stream=True) as stream:
                    async for _ in stream:
                        break
            else:
                answered = await client.chat.completions.create(**wishes[number])
                found[number] = [choice.message.content or "" for choice in answered.choices]

    async def move_adapters(plain: httpx2.AsyncClient) -> None:
        """Adapters come and go meanwhile; a request that began with one keeps it."""
        for number in range(30):
            action = ("unload", "load", "reload")[number % 3]
            told = await plain.post(
                "/admin/adapters",
                json={"name": "two" if number % 2 else "one", "action": action},
                headers={"Authorization": f"Bearer {ADMIN}"},
            )
            assert told.status_code in (200, 400), told.text  # 400: it was not there to be unloaded
            await asyncio.sleep(0.05)

    async def ask_all() -> None:
        gate = asyncio.Semaphore(AT_ONCE)
        async with server.async_openai() as client, httpx2.AsyncClient(base_url=server.url, timeout=60) as plain:
            asking = (ask(client, plain, gate, number) for number in range(REQUESTS))
            await asyncio.gather(move_adapters(plain), *asking)

    asyncio.run(ask_all())
    assert len(found) == REQUESTS * 8 // 10
    wrong = {number: wishes[number] for number, texts in found.items() if texts != alone(runtime, wishes[number])}
    assert wrong == {}
    assert server.idle()
