"""Decoding steps that are recorded once and run again: on a GPU, one launch in place of a thousand.

At a few rows a step of a large model is bound by the Python that launches its kernels. A step of one token a row does
the same work every time, so it is recorded as a CUDA graph. What it reads and writes lies in fixed places:

    ids, positions (rows, 1)    mask (rows, 1, 1, columns)    keys, values (rows, heads, columns, size)    a pooled plan

There is one recording for each number of rows (rounded up), of columns (likewise) and layout of a plan. A batch takes a
seat in it: its keys and values are copied there, and leave with it. What does not fit runs as any other pass.

On other devices nothing is recorded; tests put a stand-in in its place, which runs the step as it is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_rt.core.engine.plan import Plan, base_alone
from lora_rt.core.engine.shared import SharedPlan
from lora_rt.core.forward.decoder_trial import are_near, is_exact
from lora_rt.core.forward.fixed_cache import fixed_cache
from lora_rt.core.forward.pool import PooledPlan, can_be_pooled, layout_of

if TYPE_CHECKING:
    from lora_rt.core.forward.causal_lm import CausalLM

Run = Callable[[], Tensor]
Record = Callable[[Run], Run]

_WORTH = 8  # tokens to come from which on a recording pays off; it costs as much as three to five steps
_KEPT = 6  # recordings
_MOST_ROWS = 128
_FIRST_COLUMNS, _MORE_COLUMNS = 256, 512
_SHARE = 0.5  # of the free memory that the places of one recording may take
_WARM_UP = 2


def on_cuda() -> Record:
    """Records CUDA graphs; they share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    lock = threading.Lock()

    def record(run: Run) -> Run:
        with lock:
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UP):  # kernels are loaded and workspaces made before the recording
                    run()
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return record


class Seated:
    """A batch's cache while it lies in a step's places; `layers` give its keys and values as those of any cache."""

    def __init__(self, step: Step, rows: int, read: int) -> None:
        self.step, self.rows, self.read = step, rows, read
        self.layers = [_SeatedLayer(self, layer) for layer in step.cache.layers]


class _SeatedLayer:
    def __init__(self, seat: Seated, layer: Any) -> None:
        self._seat = weakref.proxy(seat)  # so that a cache that is let go of frees its seat at once
        self._layer = layer

    @property
    def keys(self) -> Tensor:
        """(rows, heads, columns that are read, size)"""
        keys: Tensor = self._layer.keys
        return keys[: self._seat.rows, :, : self._seat.read]

    @property
    def values(self) -> Tensor:
        """Likewise."""
        values: Tensor = self._layer.values
        return values[: self._seat.rows, :, : self._seat.read]


class Step:
    """One recording and its places. `like` is a cache of the model, `plan` any plan of the layout."""

    def __init__(self, lm: CausalLM, key: Hashable, rows: int, columns: int, like: Any, plan: Plan | None) -> None:
        def places(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=lm.device)

        self.key, self.columns = key, columns
        self._lm = lm
        self._ids, self._positions, self._column = places(rows, 1), places(rows, 1), places(1)
        self._mask = places(rows, 1, 1, columns, dtype=torch.bool)
        self._mask[..., 0] = True  # rows that nobody has taken look at something
        self.cache = fixed_cache(like.layers, rows, columns, self._column)
        self.plan = PooledPlan(plan, rows) if isinstance(plan, SharedPlan) else None
        self._occupant: weakref.ref[Seated] | None = None
        self._run: Run | None = None

    @property
    def recorded(self) -> bool:
        """Whether it has been recorded."""
        return self._run is not None

    @property
    def free(self) -> bool:
        """Whether nobody's keys and values lie here."""
        return self._occupant is None or self._occupant() is None

    def seat(self, cache: Any, mask: Tensor) -> Seated:
        """Take the first columns of a cache in; `mask` (rows, columns read and one more)."""
        rows, read = len(mask), mask.shape[1] - 1
        into, out_of = [], []
        for mine, other in zip(self.cache.layers, cache.layers, strict=True):
            into += [mine.keys[:rows, :, :read], mine.values[:rows, :, :read]]
            out_of += [other.keys[:, :, :read], other.values[:, :, :read]]
        torch._foreach_copy_(into, out_of)  # one launch for all layers
        # What a former occupant left behind stays in the columns to come: unseen, and written over one by one.
        self._mask[:rows, 0, 0] = False
        self._mask[:rows, 0, 0, :read] = mask[:, :read].bool()
        seated = Seated(self, rows, read)
        self._occupant = weakref.ref(seated)
        return seated

    def advance(self, seated: Seated, ids: Tensor, positions: Tensor, plan: Plan | None, record: Record) -> Tensor:
        """The logits (rows, vocab) of one more token (rows, 1) each."""
        rows = seated.rows
        # Only what is given into the places changes. The rows from `rows` on are computed as well, and thrown away.
        self._ids[:rows].copy_(ids)
        self._positions[:rows].copy_(positions)
        self._column.fill_(seated.read)  # where the new keys and values go; one place for all rows
        self._mask[:rows, ..., seated.read] = True
        if self.plan is not None and isinstance(plan, SharedPlan):
            self.plan.refill(plan, rows)
        if self._run is None:
            self._run = record(self._forward)
        logits = self._run()[:rows].clone()  # the place is written again by the next step
        seated.read += 1
        return logits

    def _forward(self) -> Tensor:
        rows = len(self._ids)
        running: AbstractContextManager[None] = base_alone() if self.plan is None else self.plan.running(rows, 1, 1)
        with running:
            return self._lm.at_columns(self._ids, self._mask, self._positions, self.cache)[:, -1]


