"""What bitsandbytes has packed of a model: how much it is, and where packing and the model do not fit together.

It packs linear layers, and some models keep their weights elsewhere, or multiply with a layer's weight themselves.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_rt.core.base.choices import QUANTIZED
from lora_rt.core.base.fused import PackedMatrices, dequantized
from lora_rt.core.base.reading import UNREADABLE
from lora_rt.core.base.roles import anywhere
from lora_rt.core.base.shape import ForwardPass, device_of, vocabulary_of

_MOST = 0.9  # of the blocks' weights: where more is packed, there is nothing to say


def packed_share(model: Any) -> tuple[float, list[str]]:
    """The share of the weights outside embedding and head that is packed, and what keeps the most of the rest.

    Biases and norms are not counted. Of what is left dense, at most three names, the largest first.
    """
    ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    packed = 0
    dense: dict[str, int] = {}
    for name, module in model.named_modules():
        if id(module) in ends:
            continue
        if isinstance(module, PackedMatrices):
            packed += module.numel()
        for key, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "quant_state") or hasattr(parameter, "CB"):
                packed += int(module.out_features) * int(module.in_features)
            elif parameter.dim() > 1:
                what = _called(name, key, module)
                dense[what] = dense.get(what, 0) + parameter.numel()
    total = packed + sum(dense.values())
    return (packed / total if total else 0.0), sorted(dense, key=dense.__getitem__, reverse=True)[:3]


def remark(model: Any, precision: str) -> str | None:
    """What a quantized base is in fact, for one line; None where it is what its precision says."""
    if precision not in QUANTIZED:
        return None
    share, left = packed_share(model)
    if share >= _MOST:
        return None
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    stay = f"{', '.join(left)} stay {dtype}" if left else f"the rest stays {dtype}"
    return f"{precision}: {share:.0%} of the weights; {stay}"


def _called(name: str, key: str, module: nn.Module) -> str:
    """What people call it: the experts, or the last part of the layer's name."""
    whole = f"{name}.{key}"
    if re.search(r"(^|\.)experts\.", whole):
        return "the experts"
    return name.rpartition(".")[2] or key


def fit_to_model(model: Any) -> None:
    """Mend in place what of a packed model could not be run."""
    named = [*model.named_modules()]
    by_kind = {kind: _read_by(kind) for kind in {type(module) for _, module in named}}
    meta = model.device.type == "meta"  # where no pass tells whether asking for a dtype does harm: it seldom does
    read = {
        f"{name}.{leaf}": (module, leaf)
        for name, module in named
        for leaf, casts in by_kind[type(module)].items()
        if not (casts and meta)
    }
    packed = {
        name: module for name, (parent, leaf) in read.items() if _is_packed(module := getattr(parent, leaf, None))
    }
    for module in model.modules():
        if _is_packed(module) and not hasattr(module.weight, "quant_state"):
            module.forward = partial(_as_rows, module)
    while found := [*packed] if meta else _misread(model, packed):
        for name in found:
            setattr(*read[name], _unpacked(packed.pop(name)))


def _misread(model: Any, packed: Mapping[str, Any]) -> list[str]:
    """Those of these layers whose weight something else than the layer itself makes use of in a short pass.

    Or that are given whole numbers: what they were given was cast to their weight's dtype.
    """
    if not packed:
        return []
    names = {id(module.weight): name for name, module in packed.items()}
    inside: list[Any] = []
    cast: set[str] = set()

    def enter(module: Any, given: tuple[Any, ...]) -> None:
        inside.append(module)
        if given and not given[0].is_floating_point():
            cast.add(names[id(module.weight)])

    handles = [m.register_forward_pre_hook(enter) for m in packed.values()]
    handles += [m.register_forward_hook(lambda *_: inside.pop() and None) for m in packed.values()]
    watch = _Watch(lambda tensors: {names[id(t)] for t in tensors if id(t) in names and not inside})
    ids = torch.tensor([[1, 2, 3]], device=device_of(model)).remainder(vocabulary_of(model.config))
    try:
        with torch.no_grad(), watch:
            model(**ForwardPass.of(model).arguments(ids))
    except UNREADABLE:  # where the packed weight was taken for a matrix
        pass
    finally:
        for handle in handles:
            handle.remove()
    # The blocks behind the first are not reached where that fails.
    kinds = {anywhere(name) for name in watch.found | cast}
    return [name for name in packed if anywhere(name) in kinds]


class _Watch(TorchFunctionMode):
    """Notes what `which` says of the tensors that torch's functions are given."""

    def __init__(self, which: Callable[[Sequence[Any]], set[str]]) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._which = which

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation; those that ask for a dtype or a shape are called `__get__`."""
        if getattr(func, "__name__", "") != "__get__":
            self.found |= self._which(args)
        return func(*args, **(kwargs or {}))


def _as_rows(module: Any, x: Tensor) -> Tensor:
    """A layer of bitsandbytes in 8 bits over any x (..., n): by itself it takes three axes at most."""
    y: Tensor = type(module).forward(module, x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], y.shape[-1])


def _is_packed(module: Any) -> bool:
    return isinstance(module, nn.Linear) and type(module.weight).__name__ in ("Params4bit", "Int8Params")


def _unpacked(module: Any) -> nn.Linear:
    """A packed layer whose weight is dense again."""
    weight: Any = module.weight
    if weight.is_meta:  # a base without its weights
        dtype = getattr(module, "compute_dtype", None) or torch.float16
        dense = torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta")
    elif hasattr(weight, "quant_state"):
        dense = dequantized(weight.data, weight.quant_state)
    else:
        scales = module.state.SCB if weight.SCB is None else weight.SCB  # where it lies once the layer has run
        dense = (weight.data.float() * (scales[:, None].float() / 127)).half()
    made = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    made.weight = nn.Parameter(dense, requires_grad=False)
    made.bias = module.bias
    return made.train(module.training)


def _read_by(kind: type) -> dict[str, bool]:
    """The layers of which a class of transformers' reads `self.LAYER.weight`, and whether for its dtype alone."""
    found: dict[str, bool] = {}
    own = (one for one in kind.__mro__ if one.__module__.startswith("transformers.models."))
    for function in (value for one in own for value in vars(one).values() if isinstance(value, FunctionType)):
        steps = [*dis.get_instructions(inspect.unwrap(function))]
        for layer, weight, use in zip(steps, steps[1:], steps[2:], strict=False):
            names = {layer.opname, weight.opname} == {"LOAD_ATTR"} and weight.argval == "weight"
            if names and use.argval not in ("device", "shape"):
                found[str(layer.argval)] = found.get(str(layer.argval), True) and use.argval == "dtype"
    return found
