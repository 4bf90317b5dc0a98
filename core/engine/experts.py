"""Sites that are parameters and not layers: fused experts, and routers.

    experts.gate_up_proj   (experts, 2 * m, n)  or transposed      one matrix per expert
    experts.down_proj      (experts, n, m)      or transposed
    gate.weight            (experts, n)                            a plain product within a router's forward

transformers runs the fused experts of all its models by one interface (`use_experts_implementation`): hidden states
(tokens, n), and the experts and their shares of each token, both (tokens, k). Each pair of a token and one of its
experts is one row here, sorted by expert; its token says to which row of the batch it belongs, so every row can be
under adapters of its own:

    pairs      t0-e1  t2-e1 | t0-e3  t1-e3 | t1-e5  t2-e5       y = W[e] x + B[e] ( g[row of t] * (A[e] x) )
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from lora_rt.core.engine.wrappers import bare_modules

_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "down_proj")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that an adapter can act on: of `experts` matrices, or of one where that is 0."""

    module: nn.Module
    leaf: str
    out_features: int
    in_features: int
    experts: int


def find_parameters(model: nn.Module) -> dict[str, Parameter]:
    """Name -> the parameters of fused experts, and those that a router of transformers' multiplies with."""
    found: dict[str, Parameter] = {}
    for name, module in bare_modules(model):
        if are_experts(module):
            for leaf, value in module.named_parameters(recurse=False):
                if value.dim() == 3:
                    count, out, width = value.shape
                    if module.is_transposed:
                        out, width = width, out
                    found[f"{name}.{leaf}"] = Parameter(module, leaf, out, width, count)
        elif type(module).__name__.endswith(("Router", "Gate")) and not isinstance(module, nn.Linear):
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2:
                found[f"{name}.weight"] = Parameter(module, "weight", weight.shape[0], weight.shape[1], 0)
    return found


def are_experts(module: Any) -> bool:
    """Whether a module is what transformers' experts interface runs."""
    return all(hasattr(module, mark) for mark in _MARKS) and isinstance(module.down_proj, Tensor)


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of a pass through some experts, sorted by expert: `tokens` and `experts` of each, both (pairs,).

    `shown` is how many tokens the experts were given, `count` how many experts there are.
    """

    tokens: Tensor
    experts: Tensor
    shown: int
    count: int

    @cached_property
    def _parts(self) -> list[tuple[int, int, int]]:
        """(expert, first pair, one behind its last) of the experts that have any."""
        bounds = torch.searchsorted(self.experts, torch.arange(self.count + 1, device=self.experts.device))
        try:
            ends: list[int] = bounds.tolist()
        except RuntimeError:  # a fake tensor has no values; memory is the same whichever expert takes the pairs
            return [(0, 0, len(self.experts))]
        return [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(ends)) if a < b]

    def products(self, x: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
        """The rows of x (pairs, n) times the matrix of their expert, weight (experts, m, n) or (experts, n, m)."""
        made = [x[a:b] @ weight[e] if transposed else linear(x[a:b], weight[e]) for e, a, b in self._parts]
        return torch.cat(made) if made else x.new_empty(0, weight.shape[2 if transposed else 1])


Add = Callable[[str, Tensor, Tensor, Pairs], Tensor]
"""What to add at a parameter of this name: x (pairs, n), y (pairs, m)."""


def run_experts(module: Any, hidden: Tensor, index: Tensor, shares: Tensor, add: Add) -> Tensor:
    """The forward pass of fused experts, with what adapters add to each product.

    Args:
        hidden: (tokens, n).
        index, shares: the experts of each token and their shares, (tokens, k); a number beyond the experts is none.
    """
    chosen, count = index.reshape(-1), len(module.down_proj)
    order = chosen.argsort(stable=True)
    pairs = Pairs(order // index.shape[-1], chosen[order].clamp(max=count - 1), len(hidden), count)

    def product(leaf: str, x: Tensor) -> Tensor:
        y = pairs.products(x, getattr(module, leaf), transposed=module.is_transposed)
        if module.has_bias:
            y = y + getattr(module, f"{leaf}_bias")[pairs.experts]
        return add(leaf, x, y, pairs)

    first = product("gate_up_proj" if module.has_gate else "up_proj", hidden[pairs.tokens])
    made = product("down_proj", module._apply_gate(first) if module.has_gate else module.act_fn(first))
    if getattr(module, "has_post_expert_norm", False):
        made = module.post_expert_norm(made)
    weights = torch.where(chosen < count, shares.reshape(-1), 0)[order, None]
    slots = torch.empty_like(made)
    slots[order] = (made * weights).to(made.dtype)
    return slots.view(*index.shape, -1).sum(1).to(hidden.dtype)


def run_without_values(model: nn.Module) -> None:
    """Let fused experts run on tensors that have no values: transformers' ways ask the data who goes where."""

    def alone(module: nn.Module, *args: Any, **named: Any) -> Tensor:
        return run_experts(module, *given_to_experts(args, named), lambda _leaf, _x, y, _pairs: y)

    for module in {one.module for one in find_parameters(model).values() if one.experts}:
        module.forward = partial(alone, module)


class Products(TorchFunctionMode):
    """While it stands, `seen(name, x, y)` is asked what `linear(x, parameter)` gives; casts are followed."""

    def __init__(self, parameters: Mapping[str, Tensor], seen: Callable[[str, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._kept: list[Tensor] = []  # what was cast, so that its address is not used twice
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation."""
        result = func(*args, **(kwargs or {}))
        if func is linear and len(args) > 1 and (name := self._names.get(id(args[1]))) is not None:
            return self._seen(name, args[0], result)
        if func in _CASTS and args and (name := self._names.get(id(args[0]))) is not None:
            self._names[id(result)] = name
            self._kept.append(result)
        return result


_CASTS = (Tensor.float, Tensor.to, Tensor.type)


Note = Callable[[str, Tensor], None]
"""Told of each parameter that a pass multiplies with, and what it gets."""


def watched_products(model: nn.Module, note: Note) -> Products:
    """Notes what routers multiply with."""
    parameters = {n: getattr(p.module, p.leaf) for n, p in find_parameters(model).items() if not p.experts}

    def seen(name: str, x: Tensor, y: Tensor) -> Tensor:
        note(name, x)
        return y

    return Products(parameters, seen)


def watched_experts(model: nn.Module, note: Note) -> list[Any]:
    """Notes what fused experts get; the hooks that do it, to be removed."""

    def told(name: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        note(name, given_to_experts(args, named)[0])

    found = {n: p for n, p in find_parameters(model).items() if p.experts}
    return [p.module.register_forward_pre_hook(partial(told, n), with_kwargs=True) for n, p in found.items()]


def given_to_experts(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and shares, however they were given."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = dict(zip(names, args, strict=False)) | dict(named)
    return given["hidden_states"], given["top_k_index"], given["top_k_weights"]
