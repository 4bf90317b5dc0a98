"""An adapter that is resident over a model, and what several of them can't be asked together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.roles import roles_of
from lora_rt.core.engine.special import TokenRows
from lora_rt.core.engine.stack import Factors
from lora_rt.core.engine.topology import Topology
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate


class BankError(LoraRtError):
    """An adapter is not resident, or its factors do not fit the model."""


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """One adapter in memory: its factors by site name, and what its mode will want to know of it.

    `tokens` are trained rows of embeddings, `biases` trained biases (out,) of linear layers, and `whole` modules that
    were trained as a whole, by their names; a bank turns the first two into factors. `apart` says that rows under this
    adapter share no pass with others: it acts on a layer that is not told which rows it gets (see `Site.layout`), or
    holds whole modules. `plain` says that it consists of nothing but A, B and biases. `invocation` are the tokens from
    which on it acts (aLoRA, arXiv:2504.12397); none where it always does.
    """

    name: str
    factors: Mapping[str, Factors]
    mode: str
    card: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    apart: bool = False
    plain: bool = True
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    whole: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    twins: Mapping[str, nn.Module] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> frozenset[int]:
        """The different ranks among its sites."""
        return frozenset(factors.rank for factors in self.factors.values())

    @cached_property
    def fused(self) -> bool:
        """Whether it acts on fused experts, which have no lanes."""
        return any(factors.a.dim() == 3 for factors in self.factors.values())  # (experts, r, in)

    @property
    def rank(self) -> int:
        """The largest rank among its sites."""
        return max(self.ranks)

    @cached_property
    def nbytes(self) -> int:
        """The memory of its factors."""
        tensors = [t for factors in self.factors.values() for t in (factors.a, factors.b, factors.bias, factors.scale)]
        tensors += [tensor for module in self.whole.values() for tensor in module.values()]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def twins_of(
    active: Sequence[ResidentAdapter], weights: Tensor, gates: Sequence[Gate | None]
) -> Mapping[str, nn.Module]:
    """The whole modules of the one adapter that speaks; those of several have to be equal.

    `weights` is (rows|1, K), the adapters in the order of `active`.

    Raises:
        BankError: a whole module has no weight but 1, no gate, and no other adapter beside it that changes it.
    """
    _check_tokens(active)
    holders = [k for k, adapter in enumerate(active) if adapter.whole]
    if not holders:
        return {}
    names = ", ".join(active[k].name for k in holders)
    first = active[holders[0]]
    modules = ", ".join(sorted(first.whole)[:3])
    if bool((weights[:, holders] != 1).any()) or any(gates[k] is not None for k in holders):
        text = f"{names} was trained with whole modules ({modules}), which have no weight but 1 and no gate"
        raise BankError(text, next_step=f"Give it the weight 1, without a gate: {first.name}")
    alike = all(_equal(first.whole, active[k].whole) for k in holders)
    if len(active) > 1 and not (len(holders) == len(active) and alike):
        others = ", ".join(adapter.name for adapter in active)
        text = f"{first.name} was trained with whole modules ({modules}), which do not add up with another adapter's"
        raise BankError(text, problems=[f"in one composition: {others}"], next_step=f"Use it alone: {first.name}")
    return first.twins


def _equal(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    mine, theirs = ({(n, k): t for n, module in x.items() for k, t in module.items()} for x in (one, other))
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


def _check_tokens(active: Sequence[ResidentAdapter]) -> None:
    """Raises BankError where two adapters have trained one token to different rows."""
    known: dict[tuple[str, int], tuple[str, Tensor]] = {}
    if sum(1 for adapter in active if adapter.tokens) < 2:
        return
    for adapter in active:
        for name, rows in adapter.tokens.items():
            for token, value in zip(rows.ids.tolist(), rows.values, strict=True):  # (k,), (k, n)
                owner, before = known.setdefault((name, token), (adapter.name, value))
                if not torch.equal(before, value):
                    text = f"{owner} and {adapter.name} have both trained the token {token}, to different rows"
                    raise BankError(text, next_step="Use one of them, or adapters that train other tokens")


def check_gates(adapters: Sequence[ResidentAdapter], gates: Sequence[Gate | None]) -> None:
    problems = []
    for adapter, gate in zip(adapters, gates, strict=True):
        if gate is not None and gate.heads is not None and any(f.scale is not None for f in adapter.factors.values()):
            problems.append(f"{adapter.name}: it is DoRA, which is not gated head by head")
        if gate is None or gate.ranks is None or gate.ranks.dim() == 0 or gate.ranks.shape[-1] == 1:
            continue
        if adapter.ranks != {gate.ranks.shape[-1]}:
            ranks = ", ".join(str(rank) for rank in sorted(adapter.ranks))
            problems.append(f"{adapter.name}: its gate has {gate.ranks.shape[-1]} ranks, its modules have {ranks}")
    if problems:
        raise BankError("a gate does not fit its adapter", problems=problems, next_step="Gate all ranks alike, or each")


def check_heads(topology: Topology, adapters: Sequence[ResidentAdapter], gates: Sequence[Gate | None]) -> None:
    """A gate for heads has to find them wherever its adapter acts in an attention.

    Raises:
        BankError: it does not.
    """
    problems = []
    for adapter, gate in zip(adapters, gates, strict=True):
        if gate is None or gate.heads is None or gate.heads.dim() == 0 or gate.heads.shape[-1] == 1:
            continue
        inside = [name for name in adapter.factors if {"query", "key", "value", "output"} & {*roles_of(name)}]
        blind = [name for name in inside if topology.by_name[name] not in topology.heads]
        if blind or not topology.heads:
            where = f"those of {blind[0]} can't be told" if blind else "this base has none that can be told"
            problems.append(f"{adapter.name}: its gate is one for attention heads, and {where}")
    if problems:
        text = "a gate for attention heads does not fit this base"
        raise BankError(text, problems=problems, next_step="Use a mode or an adapter without one (heads=no)")
