"""What adapters the Hub has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lora_rt.errors import UsageError
from lora_rt.registry.bases import DEFAULT_ID
from lora_rt.registry.hub.client import api, explained
from lora_rt.registry.hub.model_card import TAG
from lora_rt.registry.reference import is_hub_id

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

    Raises:
        UsageError: `base` is not of the form org/repo.
        HubError: no network, or an answer that can't be read.
    """
    if base is not None and not is_hub_id(base := DEFAULT_ID if base == "default" else base):
        raise UsageError(f"{base[:120]!r} is not a base model on the Hub", next_step="Write org/repo, or default")
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
