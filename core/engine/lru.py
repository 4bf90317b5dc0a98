"""An LRU cache bounded by bytes: what was laid out for a set of adapters, kept for the next plan over that set."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Entry:
    value: Any
    owners: frozenset[Any]
    size: int


class LRUCache:
    """LRU cache bounded by bytes. Each entry belongs to some owners, and is dropped with any of them."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self,
        key: Hashable,
        owners: frozenset[Any],
        build: Callable[[], tuple[T, int]],
        room: int,
        valid: Callable[[], bool],
    ) -> T:
        """The entry of a key, built where there is none.

        Args:
            key: what the entry depends on.
            owners: with which of them it is dropped.
            build: makes the value and says its size in bytes.
            room: bytes that all entries together may take; the newest stays whatever its size.
            valid: asked after building, under the lock: whether the owners are still there and the entry may stay.
        """
        with self._lock:
            if (entry := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
                found: T = entry.value
                return found
        value, size = build()
        with self._lock:
            if valid():
                self._entries[key] = _Entry(value, owners, size)
            while len(self._entries) > 1 and sum(entry.size for entry in self._entries.values()) > room:
                self._entries.popitem(last=False)
        return value

    def drop(self, owner: Any) -> None:
        """Forget what belongs to an owner."""
        with self._lock:
            for key in [key for key, entry in self._entries.items() if owner in entry.owners]:
                del self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)
