"""The adapter bank: which adapters are resident in memory, and plans over those that a batch uses."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.roles import roles_of
from lora_rt.core.base.shape import device_of
from lora_rt.core.engine.lanes import LanePlan, Lanes, Membership, gather, pay_off
from lora_rt.core.engine.lru import LRUCache
from lora_rt.core.engine.plan import Plan, base_alone
from lora_rt.core.engine.shared import SharedPlan
from lora_rt.core.engine.site import hook_up, let_replace, pass_by
from lora_rt.core.engine.special import TokenRows, embedded, of_bias, of_tokens, rescaled, side_by_side, turned, twin
from lora_rt.core.engine.stack import Factors, Stack, stack
from lora_rt.core.engine.topology import Site, survey
from lora_rt.core.engine.wrappers import bare_modules, wrappers_of
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate

_ROOM = 256 * 2**20  # bytes of stacks and lanes that are kept, or as many as the residents take themselves


class BankError(LoraRtError):
    """An adapter is not resident, or its factors do not fit the model."""


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """One adapter in memory: its factors by site name, and what its mode will want to know of it.

    `tokens` are trained rows of embeddings, `biases` trained biases of linear layers, and `whole` modules that were
    trained as a whole, by their names; a bank turns the first two into factors. `apart` says that rows under this
    adapter share no pass with others: it acts on a layer that is not told which rows it gets (see `Site.layout`), or
    holds whole modules. `plain` says that it consists of nothing but A, B and biases.
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
    whole: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    twins: Mapping[str, nn.Module] = field(default_factory=dict)

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
        tensors = [t for factors in self.factors.values() for t in (factors.a, factors.b, factors.bias, factors.scale)]
        tensors += [tensor for module in self.whole.values() for tensor in module.values()]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class AdapterBank:
    """Residents over one model.

    Factors lie where their layer computes: in float32 on a CPU, where few rows make a bfloat16 matmul the slower one,
    and in the base's compute dtype on a GPU. Adding and removing replaces the table of residents; plans made before
    keep what they were made of.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
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
        sites = {site.name: site for site in self.topology.sites}
        adapter = self._in_factors(adapter, sites)
        self._check(adapter)
        moved = {name: self._moved(factors, sites[name]) for name, factors in adapter.factors.items()}
        apart = bool(adapter.whole) or any(sites[name].layout is None for name in moved)
        plain = not any(factors.scale is not None or sites[name].embeds for name, factors in moved.items())
        resident = replace(adapter, factors=moved, apart=apart, plain=plain, twins=self._twins(adapter))
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
        twins = _twins_of(active, weights, chosen)
        members = tuple(tuple(k for k, name in enumerate(names) if row.get(name, 0.0) != 0.0) for row in rows)
        ranks = [adapter.rank for adapter in active]
        plain = not twins and all(adapter.plain and not adapter.fused for adapter in active)
        if plain and all(gate is None for gate in chosen) and pay_off(ranks, members, self.device.type):
            return LanePlan(self.topology, self._lanes(active, members), weights)
        return SharedPlan(self.topology, self._stack(active), weights, chosen, twins)

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
        dtype = self.dtype if site.device.type == self.device.type else self._dtype_on(site.device)

        def move(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().to(device=site.device, dtype=dtype).contiguous()

        if factors.magnitude is not None:
            factors = rescaled(factors, site.module)
        if site.embeds:
            factors = embedded(factors, site.module)
        return Factors(move(factors.a), move(factors.b), move(factors.bias), scale=move(factors.scale))

    def _in_factors(self, adapter: ResidentAdapter, sites: Mapping[str, Site]) -> ResidentAdapter:
        """Trained token rows and biases as factors of their layers."""
        factors, problems = dict(adapter.factors), []
        for name, rows in adapter.tokens.items():
            site = sites.get(name)
            sizes = (0, 0) if site is None else (site.in_features, site.out_features)
            words, width = sizes if site is None or site.embeds else sizes[::-1]
            if site is None or rows.values.shape != (len(rows.ids), width):
                problems.append(f"{name}: the model has no embedding of this name and width")
            elif int(rows.ids.max()) >= words:
                problems.append(f"{name}: it trains token {int(rows.ids.max())}, the model has {words:,}")
            elif not site.embeds:
                own = turned(of_tokens(rows, site.module))
                factors[name] = side_by_side(factors.get(name), own)
            else:
                own = of_tokens(rows, site.module)
                factors[name] = side_by_side(factors.get(name), own)
                for head in self.topology.sites:
                    if not head.embeds and getattr(head.module, "weight", None) is site.module.weight:
                        factors[head.name] = side_by_side(factors.get(head.name), turned(own))
        for name, bias in adapter.biases.items():
            if name not in sites or bias.shape != (sites[name].out_features,):
                problems.append(f"{name}: the model has no bias of this shape there")
            else:
                factors[name] = side_by_side(
                    factors.get(name), of_bias(bias, sites[name].module, sites[name].in_features)
                )
        if problems:
            text = f"the adapter {adapter.name!r} does not fit this base"
            raise BankError(text, problems=problems, next_step="Use the base that it was trained on")
        return replace(adapter, factors=factors)

    def _twins(self, adapter: ResidentAdapter) -> dict[str, nn.Module]:
        """The modules that an adapter holds as a whole; each of the model's own gets a forward that may pass to one.

        Raises:
            BankError: the model has no such module, or tensors of other shapes.
        """
        modules = {name: module for name, module in bare_modules(self._model) if name in adapter.whole}
        problems = []
        for name, tensors in adapter.whole.items():
            own = modules[name]._parameters if name in modules else {}
            for key, tensor in tensors.items():
                if (there := own.get(key)) is None or there.shape != tensor.shape:
                    problems.append(f"{name}.{key}: {tuple(tensor.shape)} does not fit the model")
        if problems:
            text = f"the adapter {adapter.name!r} does not fit this base"
            raise BankError(text, problems=problems, next_step="Use the base that it was trained on")
        if modules:
            self._hooks.enter_context(let_replace(modules, self.topology))
        return {name: twin(modules[name], tensors) for name, tensors in adapter.whole.items()}

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


def _twins_of(
    active: Sequence[ResidentAdapter], weights: Tensor, gates: Sequence[Gate | None]
) -> Mapping[str, nn.Module]:
    """The whole modules of the one adapter that speaks; those of several have to be equal.

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
            for token, value in zip(rows.ids.tolist(), rows.values, strict=True):
                owner, before = known.setdefault((name, token), (adapter.name, value))
                if not torch.equal(before, value):
                    text = f"{owner} and {adapter.name} have both trained the token {token}, to different rows"
                    raise BankError(text, next_step="Use one of them, or adapters that train other tokens")


def _check_gates(adapters: Sequence[ResidentAdapter], gates: Sequence[Gate | None]) -> None:
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
