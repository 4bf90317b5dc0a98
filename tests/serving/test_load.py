"""Under load, every answer is the one that is given alone: two of eight adapters, gated, waking and plain ones.

A hundred requests are part of the suite, of every kind; `make load` asks 10,000, and 300 of the default base at int4.
SERVE_REQUESTS, SERVE_AT_ONCE, SERVE_BASE (a folder) and SERVE_PRECISION say otherwise.

In fewer bits than float32 a batch of another shape rounds otherwise, so there every row gets passes of its own.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx2
import openai
import pytest

from lora_rt.core.base.load import load_base
from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.settings import Limits, ServeSettings
from lora_rt.registry.card import AdapterCard, write_card
from lora_rt.registry.registry import Registry
from support.serving import ADMIN, CHANGES, Fading, Live, Raising, asked, live
from support.tiny import Zoo, mode_host, save_adapter

pytestmark = pytest.mark.slow

REQUESTS, AT_ONCE = int(os.environ.get("SERVE_REQUESTS", "100")), int(os.environ.get("SERVE_AT_ONCE", "16"))
BASE, PRECISION = os.environ.get("SERVE_BASE", ""), os.environ.get("SERVE_PRECISION", "float32")
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "one": {"targets": ATTENTION},
    "two": {"r": 3, "targets": ["q_proj", "down_proj"]},
    "three": {"r": 4, "lora_alpha": 4, "targets": MLP},
    "four": {"r": 2, "targets": [*ATTENTION, *MLP]},
    "five": {"r": 16, "use_rslora": True, "targets": ["v_proj"]},
    "six": {"r": 1, "targets": ATTENTION},
    "fading": {"targets": ATTENTION, "mode": "fading"},
    "raising": {"r": 4, "targets": MLP, "mode": "raising"},
}
PROMPTS: tuple[Any, ...] = (
    "rain, tin roof",
    "a",
    "two and two. So: four",
    "the unpaid bill on the table and a late bus " * 3,
    "so it is",
    (("user", "the unpaid bill on the table and a late bus"), ("assistant", "So: it is. " * 4), ("user", "and then?")),
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


@pytest.fixture(scope="module")
def many(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """A runtime whose project has eight adapters, two of them gated."""
    folder = tmp_path_factory.mktemp("many")
    base = load_base(BASE or str(zoo.base("llama", **CHANGES)), PRECISION, "cpu")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        mode = options.get("mode")
        plain = {key: value for key, value in options.items() if key != "mode"}
        if BASE:
            save_adapter(folder / name, base.model.config, seed=seed, **plain)
            if mode:
                write_card(folder / name, AdapterCard(register=mode, mode=mode, base=base.identity))
        else:
            shutil.copytree(zoo.adapter("llama", mode=mode, changes=CHANGES, seed=seed, **plain), folder / name)
    lines = [f'{name} = "./{name}"' for name in ADAPTERS]
    (folder / "lora-rt.toml").write_text("[adapters]\n" + "\n".join(lines) + "\n")
    return Runtime(base, mode_host(fading=Fading, raising=Raising), Registry(project=folder))


@pytest.fixture(scope="module")
def crowded(many: Runtime) -> Iterator[Live]:
    """A server that keeps no more than about three adapters that nobody uses."""
    for name in ADAPTERS:
        many.ensure(name)
    sizes = [resident.nbytes for resident in many.parts.bank.residents.values()]
    limits = Limits(adapter_bytes=sum(sizes) * 3 // len(sizes))
    settings = ServeSettings(port=0, admin_key=ADMIN, limits=limits, deterministic=PRECISION != "float32")
    with live(many, settings) as started:
        yield started


def spec_of(dice: random.Random) -> str:
    names = dice.sample(list(ADAPTERS), 2)
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
    prompt = dice.choice(PROMPTS)
    said = [("user", prompt)] if isinstance(prompt, str) else prompt
    messages = [{"role": role, "content": content} for role, content in said]
    return asked(model=spec_of(dice), messages=messages, **(settings | dice.choice(kinds)))


def alone(runtime: Runtime, wish: dict[str, Any]) -> list[str]:
    spec = None if wish["model"] == "base" else wish["model"]
    settings = {key: wish[key] for key in ("temperature", "top_p") if key in wish}
    return [
        runtime.generate(
            [wish["messages"]],
            [spec],
            max_new_tokens=wish["max_tokens"],
            seed=wish["seed"] + number,
            **settings,
        )[0]
        for number in range(wish["n"])
    ]


async def streamed(client: openai.AsyncOpenAI, wish: dict[str, Any], pieces: int | None = None) -> list[str]:
    """The texts of a stream, of which no more than so many pieces are awaited."""
    texts = [""] * wish["n"]
    async with await client.chat.completions.create(**wish, stream=True) as stream:
        async for piece in stream:
            for choice in piece.choices:
                texts[choice.index] += choice.delta.content or ""
            if pieces is not None and (pieces := pieces - 1) <= 0:
                break
    return texts


async def ask(client: openai.AsyncOpenAI, plain: httpx2.AsyncClient, number: int, wish: dict[str, Any]) -> Any:
    """The texts of an answer; None of a request that is meant to fail, or whose client goes away."""
    match number % 10:
        case 1 | 2:
            return await streamed(client, wish)
        case 3:
            body, kind = BROKEN[number // 10 % len(BROKEN)], {"Content-Type": "application/json"}
            answer = await plain.post("/v1/chat/completions", content=body, headers=kind)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["message"]
        case 6:
            await streamed(client, wish, number // 10 % 4 + 1)
        case 8 if number % 20 == 8:
            with suppress(TimeoutError):
                await asyncio.wait_for(client.chat.completions.create(**wish), number // 20 % 8 / 50)
        case 8 if number % 60 == 18:
            failing = wish | {"model": "raising one:0.3", "extra_body": {"scene": "raise"}}
            with pytest.raises(openai.InternalServerError, match="RuntimeError"):
                await client.chat.completions.create(**failing)
        case _:
            answered = await client.chat.completions.create(**wish)
            return [choice.message.content or "" for choice in answered.choices]
    return None


async def move_adapters(plain: httpx2.AsyncClient, done: asyncio.Event) -> int:
    """Adapters come and go meanwhile; a request that began with one keeps it."""
    dice, moves = random.Random(11), 0
    while not done.is_set():
        asking = {"name": dice.choice(list(ADAPTERS)), "action": dice.choice(("unload", "load", "reload"))}
        told = await plain.post("/admin/adapters", json=asking, headers={"Authorization": f"Bearer {ADMIN}"})
        assert told.status_code in (200, 400, 404), told.text  # it may not be there to be unloaded
        moves += told.status_code == 200
        await asyncio.sleep(0.05)
    return moves


async def ask_all(server: Live, wishes: list[dict[str, Any]]) -> dict[int, list[str]]:
    """The answers by the number of the request."""
    gate, done, found = asyncio.Semaphore(AT_ONCE), asyncio.Event(), {}
    async with server.async_openai(600) as client, httpx2.AsyncClient(base_url=server.url, timeout=600) as plain:

        async def one(number: int) -> None:
            async with gate:
                texts = await ask(client, plain, number, wishes[number])
            if texts is not None:
                found[number] = texts

        moving = asyncio.ensure_future(move_adapters(plain, done))
        try:
            await asyncio.gather(*(one(number) for number in range(len(wishes))))
        finally:
            done.set()
            assert await moving > 0
    return found


def test_every_answer_under_load_equals_the_one_given_alone(crowded: Live, many: Runtime) -> None:
    """Among cancelled streams, clients that go away, gates that raise and bodies that are none."""
    dice = random.Random(7)
    wishes = [wish_of(dice) for _ in range(REQUESTS)]
    found = asyncio.run(ask_all(crowded, wishes))
    assert crowded.idle()
    assert len(found) >= REQUESTS * 7 // 10
    wrong = {number: wishes[number] for number, texts in found.items() if texts != alone(many, wishes[number])}
    print(f"{REQUESTS} requests, {AT_ONCE} at once: {len(found)} answers compared, {len(wrong)} differ")
    assert wrong == {}
