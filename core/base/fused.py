"""The fused experts of transformers' models: how they are run here, and how their weights are kept in four bits.

transformers keeps all experts of a mixture in two parameters, which bitsandbytes does not pack, since they are not of a
linear layer: an "int4" Mixtral would be 11% int4. Each expert's matrix is packed by itself (NF4, blocks of 64, scales
quantized once more: what bitsandbytes makes of a linear layer), and unpacked for a product where a token goes to it.
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

from lora_rt.core.base.upstream import gated, own_tensors

_MARKS = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "num_experts", "down_proj")
_BLOCK, _NESTED = 64, 256  # bitsandbytes' own for linear layers


class PackedMatrices(nn.Module):
    """Matrices (experts, m, n) in NF4, of which one is unpacked when it is asked for, as `packed[number]`.

    It takes the place of a parameter: it has its shape, its device, and its name in the module tree.
    """

    packed: Tensor
    scales: Tensor
    offsets: Tensor
    nested: Tensor
    levels: Tensor
    nested_levels: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        for name, tensor in (_nothing(weight) if weight.is_meta else _packed(weight)).items():
            self.register_buffer(name, tensor)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dim(self) -> int:
        """3."""
        return len(self.shape)

    def numel(self) -> int:
        """The number of weights."""
        return self.shape.numel()

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, number: int) -> Tensor:
        """One matrix (m, n), dense."""
        bnb = _bitsandbytes()
        inner = bnb.QuantState(
            absmax=self.nested[number], code=self.nested_levels, blocksize=_NESTED, dtype=torch.float32
        )
        state = bnb.QuantState(
            absmax=self.scales[number], shape=self.shape[1:], code=self.levels, blocksize=_BLOCK, quant_type="nf4",
            dtype=self.dtype, offset=self.offsets[number], state2=inner,
        )  # fmt: skip
        return dequantized(self.packed[number], state)


def dequantized(packed: Tensor, state: Any) -> Tensor:
    """A weight in 4 bits as numbers, by the state that bitsandbytes keeps beside it."""
    dense: Tensor = _bitsandbytes().dequantize_4bit(packed, state)
    return dense


def _bitsandbytes() -> Any:
    """Its functions; a base that is not quantized does not wait for its import."""
    from bitsandbytes import functional

    return functional


def _packed(weight: Tensor) -> dict[str, Tensor]:
    quantize = _bitsandbytes().quantize_4bit
    made = [
        quantize(one.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
        for one in weight.detach()
    ]
    states = [state for _, state in made]
    return {
        "packed": torch.stack([packed for packed, _ in made]),
        "scales": torch.stack([state.absmax for state in states]),
        "offsets": torch.stack([state.offset for state in states]),
        "nested": torch.stack([state.state2.absmax for state in states]),
        "levels": states[0].code,
        "nested_levels": states[0].state2.code,
    }


def _nothing(weight: Tensor) -> dict[str, Tensor]:
    """The same tensors without values: how much memory they take is known without packing anything."""
    count, numbers = len(weight), weight.shape[1:].numel()
    blocks = -(-numbers // _BLOCK)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        "packed": empty(count, (numbers + 1) // 2, 1, dtype=torch.uint8),
        "scales": empty(count, blocks, dtype=torch.uint8),
        "offsets": empty(count),
        "nested": empty(count, -(-blocks // _NESTED)),
        "levels": empty(16),
        "nested_levels": empty(256),
    }


def pack_experts(model: nn.Module) -> int:
    """Pack the matrices of all fused experts of a model in place, one parameter after the other; how many they were.

    From then on the experts are run here: transformers' own ways take their parameters for tensors.
    """
    count = 0
    for module in [module for module in model.modules() if are_experts(module)]:
        for leaf, value in [*module.named_parameters(recurse=False)]:
            if value.dim() == 3 and value.dtype.itemsize == 2:
                del own_tensors(module)[0][leaf]
                module.add_module(leaf, PackedMatrices(value))
                count += 1
                del value
        module.forward = partial(_alone, module)
    return count


def _alone(module: nn.Module, *args: Any, **named: Any) -> Tensor:
    return run_experts(module, *given_to_experts(args, named), lambda _leaf, _x, y, _pairs: y)


def run_without_values(model: nn.Module) -> None:
    """Let fused experts run on tensors that have no values: transformers' ways ask the data who goes where."""
    for module in model.modules():
        if are_experts(module):
            module.forward = partial(_alone, module)


def are_experts(module: Any) -> bool:
    """Whether a module is what transformers' experts interface runs."""
    return all(hasattr(module, mark) for mark in _MARKS) and isinstance(module.down_proj, (Tensor, PackedMatrices))


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
        except RuntimeError:
            ends = [0]
        # Fake tensors have no values; memory is the same whichever expert takes the pairs.
        if ends[-1] != len(self.experts):
            return [(0, 0, len(self.experts))]
        return [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(ends)) if a < b]

    def products(self, x: Tensor, weight: Tensor | PackedMatrices, *, transposed: bool = False) -> Tensor:
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
    made = product("down_proj", gated(module, first) if module.has_gate else module.act_fn(first))
    if getattr(module, "has_post_expert_norm", False):
        made = module.post_expert_norm(made)
    weights = torch.where(chosen < count, shares.reshape(-1), 0)[order, None]
    slots = torch.empty_like(made)
    slots[order] = (made * weights).to(made.dtype)
    return slots.view(*index.shape, -1).sum(1).to(hidden.dtype)


def given_to_experts(args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, experts and shares, however they were given."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    given = dict(zip(names, args, strict=False)) | dict(named)
    return given["hidden_states"], given["top_k_index"], given["top_k_weights"]
