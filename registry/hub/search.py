"""What adapters the Hub has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_rt.registry.hub.client import api, explained
from lora_rt.registry.hub.model_card import TAG

LIMIT = 50


@dataclass(frozen=True, slots=True)
class Found:
    """A repository that may hold an adapter. `register` and `mode` are known where lora-rt pushed it."""

    repo: str
    register: str
    mode: str
    base: str
    downloads: int
    private: bool


def search(word: str = "", *, base: str | None = None, every: bool = False) -> list[Found]:
    """Repositories whose name holds a word, most downloaded first.

    Args:
        word: part of a name; all where empty.
        base: only adapters of this base, by its hub id.
        every: any PEFT adapter, not only those that lora-rt pushed.
    """
    tags = ["peft"] if every else [TAG]
    if base:
        tags.append(f"base_model:{base}")
    with explained("the list of models"):
        hits = list(api().list_models(search=word or None, filter=tags, limit=LIMIT))
    found = [
        Found(
            repo=hit.id,
            register=_tagged(hit.tags, "register:"),
            mode=_tagged(hit.tags, "mode:"),
            base=_tagged(hit.tags, "base_model:adapter:") or _tagged(hit.tags, "base_model:"),
            downloads=hit.downloads or 0,
            private=bool(hit.private),
        )
        for hit in hits
    ]
    return sorted(found, key=lambda item: (-item.downloads, item.repo))


def _tagged(tags: Iterable[str] | None, prefix: str) -> str:
    return next((tag[len(prefix) :] for tag in tags or () if tag.startswith(prefix)), "")
