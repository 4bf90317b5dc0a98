"""What is touched of huggingface_hub that it does not promise to keep. Nothing else of lora-rt reaches into it.

`tests/registry/test_hub_internals.py` says which of these facts broke:

- all requests go through one client of the process, `utils._http._GLOBAL_CLIENT`, which `_GLOBAL_CLIENT_FACTORY` makes
  under `_CLIENT_LOCK`; there is no public way to read either, or to give one call a client of its own;
- retries are logged as warnings by the loggers in `LOGGERS`;
- before its first request the client asks for `HARNESSES`, to say in its headers which agent runs it, and goes on
  without an answer;
- its cache has an empty file `.no_exist/<commit>/<path>` for what a repository does not have at a commit, which
  `try_to_load_from_cache` reads, and `trees/<commit>.json` with all that it has, where a whole one was downloaded.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from lora_rt.registry import strict_json
from lora_rt.registry.hub import library

Factory: TypeAlias = "Callable[[], library.httpx2.Client]"

HARNESSES = "/api/agent-harnesses"
LOGGERS = ("huggingface_hub.utils._http", "huggingface_hub.file_download", "huggingface_hub._commit_api")


class NoClientError(Exception):
    """A client could not even be made; the cause says why."""


class _OwnClient:
    """Our client in the place of the application's while a call of ours runs; theirs is neither closed nor changed.

    The client is kept from one call to the next with its connections, as long as the application's factory stays.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._theirs: tuple[Factory, library.httpx2.Client | None] | None = None
        self._kept: tuple[Factory, library.httpx2.Client] | None = None

    @property
    def in_use(self) -> bool:
        """Whether a call of ours runs in any thread."""
        return self._users > 0

    def take(self, prepare: Callable[[library.httpx2.Client], None]) -> None:
        _http = library.utils._http
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            for name in LOGGERS:
                logging.getLogger(name).addFilter(_not_ours)
            with _http._CLIENT_LOCK:
                factory = _http._GLOBAL_CLIENT_FACTORY
                self._theirs = (factory, _http._GLOBAL_CLIENT)
                kept = self._kept if self._kept and self._kept[0] is factory and not self._kept[1].is_closed else None
                if kept is None:
                    self.close()  # it was made for another factory
                _http._GLOBAL_CLIENT_FACTORY = functools.partial(_made, factory, prepare)
                _http._GLOBAL_CLIENT = kept[1] if kept else None

    def give_back(self) -> None:
        _http = library.utils._http
        with self._lock:
            self._users -= 1
            if self._users or self._theirs is None:
                return
            with _http._CLIENT_LOCK:
                factory, client = self._theirs
                self._theirs = None
                if getattr(_http._GLOBAL_CLIENT_FACTORY, "func", None) is not _made:
                    # The application chose another factory meanwhile: that stands, and closes what was before it.
                    if client is not None:
                        client.close()
                    return
                self._kept = (factory, _http._GLOBAL_CLIENT) if _http._GLOBAL_CLIENT is not None else None
                _http._GLOBAL_CLIENT_FACTORY, _http._GLOBAL_CLIENT = factory, client

    def close(self) -> None:
        """Close what is kept: at the end of the process, and in a fork, whose connections are its parent's."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[1].close()


def _made(factory: Factory, prepare: Callable[[library.httpx2.Client], None]) -> library.httpx2.Client:
    try:
        client = factory()
    except Exception as error:  # whatever httpx2 raises of proxies and certificates
        raise NoClientError(str(error)) from error
    prepare(client)
    return client


def _not_ours(record: logging.LogRecord) -> bool:
    """Keep the client's talk of retries back while a call of ours runs; what came of them is ours to say."""
    return record.levelno >= logging.ERROR or not _OWN.in_use


_OWN = _OwnClient()
atexit.register(_OWN.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_OWN.close)


@contextmanager
def own_client(prepare: Callable[[library.httpx2.Client], None]) -> Iterator[None]:
    """Let huggingface_hub use a client of ours within the block: one of the application's making, then prepared.

    What the application's other threads ask of the Hub meanwhile goes through it too, and gets its answers. May be
    nested, and entered by several threads at once.
    """
    _OWN.take(prepare)
    try:
        yield
    finally:
        _OWN.give_back()


def _cache_of(repo: str) -> Path:
    return Path(library.constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")


def mark_absent(repo: str, path: str, commit: str) -> None:
    """Note in the client's cache that a repository does not have a file at a commit, as the client does."""
    mark = _cache_of(repo) / ".no_exist" / commit / path
    with suppress(OSError):  # a cache that can't be written costs a message offline
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def read_listing(repo: str, commit: str) -> frozenset[str] | None:
    """The paths that a repository has at a commit, or None where the client's cache does not know them."""
    try:
        document = strict_json.loads((_cache_of(repo) / "trees" / f"{commit}.json").read_bytes())
    except (OSError, strict_json.InvalidJsonError):
        return None
    paths = document.get("files") if isinstance(document, dict) else None
    return frozenset(paths) if isinstance(paths, dict) else None
