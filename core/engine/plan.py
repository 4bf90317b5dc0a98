"""A plan: the gates of one batch over one stack; and the single forward pass that runs under it.

The plan is an argument of the pass, not a setting of the model: it stands in a context variable for the duration of
one call, so that threads, and nested passes, never see each other's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_rt.core.engine.stack import Stack, StackedGroup, StackedSite
from lora_rt.core.engine.topology import HeadAxis, Topology
from lora_rt.plugins.contract import Gate

_running: ContextVar[Pass | None] = ContextVar("lora_rt_pass", default=None)


def running_pass() -> Pass | None:
    """The pass that this thread is in, or None: then every layer is the base's own."""
    return _running.get()


class Plan:
    """Weights and gates of a batch over a stack.

    Args:
        topology: the model's sites.
        stack: the active adapters.
        weights: (rows, K) or (1, K) where all rows are alike; the user's weights, 0 where a row does not use an adapter.
        gates: one per adapter, None for "always 1".
        layers: how many blocks the model has.
    """

    def __init__(self, topology: Topology, stack: Stack, weights: Tensor, gates: Sequence[Gate | None], layers: int) -> None:
        self.topology = topology
        self.stack = stack
        self.group_gates = _group_gates(stack, weights, gates, layers)
        self.head_gates = {k: gate.heads for k, gate in enumerate(gates) if gate is not None and gate.heads is not None}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, the model's linear layers add this plan's contribution."""
        token = _running.set(Pass(self))
        try:
            yield
        finally:
            _running.reset(token)


def _group_gates(stack: Stack, weights: Tensor, gates: Sequence[Gate | None], layers: int) -> dict[int, Tensor]:
    """Group -> the gate of its ranks, broadcastable to (batch, tokens, R)."""
    ranked = {k: gate.ranks for k, gate in enumerate(gates) if gate is not None and gate.ranks is not None}
    if not ranked:
        per_pattern = [weights[:, None, owners] for owners in stack.patterns]
        return {group: per_pattern[stacked.pattern] for group, stacked in stack.groups.items()}
    if all(ranks.dim() < 4 or ranks.shape[-1] == 1 for ranks in ranked.values()):
        return _layered_gates(stack, weights, ranked, layers)
    return _ranked_gates(stack, weights, ranked, layers)


def _layered_gates(stack: Stack, weights: Tensor, ranked: Mapping[int, Tensor], layers: int) -> dict[int, Tensor]:
    """Gates without a rank axis of their own: one gather per pattern serves all layers."""
    columns = [weights[None, :, None, k] * _four(ranked[k])[..., 0] if k in ranked else weights[None, :, None, k] for k in range(weights.shape[1])]
    shape = torch.broadcast_shapes(*(column.shape for column in columns))
    combined = torch.stack([column.expand(shape) for column in columns], dim=-1)  # (layers|1, batch|1, tokens|1, K)
    if combined.shape[0] == 1:
        combined = combined.expand(layers, *combined.shape[1:])
    outside = combined.mean(0)
    gates = {}
    for pattern, owners in enumerate(stack.patterns):
        per_layer, beyond = combined[..., owners], outside[..., owners]
        for group, stacked in stack.groups.items():
            if stacked.pattern == pattern:
                gates[group] = beyond if stacked.layer is None else per_layer[stacked.layer]
    return gates


def _ranked_gates(stack: Stack, weights: Tensor, ranked: Mapping[int, Tensor], layers: int) -> dict[int, Tensor]:
    """The general case: a gate that tells an adapter's ranks apart."""
    gates = {}
    for group, stacked in stack.groups.items():
        pieces = []
        for site in (s for s in stack.sites if s is not None and s.group == group):
            for k, (first, last) in enumerate(site.spans):
                weight = weights[:, None, k, None]  # (batch, 1, 1)
                piece = weight * _at_layer(_four(ranked[k]), stacked.layer, layers) if k in ranked else weight
                if piece.shape[-1] not in (1, last - first) and last > first:
                    raise ValueError(f"a gate of {piece.shape[-1]} ranks over an adapter of {last - first}")
                pieces.append(piece.expand(*piece.shape[:-1], last - first))
        shape = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        gates[group] = torch.cat([piece.expand(*shape, piece.shape[-1]) for piece in pieces], dim=-1)
    return gates


def _four(gate: Tensor) -> Tensor:
    """(..., rank) with missing leading axes added: (layers, batch, tokens, rank)."""
    return gate.reshape((1,) * (4 - gate.dim()) + tuple(gate.shape))


def _at_layer(gate: Tensor, layer: int | None, layers: int) -> Tensor:
    """(layers|1, batch, tokens, n) -> (batch, tokens, n) of one layer; the mean of them outside the blocks."""
    if gate.shape[0] == 1:
        return gate[0]
    return gate.mean(0) if layer is None else gate[layer]


class Pass:
    """One forward pass. Remembers the last group's hidden, since q, k and v (gate and up) follow on one another."""

    __slots__ = ("_gates", "_groups", "_hidden", "_input", "_plan", "_sites")

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sites = plan.stack.sites
        self._groups = plan.stack.groups
        self._gates = plan.group_gates
        self._input: Tensor | None = None
        self._hidden: Tensor | None = None

    def add(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """y (batch, tokens, out) plus the contribution of the site's adapters to x (batch, tokens, in)."""
        site = self._sites[index]
        if site is None:
            return y
        axis = self._plan.topology.sites[index].heads
        if self._plan.head_gates and axis is not None:
            return self._add_headed(site, axis, x, y)
        if self._input is not x:
            self._hidden = self._gated(site.group, self._groups[site.group], x)
            self._input = x
        assert self._hidden is not None
        # In place: y is the layer's fresh output. A float32 sum is rounded once into a bfloat16 y.
        return y.add_(linear(self._hidden[..., site.start : site.stop], site.b))

    def _gated(self, number: int, group: StackedGroup, x: Tensor) -> Tensor:
        """g * (A x), (batch, tokens, R)."""
        hidden = linear(x.to(group.a.dtype), group.a, group.offset)
        return hidden * self._gates[number]

    def _add_headed(self, site: StackedSite, axis: HeadAxis, x: Tensor, y: Tensor) -> Tensor:
        """Heads do not lie on the rank axis: each gated adapter acts alone, with its heads scaled on B's or A's side."""
        group = self._groups[site.group]
        gate = self._gates[site.group][..., site.start : site.stop]
        a = group.a[site.start : site.stop]
        offset = None if group.offset is None else group.offset[site.start : site.stop]
        wide = x.to(a.dtype)
        for k, (first, last) in enumerate(site.spans):
            if first == last:
                continue
            heads = self._heads(k, axis, group.layer)
            source = wide if heads is None or axis.side == "output" else wide * heads
            hidden = linear(source, a[first:last], None if offset is None else offset[first:last]) * gate[..., first:last]
            delta = linear(hidden, site.b[:, first:last])
            y = y.add_(delta if heads is None or axis.side == "input" else delta * heads)
        return y

    def _heads(self, k: int, axis: HeadAxis, layer: int | None) -> Tensor | None:
        """Adapter k's head gate spread over the features of a site, (batch, tokens, features), or None."""
        if k not in self._plan.head_gates:
            return None
        heads = _at_layer(_four(self._plan.head_gates[k]), layer, 0)
        if axis.pool > 1:
            heads = heads.unflatten(-1, (-1, axis.pool)).mean(-1)
        return heads[..., axis.index]
