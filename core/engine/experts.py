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

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from lora_rt.core.base.fused import PackedMatrices, are_experts, given_to_experts
from lora_rt.core.base.upstream import own_tensors
from lora_rt.core.engine.wrappers import bare_modules


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
            kept = [*own_tensors(module)[0].items(), *module.named_children()]
            for leaf, value in kept:
                if isinstance(value, (Tensor, PackedMatrices)) and value.dim() == 3:
                    count, out, width = value.shape
                    if module.is_transposed:
                        out, width = width, out
                    found[f"{name}.{leaf}"] = Parameter(module, leaf, out, width, count)
        elif type(module).__name__.endswith(("Router", "Gate")) and not isinstance(module, nn.Linear):
            weight = own_tensors(module)[0].get("weight")
            if weight is not None and weight.dim() == 2:
                found[f"{name}.weight"] = Parameter(module, "weight", weight.shape[0], weight.shape[1], 0)
    return found


class ProductsOfParameters(TorchFunctionMode):
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


def watched_products(model: nn.Module, note: Note) -> AbstractContextManager[Any]:
    """Notes what routers multiply with."""
    parameters = {n: getattr(p.module, p.leaf) for n, p in find_parameters(model).items() if not p.experts}
    if not parameters:
        return nullcontext()  # who is told of every operation takes longer than a small base's own pass

    def seen(name: str, x: Tensor, y: Tensor) -> Tensor:
        note(name, x)
        return y

    return ProductsOfParameters(parameters, seen)


def watched_experts(model: nn.Module, note: Note) -> list[Any]:
    """Notes what fused experts get; the hooks that do it, to be removed."""

    def told(name: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        note(name, given_to_experts(args, named)[0])

    found = {n: p for n, p in find_parameters(model).items() if p.experts}
    return [p.module.register_forward_pre_hook(partial(told, n), with_kwargs=True) for n, p in found.items()]
