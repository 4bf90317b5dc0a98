"""Replicas of `lora-rt serve` behind Ray Serve; a request goes to one that has its adapters in memory.

    serve run app:app                                            # two replicas, the default base
    BASE=Qwen/Qwen2.5-7B-Instruct REPLICAS=8 GPUS=1 serve run app:app

Each replica is the whole server in a process of its own, on loopback, with its own scheduler and batch: gates, waking
texts and everything else work as on one machine. What is forwarded is OpenAI's API, streams included.
"""

# No `from __future__ import annotations`: FastAPI could not read the types of a class that Ray has sent elsewhere.
import asyncio
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica
from routing import adapters_of, choose

BASE = os.environ.get("BASE", "default")
PRECISION = os.environ.get("PRECISION", "int4")
REPLICAS = int(os.environ.get("REPLICAS", "2"))
GPUS = float(os.environ.get("GPUS", "0"))
ROWS = int(os.environ.get("ROWS", "16"))
SECONDS = 1.0  # between two reports of what a replica has in memory

api = FastAPI(title="lora-rt on Ray")


class ByAdapters(FIFOMixin, RequestRouter):
    """Sends a request to a replica that has its adapters, unless that one has too much to do."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one replica; Ray asks again where it refuses."""
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        if not by_id:
            return []
        asked = pending_request.args[0] if pending_request is not None and pending_request.args else ""
        stats = {key: replica.routing_stats or {} for key, replica in by_id.items()}
        residents = {key: told.get("adapters", ()) for key, told in stats.items()}
        known = {key: self.replica_queue_len_cache.get(key) for key in by_id}
        load = {key: known[key] if known[key] is not None else stats[key].get("busy", 0) for key in by_id}
        return [[by_id[choose(adapters_of(asked), residents, load, room=ROWS)]]]


@serve.deployment(
    num_replicas=REPLICAS,
    user_config={},
    max_ongoing_requests=4 * ROWS,
    ray_actor_options={"num_cpus": 0.5, "num_gpus": GPUS},
    request_router_config=RequestRouterConfig(
        request_router_class=ByAdapters, request_routing_stats_period_s=SECONDS, request_routing_stats_timeout_s=5.0
    ),
)
class Replica:
    """One `lora-rt serve`, started and ended with this actor."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        key = secrets.token_urlsafe(16)
        words = ["serve", "--port", port, "--base", BASE, "--precision", PRECISION, "--max-rows", ROWS]
        environment = os.environ | {"LORA_RT_ADMIN_KEY": key}
        command = [sys.executable, "-m", "lora_rt", *map(str, words)]
        self.process = subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent)
        self.address = f"http://127.0.0.1:{port}"
        self.session: aiohttp.ClientSession | None = None
        self.admin = {"Authorization": f"Bearer {key}"}

    async def ask(self, model: str, path: str, body: bytes) -> AsyncIterator[Any]:
        """Status of the answer and name of this replica, then the pieces. `model` is what the router looks at."""
        async with self.client().post(path, data=body, headers={"content-type": "application/json"}) as answer:
            yield answer.status, serve.get_replica_context().replica_id.unique_id
            async for piece in answer.content.iter_any():
                yield piece

    def client(self) -> aiohttp.ClientSession:
        """A client of the server; made where a loop runs."""
        if self.session is None:
            self.session = aiohttp.ClientSession(self.address, timeout=aiohttp.ClientTimeout(total=None))
        return self.session

    async def record_routing_stats(self) -> dict[str, Any]:
        """What the router knows of this replica: the adapters in memory, and the rows over them."""
        try:
            async with self.client().get("/admin/adapters", headers=self.admin) as answer:
                told = (await answer.json())["adapters"]
        except (aiohttp.ClientError, KeyError):  # it is still loading its base
            return {}
        return {"adapters": [item["name"] for item in told], "busy": sum(item["rows"] for item in told)}

    async def reconfigure(self, _config: Any) -> None:
        """Ray sends requests when this has ended: once the base is loaded."""
        while self.process.poll() is None:
            try:
                async with self.client().get("/ready") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.5)

    async def check_health(self) -> None:
        """Raises where the server has ended; Ray then starts another replica."""
        if (code := self.process.poll()) is not None:
            raise RuntimeError(f"lora-rt serve has ended with {code}")

    def __del__(self) -> None:
        self.process.terminate()  # it lets running answers end


def _end_with_parent() -> None:
    """In the child: a SIGTERM when the actor is gone, however it went (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(api)
class Front:
    """OpenAI's API. Put a proxy with TLS and keys before it."""

    def __init__(self, replicas: Any) -> None:
        self.replicas = replicas

    @api.post("/v1/{path:path}")
    async def ask(self, path: str, request: Request) -> StreamingResponse:
        """Forward to a replica, and its answer piece by piece."""
        body = await request.body()
        try:
            model = (await request.json()).get("model", "")
        except (ValueError, AttributeError):  # the replica says what is wrong with it
            model = ""
        pieces = self.replicas.options(stream=True).ask.remote(str(model), f"/v1/{path}", body)
        status, replica = await anext(pieces)
        streamed = b'"stream": true' in body or b'"stream":true' in body
        kind = "text/event-stream" if streamed else "application/json"
        return StreamingResponse(pieces, status, {"x-replica": replica}, kind)


app = Front.bind(Replica.bind())
