"""What the linear layers are told during a forward pass: a plan, and the pass that runs under it.

The plan is an argument of the pass, not a setting of the model: it stands in a context variable for the duration of
one call, so that threads, and nested passes, never see each other's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Literal

from torch import Tensor, nn

from lora_rt.core.base.fused import Pairs
from lora_rt.core.engine.topology import Topology
from lora_rt.core.multiply.many import Added

_running: ContextVar[Pass | Literal["base"] | None] = ContextVar("lora_rt_pass", default=None)


def running_pass() -> Pass | None:
    """The pass that this thread is in, or None: then every layer is the base's own."""
    found = _running.get()
    return None if found == "base" else found


def in_a_pass() -> bool:
    """Whether this thread is in a pass of ours, under a plan or of the base alone, and not in somebody else's call."""
    return _running.get() is not None


@contextmanager
def base_alone() -> Iterator[None]:
    """Within the block, no plan acts, whatever pass stands around it."""
    token = _running.set("base")
    try:
        yield
    finally:
        _running.reset(token)


class Pass(ABC):
    """One forward pass of a batch under a plan."""

    topology: Topology
    twins: Mapping[str, nn.Module] = MappingProxyType({})
    _given: Tensor | None = None
    _cast: Tensor | None = None

    def widened(self, x: Tensor, like: Tensor) -> Tensor:
        """x in the dtype and on the device of another tensor. Kept, since layers that read one x follow on another."""
        cast = self._cast
        if cast is None or self._given is not x or cast.dtype != like.dtype or cast.device != like.device:
            self._given, self._cast = x, (cast := x.to(like))
        return cast

    def knows(self, x: Tensor, wide: Tensor) -> None:
        """Let `widened` give `wide` for x, whose numbers it has in float32."""
        self._given, self._cast = x, wide

    @abstractmethod
    def add(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """y plus what the adapters of a site make of x; both in the layout of the site.

        y is the layer's fresh output, and may be changed in place. In the usual layout x is (rows, tokens, in) and y
        (rows, tokens, out); the output head gets (rows, kept, in), an embedding's x are token ids (rows, tokens).
        """

    def added(self, index: int, x: Tensor) -> Added | None:
        """What the product of a site's layer may add by itself; None where `add` is to be called."""
        return None

    @abstractmethod
    def acts(self, index: int) -> bool:
        """Whether an adapter acts at a site."""

    def add_pairs(self, index: int, x: Tensor, y: Tensor, pairs: Pairs) -> Tensor:
        """The same at fused experts, whose x and y are (pairs, n)."""
        raise NotImplementedError


class Plan(ABC):
    """The weights and gates of a batch over its active adapters. Immutable; any number of passes may run under it."""

    @abstractmethod
    def begin(self, rows: int, tokens: int, kept: int | Tensor | None) -> Pass:
        """A pass of a batch (rows, tokens); see `running`."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All that a plan keeps in memory."""

    @contextmanager
    def running(self, rows: int, tokens: int, kept: int | Tensor | None = None) -> Iterator[None]:
        """Within the block, the model's linear layers add this plan's contribution to a batch of (rows, tokens).

        `kept` says which tokens the output head gets, where it does not get all: the last n, or their indices.
        """
        token = _running.set(self.begin(rows, tokens, kept))
        try:
            yield
        finally:
            _running.reset(token)
