"""The operator's endpoints: which adapters are in memory. They have a key of their own, and are off without one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI

from lora_rt.core.serving.failures import RESPONSES
from lora_rt.core.serving.protocol import AdminRequest
from lora_rt.core.serving.service import Service
from lora_rt.core.serving.shelf import Shelved
from lora_rt.registry.reference import check_name, composed


def install(app: FastAPI, service: Service) -> None:
    """Add /admin to an application."""
    shelf = service.shelf
    actions: Mapping[str, Callable[[str], Any]] = {
        "load": shelf.load,
        "pin": lambda name: shelf.load(name, pin=True),
        "unpin": shelf.unpin,
        "reload": shelf.reload,
        "unload": shelf.unload,
    }

    @app.get("/admin/adapters", responses=RESPONSES)
    async def adapters() -> dict[str, Any]:
        """The adapters in memory, and who uses them."""
        return {"adapters": [_told(item) for item in shelf.items()]}

    @app.post("/admin/adapters", responses=RESPONSES)
    async def change(asked: AdminRequest) -> dict[str, Any]:
        """Load, reload, pin, unpin or unload an adapter by its name in the store.

        Rows that are running keep the adapter that they began with.
        """
        name = composed(asked.name)
        check_name(name)
        await asyncio.wrap_future(service.beside(lambda: actions[asked.action](name)))
        return {"adapters": [_told(item) for item in shelf.items()]}


def _told(item: Shelved) -> dict[str, Any]:
    info = item.info
    return {
        "name": info.name,
        "mode": info.mode,
        "rank": info.rank,
        "source": info.source,
        "sha256": info.sha256,
        "bytes": item.nbytes,
        "rows": item.rows,
        "pinned": item.pinned,
    }
