"""A real server in this process, and real clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx2
import uvicorn
from fastapi import FastAPI

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.api import make_app
from lora_rt.core.serving.server import configured, listen
from lora_rt.core.serving.service import Service
from lora_rt.core.serving.settings import ServeSettings
from lora_rt.plugins.contract import Gate, GateContext, hookimpl

if TYPE_CHECKING:
    import openai

ADMIN = "the operator's own"
CHANGES = {"max_position_embeddings": 512}


class Fading:
    """Comes in over the first tokens of the answer, by position."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook of a module has no self
        answered = context.positions - (context.prompt_lengths[:, None] - 1)
        return Gate(ranks=(answered / 4).clamp(0, 1)[..., None])


class Raising:
    """Is 1; raises where the scene type is "raise", and at the third token of the answer where it is "raise later"."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]
        import torch

        answered = (context.positions - context.prompt_lengths[:, None]).amax(-1).tolist()
        for kind, active, said in zip(context.scene_types, context.active, answered, strict=True):
            if active and (kind == "raise" or (kind == "raise later" and said >= 2)):
                raise RuntimeError("this gate is broken")
        return Gate(ranks=torch.ones(1))


@dataclass(frozen=True)
class Live:
    """A running server."""

    service: Service
    url: str
    app: Any

    def openai(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's own client, without retries."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def async_openai(self, timeout: float = 60) -> openai.AsyncOpenAI:
        """The same, asynchronous."""
        import openai

        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=timeout)

    def idle(self) -> bool:
        """Whether nothing is left of any request; waits for those whose clients have just gone."""
        while self.service.busy:
            time.sleep(0.002)
        return self.service.scheduler.idle

    def http(self, key: str = "") -> httpx2.Client:
        """A plain client."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60)


@contextmanager
def live(
    runtime: Runtime, settings: ServeSettings, extend: Callable[[FastAPI, Service], None] | None = None
) -> Iterator[Live]:
    """A server on a free port, until the block ends. `extend` adds to the application before it starts."""
    service = Service(runtime, settings)
    app = make_app(service)
    if extend is not None:
        extend(app, service)
    service.start()
    bound = listen(settings)
    bound.listen()  # a client that comes before the server's loop runs waits for it
    server = uvicorn.Server(configured(app, 2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    try:
        yield Live(service, f"http://127.0.0.1:{bound.getsockname()[1]}", app)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
        service.close()


def asked(content: str = "rain, tin roof", **settings: Any) -> dict[str, Any]:
    """The body of a chat request."""
    greedy = {"model": "base", "temperature": 0, "max_tokens": 12}
    return {"messages": [{"role": "user", "content": content}], **greedy, **settings}
