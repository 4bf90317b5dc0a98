"""A server over a tiny float32 base, on a free port of the loopback, and what it serves."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.settings import ServeSettings
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from support.serving import Live, live
from support.tiny import Zoo, mode_host

ADMIN = "the operator's own"


class Fading:
    """Comes in over the first tokens of the answer, by position."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook of a module has no self
        answered = context.positions - (context.prompt_lengths[:, None] - 1)
        return Gate(ranks=(answered / 4).clamp(0, 1)[..., None])


class Raising:
    """Raises where the row's scene type is "raise", and is 1 elsewhere."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]
        import torch

        if "raise" in [kind for kind, active in zip(context.scene_types, context.active, strict=True) if active]:
            raise RuntimeError("this gate is broken")
        return Gate(ranks=torch.ones(1))


@pytest.fixture(scope="package")
def runtime(zoo: Zoo) -> Runtime:
    """Two plain adapters, one gated by position, and one whose gate can raise."""
    runtime = zoo.runtime_with(mode_host(fading=Fading, raising=Raising), "llama", max_position_embeddings=512)
    changes = {"max_position_embeddings": 512}
    plain = {"one": {"seed": 41}, "two": {"seed": 42, "r": 3, "targets": ["q_proj", "down_proj"]}, "huge": {"seed": 5}}
    for name, options in plain.items():
        runtime.load_adapter(str(zoo.adapter("llama", changes=changes, **options)), name=name)
    for name in ("fading", "raising"):
        runtime.load_adapter(str(zoo.adapter("llama", mode=name, changes=changes, seed=3)), name=name)
    return runtime


@pytest.fixture(scope="package")
def server(runtime: Runtime) -> Iterator[Live]:
    """The server that most tests ask."""
    with live(runtime, ServeSettings(port=0, admin_key=ADMIN)) as started:
        yield started


@pytest.fixture(scope="package")
def client(server: Live) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of that server."""
    with server.openai() as opened:
        yield opened
