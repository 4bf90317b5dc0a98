"""Where adapters can act: every linear layer of a model, which of them read the same input, and where the heads lie."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_rt.core.base.shape import Heads, heads_of
from lora_rt.core.base.silence import libraries_silenced

Side = Literal["output", "input"]


@dataclass(frozen=True, slots=True)
class HeadAxis:
    """Where attention heads lie on a layer: `index[f]` is the head of feature f on its output or input side.

    For key and value projections under grouped-query attention the heads are the fewer key/value heads, each of which
    stands for `pool` query heads.
    """

    side: Side
    index: Tensor  # (features,) int64
    pool: int = 1


@dataclass(frozen=True, slots=True)
class Site:
    """One linear layer. `layer` is its block's number, or None outside; `group` unites sites with one input."""

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    layer: int | None
    group: int
    heads: HeadAxis | None


class Topology:
    """All sites of a model, in the order in which a forward pass meets them."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.by_name: Mapping[str, int] = {site.name: index for index, site in enumerate(sites)}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Site name -> (out_features, in_features)."""
        return {site.name: (site.out_features, site.in_features) for site in self.sites}

    def groups_of(self, adapters: Sequence[Container[str]]) -> dict[int, list[int]]:
        """Group -> the indices of its sites, of those where at least one of the adapters acts."""
        members: dict[int, list[int]] = {}
        for index, site in enumerate(self.sites):
            if any(site.name in adapter for adapter in adapters):
                members.setdefault(site.group, []).append(index)
        return members


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every torch Linear (bitsandbytes' are subclasses) and every Conv1D of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features). Not read off the weight: a quantized one is packed, a Conv1D's is transposed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    rows, columns = module.weight.shape  # type: ignore[misc]  # Conv1D: (in, out)
    return int(columns), int(rows)


def block_number(name: str) -> int | None:
    """The number of the block that a layer of this name lies in; None outside the blocks (an output head)."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def survey(model: Any) -> Topology:
    """Run one short forward pass and note which linear layers read the very same tensor.

    The pass also makes bitsandbytes repack its 4-bit weights for CPU inference, once and before anything else runs: the
    repack is a race between threads and changes the weights' bytes.
    """
    linears = find_linears(model)
    order: list[str] = []
    inputs: list[Tensor] = []  # kept alive during the pass, so that an address is not used twice
    groups: dict[str, int] = {}

    def note(name: str, x: Tensor) -> None:
        order.append(name)
        for group, seen in enumerate(inputs):
            if seen is x:
                groups[name] = group
                return
        groups[name] = len(inputs)
        inputs.append(x)

    handles = [
        module.register_forward_pre_hook(lambda _module, args, name=name: note(name, args[0]))
        for name, module in linears.items()
    ]
    try:
        # No inference mode: what is repacked now has to serve passes with gradients as well.
        with libraries_silenced(), torch.no_grad():
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for name in linears:  # layers that this pass did not reach, e.g. idle experts, stand alone
        if name not in groups:
            order.append(name)
            groups[name] = len(inputs) + len(order)
    return Topology([_site(name, linears[name], groups[name], model) for name in dict.fromkeys(order)])


def _site(name: str, module: nn.Module, group: int, model: Any) -> Site:
    out_features, in_features = features(module)
    heads = _head_axis(name, out_features, in_features, heads_of(model.config), model.device)
    return Site(name, module, out_features, in_features, block_number(name), group, heads)


def _head_axis(name: str, out_features: int, in_features: int, own: Heads, device: torch.device) -> HeadAxis | None:
    """The heads of an attention projection, by its name and width; None for every other layer."""
    *parents, leaf = name.split(".")
    if not parents or "att" not in parents[-1]:
        return None
    heads, kv_heads, size = own.queries, own.keys, own.size

    def each(count: int) -> Tensor:
        return torch.arange(count, device=device).repeat_interleave(size)

    if leaf in ("q_proj", "query", "k_proj", "v_proj", "key", "value"):
        if out_features == heads * size:
            return HeadAxis("output", each(heads))
        if out_features == kv_heads * size:
            return HeadAxis("output", each(kv_heads), pool=heads // kv_heads)
    if leaf == "c_attn" and out_features == 3 * heads * size:  # GPT-2: [q | k | v]
        return HeadAxis("output", each(heads).repeat(3))
    if leaf == "query_key_value" and out_features == 3 * heads * size:  # GPT-NeoX: [q k v] of each head
        return HeadAxis("output", torch.arange(heads, device=device).repeat_interleave(3 * size))
    if leaf in ("o_proj", "out_proj", "c_proj", "dense") and in_features == heads * size:
        return HeadAxis("input", each(heads))
    return None
