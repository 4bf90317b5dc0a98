"""Keys and values of prompts that begin alike: a chat's second turn reads only what is new.

A token's keys and values depend on the tokens up to it and on what they were read under. So what is kept is a list of
(token, what it was under), and a row may use as much of one as agrees with its own list from the first token on:

    kept     (I, base) (say, base) (So:, logic) ...          a row of `logic[So:]`
    a row    (I, base) (say, base) (Now, base)               the base alone: two tokens need not be read

What a token is under is told by the adapters themselves (the objects in memory: a reloaded one is another), their
weights and weights by layer, the named composition whose mode weights them, and, where a mode may gate them, also by
scene type, prompt and the prompt's length.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.forward import caches
from lora_rt.core.requests.rows import Row
from lora_rt.core.requests.running import RequestRow
from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.metrics import Meter
from lora_rt.core.serving.ticket import Ticket
from lora_rt.plugins.contract.facts import AdapterView

_LEAST = 64  # tokens; for fewer it does not pay to read a row by itself
_MOST = 512  # entries, each of which is compared with a newcomer
_NUMBERS = 4096  # different things that tokens were under


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """`marks` (tokens, 2): tokens, and the numbers of what they were under. `cache` holds as many columns."""

    marks: Tensor
    cache: Any
    nbytes: int


class PrefixCache:
    """The most recently used prompts. Belongs to the model's thread.

    Args:
        room: bytes; 0 keeps nothing. Nor is anything kept for a model whose keys depend on a row's length, or that
            keeps no keys and values per token (sliding windows, states).
    """

    def __init__(self, runtime: Runtime, meter: Meter, room: int) -> None:
        self._runtime = runtime
        self._meter = meter
        self._room = room
        self._entries: OrderedDict[int, _Kept] = OrderedDict()
        self._names = count()
        self._adapters: WeakKeyDictionary[ResidentAdapter, int] = WeakKeyDictionary()
        self._numbers: dict[Hashable, int] = {}
        self._static: WeakKeyDictionary[ResidentAdapter, bool] = WeakKeyDictionary()
        lm = runtime.parts.lm
        self.enabled = room > 0 and lm.keeping == "shared" and not lm.rope.varies and _whole(lm.new_cache())

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(entry.nbytes for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._numbers.clear()

    def lend(self, ticket: Ticket) -> None:
        """Give a row that joins what is known of its beginning."""
        row = ticket.row
        row.begin = None
        if self.enabled and not row.answer:
            self._lend(ticket)
        self._meter.prompt(len(row.ids), ticket.cached)

    def _lend(self, ticket: Ticket) -> None:
        row = ticket.row
        if len(row.ids) <= _LEAST:
            return
        marks = self._marks(row, row.ids)
        name, same = self._longest(marks[:-1])  # the last token is read: it says what comes next
        if name is None or same < _LEAST:
            return
        self._entries.move_to_end(name)
        row.begin = caches.beginning(self._runtime.parts.lm.new_cache(), self._entries[name].cache, same), same
        ticket.cached = same

    def keep(self, row: RequestRow, cache: Any) -> None:
        """Keep what was read of a row that has ended."""
        if row.read <= _LEAST:
            return
        marks = self._marks(row, [*row.ids, *row.answer][: row.read])
        name, same = self._longest(marks)
        if name is not None and same == len(marks):
            self._entries.move_to_end(name)  # it is known already
            return
        if name is not None and same == len(self._entries[name].marks):
            del self._entries[name]  # it goes on where that one ended
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        self._entries[next(self._names)] = _Kept(marks, cache, size)
        while self._entries and (self.nbytes > self._room or len(self._entries) > _MOST):
            self._entries.popitem(last=False)
        if len(self._numbers) > _NUMBERS:
            self.clear()
        self._meter.memory(prefixes=self.nbytes)

    def _longest(self, marks: Tensor) -> tuple[int | None, int]:
        """The entry that agrees with the most tokens from the first on, and how many these are."""
        best, most = None, 0
        for name, entry in self._entries.items():
            both = min(len(marks), len(entry.marks))
            if both <= most:
                continue
            differs = (marks[:both] != entry.marks[:both]).any(-1).nonzero()
            same = int(differs[0]) if len(differs) else both
            if same > most:
                best, most = name, same
        return best, most

    def _marks(self, row: RequestRow, tokens: Sequence[int]) -> Tensor:
        """(tokens, 2)"""
        under = torch.empty(len(tokens), dtype=torch.long)
        for phase, mask in row.timeline.spans(tokens, torch.arange(len(tokens))):
            under[mask] = self._number(phase, row)
        return torch.stack([torch.tensor(list(tokens)), under], dim=-1)

    def _number(self, phase: Row, row: RequestRow) -> int:
        """Equal for what gives the same keys and values, and for nothing else."""
        serial = {name: self._adapter(adapter) for name, adapter in phase.adapters.items()}
        acting = sorted((serial[name], name) for name in serial if phase.uses(name))
        terms = tuple((one, phase.weights.get(name, 0.0), phase.layers.get(name, ())) for one, name in acting)
        mixes = frozenset(
            (moded, tuple(sorted((serial[name], weight) for name, weight in own.items())))
            for moded, own in phase.moded.items()
        )
        gated = bool(mixes) or any(not self._is_static(phase.adapters[name]) for _, name in acting)
        about: Hashable = (_scene(phase.scene_type), phase.prompt, row.prompt_length) if gated else None
        return self._numbers.setdefault((terms, mixes, about), len(self._numbers))

    def _adapter(self, adapter: ResidentAdapter) -> int:
        if adapter not in self._adapters:
            self._adapters[adapter] = next(self._names)
        return self._adapters[adapter]

    def _is_static(self, adapter: ResidentAdapter) -> bool:
        """Whether no mode has a say in how it acts, apart from its weight."""
        if adapter not in self._static:
            parts = self._runtime.parts
            view = AdapterView(adapter.name, adapter.card, adapter.state, parts.base.facts)
            self._static[adapter] = not parts.modes.gates_of(adapter.mode) or not parts.modes.why_not_static(
                adapter.mode, view
            )
        return self._static[adapter]


def _scene(kind: Any) -> Hashable:
    return tuple(sorted(kind.items())) if hasattr(kind, "items") else kind


def _whole(cache: Any) -> bool:
    """Whether every layer keeps all of its columns."""
    return all(getattr(layer, "sliding_window", None) is None for layer in cache.layers)
