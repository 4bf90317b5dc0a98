"""The plan whose rows share one stack: every row passes through all active adapters, gated by what is its own.

hidden = g * (A x)        A: (R, in)    g: (batch|1, tokens|1, R)
y     += B hidden         B: (out, R)

Two rows of three tokens, `emotion:0.7 logic:0.3` and `logic:1`, over the group of `stack.py`'s example, whose ranks are
emotion's 8 and logic's 4 of q, and emotion's 8 of v:

    x               (2, 3, 576)
    A x             (2, 3, 20)      one product: each row passes through emotion and logic
    g               (2, 1, 20)      row 0: 0.7 x 8, 0.3 x 4, 0.7 x 8        row 1: 0.0 x 8, 1.0 x 4, 0.0 x 8
    hidden          (2, 3, 20)      row 1 has zeros where emotion's ranks are
    y of q  +=      hidden[..., 0:12] B_q^T         B_q (576, 12)
    y of v  +=      hidden[..., 12:20] B_v^T        B_v (192, 8), which adds nothing to row 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from lora_rt.core.base.fused import Pairs
from lora_rt.core.engine import tiled_factors
from lora_rt.core.engine.few_rows import FewRows
from lora_rt.core.engine.gates import head_gates, layer_of, rank_gates
from lora_rt.core.engine.heads import HeadAxis
from lora_rt.core.engine.layout import Layout, spread
from lora_rt.core.engine.pieces import Pieces
from lora_rt.core.engine.plan import Pass, Plan
from lora_rt.core.engine.stack import Stack, StackedGroup, StackedSite
from lora_rt.core.engine.topology import Topology
from lora_rt.core.multiply.many import Added
from lora_rt.plugins.contract import Gate

_FLOAT32 = torch.empty(0, dtype=torch.float32)
_AT_ONCE = 128
"""Tokens whose float32 deltas are added to a bfloat16 y: such a sum copies both, which so stay in the cache."""


class SharedPlan(Plan):
    """Weights and gates of a batch over a stack.

    Args:
        topology: the model's sites.
        stack: the active adapters.
        weights: (rows, K), or (1, K) where all rows are alike: the user's, 0 where a row does not use an adapter.
        gates: one per adapter, None for "always 1".
        twins: modules that stand in for the model's own of these names.
        own: gives the active adapters' pieces, where steps may read these.
    """

    _few: FewRows | None = None

    def __init__(
        self,
        topology: Topology,
        stack: Stack,
        weights: Tensor,
        gates: Sequence[Gate | None],
        twins: Mapping[str, nn.Module] | None = None,
        own: Callable[..., Pieces | None] | None = None,
    ) -> None:
        self.topology = topology
        self.twins = twins or {}
        self.stack = stack
        self._weights, self._own = weights, own
        self.group_gates = rank_gates(stack, weights, gates)
        self.head_gates = head_gates(weights, gates)

    def few_rows(self, kernels: Any) -> FewRows:
        """What it adds to the products of a few rows on a CPU."""
        if self._few is None:
            headed = bool(self.head_gates)
            given = self.topology, self.stack, self.group_gates, headed, self._own, self._weights
            self._few = FewRows(kernels, *given)
        return self._few

    def begin(self, rows: int, tokens: int, kept: int | Tensor | None) -> Pass:
        """A pass of a batch (rows, tokens)."""
        return SharedPass(self, rows, tokens, kept)

    def tensors(self) -> list[Tensor]:
        """The stack's factors and the gates."""
        return [*self.stack.tensors(), *self.group_gates.values()]