class Steps:
    """The recorded steps of one model; `record` makes one of what a step does."""

    def __init__(self, lm: CausalLM, record: Record) -> None:
        self._lm = lm
        self._record = record
        self._steps: list[Step] = []
        self._lock = threading.Lock()
        self._off = False
        self._checked = False

    def __len__(self) -> int:
        return len(self._steps)

    def advance(
        self, ids: Tensor, mask: Tensor, positions: Tensor, plan: Plan | None, cache: Any, coming: int
    ) -> tuple[Tensor, Any] | None:
        """The logits (rows, vocab) of one more token (rows, 1) each, and the cache in which it now lies.

        None where this has to be a pass as any other. See `CausalLM.forward` for the arguments; `coming` is how many
        tokens are expected.
        """
        model = self._lm.model
        watched = model._forward_pre_hooks or model._forward_hooks  # somebody wants to see every pass
        if self._off or watched or len(ids) > _MOST_ROWS or not can_be_pooled(plan):
            return None
        with self._lock:
            step = self._step(len(ids), mask.shape[1], plan, cache, coming)
            if step is None:
                return None
            # The first recorded step of a model is compared with a pass as any other; after that it is believed.
            plain = None if self._checked else self._lm.forward(ids, mask, positions, plan=plan, cache=cache, keep=1)
            seated = cache if isinstance(cache, Seated) and cache.step is step else step.seat(cache, mask)
        try:
            logits = step.advance(seated, ids, positions, plan, self._record)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            if step.recorded:  # it has run before, so this is no limit of recording
                raise
            self._off = True  # what it does depends on what it reads, it takes no such mask, or there is no room
            self._steps.clear()
            return None if plain is None else (plain[:, -1], cache)
        if plain is not None:
            share = 1e-3 if is_exact(logits) else 0.1  # they differ by rounding alone
            self._off = not are_near(plain[:, -1], logits, share)
            self._checked = not self._off
            if self._off:
                self._steps.clear()
                return plain[:, -1], cache
        return logits, seated

    def _step(self, rows: int, width: int, plan: Plan | None, cache: Any, coming: int) -> Step | None:
        """The step in which a batch sits or can sit; made where it pays off and there is room."""
        columns, many = rounded_columns(width), rounded_rows(rows)
        key = (many, columns, layout_of(plan))
        if isinstance(cache, Seated) and cache.step.key == key:
            return cache.step
        for step in self._steps:
            if step.key == key and step.free:
                self._steps.remove(step)
                self._steps.append(step)  # the last one used is the last to go
                return step
        if coming < _WORTH or not self._room(many, columns, cache):
            return None
        # Steps with somebody in them are never dropped, so for a while there may be more than are kept.
        unused = [step for step in self._steps if step.free]
        for step in unused[: max(0, len(self._steps) - _KEPT + 1)]:
            self._steps.remove(step)
        made = Step(self._lm, key, many, columns, cache, plan)
        self._steps.append(made)
        return made

    def _room(self, rows: int, columns: int, cache: Any) -> bool:
        if any(getattr(layer, "keys", None) is None for layer in cache.layers):
            return False  # a layer that keeps something else (a state), or nothing yet
        if self._lm.device.type != "cuda":
            return True
        # bytes of one row's column, of each layer's keys and values (rows, heads, columns, size)
        sizes = [t.shape[1] * t.shape[3] * t.element_size() for la in cache.layers for t in (la.keys, la.values)]
        return bool(rows * columns * sum(sizes) <= _SHARE * torch.cuda.mem_get_info(self._lm.device)[0])


def rounded_rows(rows: int) -> int:
    """The next power of two up to 16, the next multiple of 16 beyond."""
    return 1 << (rows - 1).bit_length() if rows <= 16 else -(-rows // 16) * 16


def rounded_columns(width: int) -> int:
    """256, 512, 1024, 1536, ..."""
    return _FIRST_COLUMNS if width <= _FIRST_COLUMNS else -(-width // _MORE_COLUMNS) * _MORE_COLUMNS
