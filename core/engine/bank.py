"""The adapter bank: which adapters are resident in memory, and plans over those that a batch uses."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.base.roles import roles_of
from lora_rt.core.base.shape import device_of
from lora_rt.core.engine.lanes import LanePlan, Lanes, Membership, gather, pay_off
from lora_rt.core.engine.lru import LRUCache
from lora_rt.core.engine.plan import Plan, base_alone
from lora_rt.core.engine.shared import SharedPlan
from lora_rt.core.engine.site import hook_up, pass_by
from lora_rt.core.engine.stack import Factors, Stack, stack
from lora_rt.core.engine.topology import Site, survey
from lora_rt.core.engine.wrappers import wrappers_of
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate

_ROOM = 256 * 2**20  # bytes of stacks and lanes that are kept, or as many as the residents take themselves


class BankError(LoraRtError):
    """An adapter is not resident, or its factors do not fit the model."""


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """One adapter in memory: its factors by site name, and what its mode will want to know of it.

    `apart` says that it acts on a layer that is not told which rows it gets: see `Site.layout`.
    """

    name: str
    factors: Mapping[str, Factors]
    mode: str
    card: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    apart: bool = False

    @cached_property
    def ranks(self) -> frozenset[int]:
        """The different ranks among its sites."""
        return frozenset(factors.rank for factors in self.factors.values())

    @cached_property
    def fused(self) -> bool:
        """Whether it acts on fused experts, which have no lanes."""
        return any(factors.a.dim() == 3 for factors in self.factors.values())

    @property
    def rank(self) -> int:
        """The largest rank among its sites."""
        return max(self.ranks)

    @cached_property
    def nbytes(self) -> int:
        """The memory of its factors."""
        tensors = [t for factors in self.factors.values() for t in (factors.a, factors.b, factors.bias)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class AdapterBank:
    """Residents over one model.

    Factors lie where their layer computes: in float32 on a CPU, where few rows make a bfloat16 matmul the slower one,
    and in the base's compute dtype on a GPU. Adding and removing replaces the table of residents; plans made before
    keep what they were made of.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        with ExitStack() as undo:
            undo.enter_context(pass_by(wrappers_of(model), self))
            with base_alone():
                self.topology = survey(model)
            undo.enter_context(hook_up(self.topology))
            self._hooks = undo.pop_all()
        self.device = device_of(model)
        self._computed = dtype
        self.dtype = self._dtype_on(self.device)
        self.residents: Mapping[str, ResidentAdapter] = {}
        self._laid_out = LRUCache()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give the model its own layers back and forget all residents."""
        self._hooks.close()
        self.residents = {}
        self._laid_out = LRUCache()

    def add(self, adapter: ResidentAdapter) -> None:
        """Make an adapter resident; one of the same name is replaced.

        Raises:
            BankError: a factor names no site of this model or has another shape, all of them listed.
        """
        self._check(adapter)
        sites = {site.name: site for site in self.topology.sites}
        moved = {name: self._moved(factors, sites[name]) for name, factors in adapter.factors.items()}
        apart = any(sites[name].layout is None for name in moved)
        resident = replace(adapter, factors=moved, apart=apart)
        with self._lock:
            replaced = self.residents.get(adapter.name)
            self.residents = {**self.residents, adapter.name: resident}
        if replaced is not None:
            self._laid_out.drop(replaced)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            BankError: it is not resident.
        """
        with self._lock:
            removed = _get(self.residents, name)
            self.residents = {key: value for key, value in self.residents.items() if key != name}
        self._laid_out.drop(removed)

    def plan(
        self,
        rows: Sequence[Mapping[str, float]],
        gates: Mapping[str, Gate | None] | None = None,
        residents: Mapping[str, ResidentAdapter] | None = None,
    ) -> Plan | None:
        """The plan of one batch, or None where no row uses an adapter.

        Args:
            rows: per row of the batch, resident name -> weight. A single row stands for a batch of any size.
            gates: resident name -> gate, for residents that have one.
            residents: the residents as they were when the request began, where they may have changed since.

        Raises:
            BankError: an adapter is not resident, a weight is too large, or a gate has another rank than its adapter.
        """
        # Sorted: however a request orders its terms, it finds what was laid out for the same adapters.
        names = sorted({name for row in rows for name, weight in row.items() if weight != 0.0})
        if not names:
            return None
        table = self.residents if residents is None else residents
        active = tuple(_get(table, name) for name in names)
        chosen = [(gates or {}).get(name) for name in names]
        _check_gates(active, chosen)
        self._check_heads(active, chosen)
        weights = self._weights(names, rows)
        members = tuple(tuple(k for k, name in enumerate(names) if row.get(name, 0.0) != 0.0) for row in rows)
        ranks = [adapter.rank for adapter in active]
        fused = any(adapter.fused for adapter in active)
        if all(gate is None for gate in chosen) and not fused and pay_off(ranks, members, self.device.type):
            return LanePlan(self.topology, self._lanes(active, members), weights)
        return SharedPlan(self.topology, self._stack(active), weights, chosen)

    def _check_heads(self, adapters: Sequence[ResidentAdapter], gates: Sequence[Gate | None]) -> None:
        """A gate for heads has to find them wherever its adapter acts in an attention.

        Raises:
            BankError: it does not.
        """
        problems = []
        for adapter, gate in zip(adapters, gates, strict=True):
            if gate is None or gate.heads is None or gate.heads.dim() == 0 or gate.heads.shape[-1] == 1:
                continue
            inside = [name for name in adapter.factors if {"query", "key", "value", "output"} & {*roles_of(name)}]
            blind = [name for name in inside if self.topology.by_name[name] not in self.topology.heads]
            if blind or not self.topology.heads:
                where = f"those of {blind[0]} can't be told" if blind else "this base has none that can be told"
                problems.append(f"{adapter.name}: its gate is one for attention heads, and {where}")
        if problems:
            text = "a gate for attention heads does not fit this base"
            raise BankError(text, problems=problems, next_step="Use a mode or an adapter without one (heads=no)")

    def _weights(self, names: Sequence[str], rows: Sequence[Mapping[str, float]]) -> Tensor:
        """(rows, K), or (1, K) where all rows are alike."""
        alike = all(row == rows[0] for row in rows)
        table = [[row.get(name, 0.0) for name in names] for row in (rows[:1] if alike else rows)]
        largest = max(abs(weight) for row in table for weight in row)
        if not largest <= torch.finfo(self.dtype).max:
            raise BankError(f"the weight {largest:g} is too large to compute with", next_step="Use weights around 1")
        return torch.tensor(table, dtype=self.dtype, device=self.device)

    def _stack(self, active: tuple[ResidentAdapter, ...]) -> Stack:
        """The stacked factors of a set. That of one adapter shares its memory, where no two layers share an input."""

        def build() -> tuple[Stack, int]:
            built = stack(self.topology, [adapter.factors for adapter in active])
            return built, sum(tensor.nbytes for tensor in built.tensors())

        return self._laid_out.get(active, frozenset(active), build, self._room(), lambda: self._here(active))

    def _lanes(self, active: tuple[ResidentAdapter, ...], members: Membership) -> Lanes:
        """The factors of a set as the rows of a batch use them."""

        def build() -> tuple[Lanes, int]:
            built = gather(self.topology, [adapter.factors for adapter in active], members)
            return built, sum(tensor.nbytes for tensor in built.tensors())

        key = (active, members)
        return self._laid_out.get(key, frozenset(active), build, self._room(), lambda: self._here(active))

    def _here(self, active: tuple[ResidentAdapter, ...]) -> bool:
        return all(self.residents.get(adapter.name) is adapter for adapter in active)

    def _room(self) -> int:
        return max(_ROOM, sum(resident.nbytes for resident in self.residents.values()))

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        return torch.float32 if device.type == "cpu" else self._computed

    def _moved(self, factors: Factors, site: Site) -> Factors:
        def move(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device=site.device, dtype=self._dtype_on(site.device)).contiguous()

        return Factors(move(factors.a), move(factors.b), None if factors.bias is None else move(factors.bias))

    def _check(self, adapter: ResidentAdapter) -> None:
        problems = []
        for name, factors in adapter.factors.items():
            index = self.topology.by_name.get(name)
            if index is None:
                problems.append(f"{name}: the model has no such linear layer")
                continue
            site = self.topology.sites[index]
            count, rank = (site.experts,) if site.experts else (), factors.rank
            a, b = (*count, rank, site.in_features), (*count, site.out_features, rank)
            if factors.a.shape != a or factors.b.shape != b:
                problems.append(
                    f"{name}: A {tuple(factors.a.shape)} and B {tuple(factors.b.shape)} do not fit "
                    f"({site.out_features}, {site.in_features})"
                )
            if factors.bias is not None and factors.bias.shape != (site.out_features,):
                problems.append(f"{name}: the bias {tuple(factors.bias.shape)} does not fit ({site.out_features},)")
        if not adapter.factors:
            problems.append("it has no factors")
        if problems:
            text = f"the adapter {adapter.name!r} does not fit this base"
            raise BankError(text, problems=problems, next_step="Use the base that it was trained on")


def _get(residents: Mapping[str, ResidentAdapter], name: str) -> ResidentAdapter:
    if name not in residents:
        names = ", ".join(sorted(residents)) or "none"
        raise BankError(f"no adapter {name!r} is resident; there are: {names}", next_step="Load it first")
    return residents[name]


def _check_gates(adapters: Sequence[ResidentAdapter], gates: Sequence[Gate | None]) -> None:
    problems = []
    for adapter, gate in zip(adapters, gates, strict=True):
        if gate is None or gate.ranks is None or gate.ranks.dim() == 0 or gate.ranks.shape[-1] == 1:
            continue
        if adapter.ranks != {gate.ranks.shape[-1]}:
            ranks = ", ".join(str(rank) for rank in sorted(adapter.ranks))
            problems.append(f"{adapter.name}: its gate has {gate.ranks.shape[-1]} ranks, its modules have {ranks}")
    if problems:
        raise BankError("a gate does not fit its adapter", problems=problems, next_step="Gate all ranks alike, or each")