class SharedPass(Pass):
    """One forward pass. Remembers the last group's hidden, since q, k and v (gate and up) follow on one another."""

    _few: FewRows | None = None
    _few_hidden: tuple[Tensor, int, Any] | None = None  # x, the group, and what was made of it

    def __init__(self, plan: SharedPlan, rows: int, tokens: int, kept: int | Tensor | None) -> None:
        self.topology = plan.topology
        self._plan = plan
        self.twins = plan.twins
        self._sites = plan.stack.sites
        self._groups = plan.stack.groups
        self._gates = plan.group_gates
        self._heads = plan.head_gates
        self._rows = rows
        self._tokens = tokens
        self._kept = slice(-kept, None) if isinstance(kept, int) else kept
        self._group = -1
        self._input: Tensor | None = None
        self._hidden: Tensor | None = None
        self._halves: tuple[Tensor, int, Tensor] | None = None  # x, the group, and its hidden as a product adds it
        self._spread_gates: dict[tuple[Any, ...], Tensor] = {}

    def acts(self, index: int) -> bool:
        """Whether an adapter acts at this site."""
        return self._sites[index] is not None

    def add_pairs(self, index: int, x: Tensor, y: Tensor, pairs: Pairs) -> Tensor:
        """y plus B[e] ( g * (A[e] x) ) of each pair, whose token says which gate is its own."""
        site = self._sites[index]
        assert site is not None
        group = self._groups[site.group]
        gate = self._gates[site.group]
        if gate.shape[0] == gate.shape[1] == 1:
            own = gate.view(gate.shape[-1])  # (R,)
        else:
            tokens = gate.new_zeros(pairs.shown, 1)  # (tokens, 1)
            own = self._like(gate, group.layout, tokens).expand(pairs.shown, -1)[pairs.tokens]  # (pairs, R)
        hidden = pairs.products(x.to(group.a.dtype), group.a) * own  # (pairs, R)
        return y + pairs.products(hidden, site.b).to(y.dtype)  # (pairs, out)

    def few(self, kernels: Any) -> FewRows:
        """What is added to the products of a few rows on a CPU."""
        return self._plan.few_rows(kernels)

    def use(self, kernels: Any) -> None:
        """Add by these loops where they can; of a step on a CPU, in inference mode."""
        self._few = self.few(kernels)

    def add(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """y plus the contribution of the site's adapters to x; both in the layout of the site."""
        site = self._sites[index]
        if site is None or (self._few is not None and self._added_to_few(self._few, index, x, y)):
            return y
        if site.scales is not None:  # DoRA: the layer's own output, without its bias, is rescaled
            bias = getattr(self.topology.sites[index].module, "bias", None)
            shares = linear(self._shared(site, x)[..., site.start : site.stop], site.scales)  # (batch, tokens, out)
            y = (y + (y if bias is None else y - bias) * shares).to(y.dtype)
        if self._heads and (axis := self.topology.heads.get(index)) is not None:
            return self._add_headed(site, axis, x, y)
        hidden = self._shared(site, x)[..., site.start : site.stop]  # (batch, tokens, ranks of this site)
        if tiled_factors.reads(x) and tiled_factors.takes(y, site.shape) and index in self._plan.stack.ranks[1]:
            return tiled_factors.add(y, hidden, self._plan.stack.ranks[1][index])
        # In place: y is the layer's fresh output. A float32 sum is rounded once into a bfloat16 y.
        few = y.dtype != site.dtype and y.numel() <= _AT_ONCE * y.shape[-1]
        if few or not y.is_contiguous() or y.requires_grad:
            return y.add_(linear(hidden, site.b))
        # (batch * tokens, out), (batch * tokens, ranks of this site)
        into, flat = y.view(-1, y.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        if y.dtype == site.dtype:  # one kernel, not two
            into.addmm_(flat, site.b.t())
            return y
        step = _AT_ONCE if y.is_cpu else max(1, len(into))
        for start in range(0, len(into), step):
            into[start : start + step].add_(linear(flat[start : start + step], site.b))
        return y

    def added(self, index: int, x: Tensor) -> Added | None:
        """What a layer's own product is to add to what it makes of many tokens, where it may; then `add` is not called.

        Not where a site is more than factors: under DoRA, biases and gates of heads.
        """
        site = self._sites[index]
        if site is None or site.scales is not None or not tiled_factors.reads(x):
            return None
        group = self._groups[site.group]
        plain = group.offset is None and not (self._heads and index in self.topology.heads)
        if not plain or not tiled_factors.fits(group.shape) or not tiled_factors.are_outputs(site.shape):
            return None
        groups, sites = self._plan.stack.ranks
        if site.group not in groups or index not in sites:
            return None
        if self._halves is None or self._halves[0] is not x or self._halves[1] != site.group:
            gate = self._gate_of_tokens(site.group, group, x)
            self._halves = x, site.group, tiled_factors.halves_of(x, groups[site.group], gate)
        return Added(self._halves[2], site.start, sites[index])

    def _gate_of_tokens(self, number: int, group: StackedGroup, x: Tensor) -> Tensor:
        """(1 or tokens, R) of a group, whole tiles wide."""
        gate, layout = self._gates[number], group.layout
        key = id(gate), layout, x.shape[:-1]  # an output head may be given fewer tokens
        if key not in self._spread_gates:
            some = self._like(gate, layout, x)  # (batch|1, tokens|1, R), in the layout of x, or (R,)
            whole = pad(some, (0, tiled_factors.whole_ranks(some.shape[-1]) - some.shape[-1]))
            if whole.numel() > whole.shape[-1]:
                whole = whole.expand(*x.shape[:-1], -1).contiguous()
            self._spread_gates[key] = whole.view(-1, whole.shape[-1]).float().contiguous()
        return self._spread_gates[key]

    def _added_to_few(self, few: FewRows, index: int, x: Tensor, y: Tensor) -> bool:
        """Whether a plain site's contribution has been added to y by loops."""
        group = few.group_of(index)
        if group is None or y.dtype != torch.float32 or x.dim() != 3 or not x.is_floating_point():
            return False
        made = self._few_hidden
        if made is None or made[0] is not x or made[1] != group:
            made = self._few_hidden = x, group, few.hidden(group, self.widened(x, _FLOAT32))
        few.add(index, made[2], y)
        return True

    def _shared(self, site: StackedSite, x: Tensor) -> Tensor:
        """The gated hidden of the site's group, made by the first of its sites."""
        if self._hidden is None or self._input is not x or self._group != site.group:
            self._hidden = self._gated(site.group, self._groups[site.group], x)
            self._input, self._group = x, site.group
        return self._hidden

    def _gated(self, number: int, group: StackedGroup, x: Tensor) -> Tensor:
        """g * (A x), in the layout of x. An embedding's A is looked up in: x are token ids there."""
        if tiled_factors.reads(x) and tiled_factors.fits(group.shape) and number in self._plan.stack.ranks[0]:
            hidden = tiled_factors.hidden_of(x, self._plan.stack.ranks[0][number])
            hidden = hidden if group.offset is None else hidden + group.offset
        elif x.is_floating_point():
            hidden = linear(self.widened(x, group.a), group.a, group.offset)  # (batch, tokens, R); offset: 1 for biases
        else:
            hidden = embedding(x.to(group.a.device), group.a.T)  # (batch, tokens, R)
        return hidden * self._like(self._gates[number], group.layout, hidden)

    def _like(self, gate: Tensor, layout: Layout | None, x: Tensor) -> Tensor:
        return spread(gate, layout, x, self._rows, self._tokens, self._kept)

    def _add_headed(self, site: StackedSite, axis: HeadAxis, x: Tensor, y: Tensor) -> Tensor:
        """Heads do not lie on the rank axis: each adapter acts alone, with its heads scaled on B's or A's side."""
        for k, (first, last) in enumerate(site.spans):
            if first == last:
                continue
            ranks = slice(site.start + first, site.start + last)
            heads = self._spread(k, axis, self._groups[site.group], x)
            if heads is not None and axis.side == "input":
                hidden, heads = self._alone(site.group, ranks, x, heads), None
            else:
                hidden = self._shared(site, x)[..., ranks]
            delta = linear(hidden, site.b[:, first:last])  # (batch, tokens, out), of adapter k alone
            y = y.add_(delta if heads is None else delta * heads)
        return y

    def _alone(self, number: int, ranks: slice, x: Tensor, heads: Tensor) -> Tensor:
        """The gated hidden of one adapter, whose heads stand on its input side."""
        group = self._groups[number]
        offset = None if group.offset is None else group.offset[ranks]
        hidden = linear(x.to(group.a) * heads, group.a[ranks], offset)  # (batch, tokens, ranks of the adapter)
        return hidden * self._like(self._gates[number], group.layout, x)[..., ranks]

    def _spread(self, k: int, axis: HeadAxis, group: StackedGroup, x: Tensor) -> Tensor | None:
        """Adapter k's head gate spread over the features of a site, in the layout of x, or None."""
        if k not in self._heads:
            return None
        heads = layer_of(self._heads[k], group.layer).to(group.a.device)  # (batch|1, tokens|1, heads|1)
        if heads.shape[-1] == 1:
            return self._like(heads, group.layout, x)
        return self._like(axis.spread(heads), group.layout, x)  # (batch|1, tokens|1, features)
