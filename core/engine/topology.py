"""Where adapters can act: every linear layer of a model, which of them read the same input, and where the heads lie."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_rt.core.base.reading import UNREADABLE as UNRUNNABLE
from lora_rt.core.base.shape import ForwardPass, Heads, blocks_of, heads_of, vocabulary_of
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import BaseError, first_line
from lora_rt.core.engine.layout import PROBES, Layout, layout_of

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
    """One linear layer. `layer` is its block's number, or None outside; `group` unites sites with one input.

    `layout` says how rows and tokens lie in that input; None where that can't be told, as with an expert of several.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    layer: int | None
    group: int
    heads: HeadAxis | None
    layout: Layout | None = ("b", "t")


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


def layer_numbers(model: Any) -> Callable[[str], int | None]:
    """Says of a layer's name in which of the model's blocks it lies; None outside of them."""
    blocks = blocks_of(model)
    count = len(blocks)
    inside = next((f"{name}." for name, module in model.named_modules() if module is blocks), "")

    def number(name: str) -> int | None:
        found = block_number(name[len(inside) - 1 :] if inside and name.startswith(inside) else name)
        return found if found is not None and found < count else None

    return number


def survey(model: Any) -> Topology:
    """Run two short forward passes and note what each linear layer gets: how rows and tokens lie, and who shares it.

    The passes also make bitsandbytes repack its 4-bit weights for CPU inference, once and before anything else runs:
    the repack is a race between threads and changes the weights' bytes.

    Raises:
        BaseError: the model can't be run.
    """
    linears = find_linears(model)
    seen = [_watched(model, linears, rows, tokens) for rows, tokens in PROBES]
    order, groups = list(dict.fromkeys(name for name, _ in seen[0])), _groups(seen[0])
    layouts = _layouts(linears, [dict(reversed(calls)) for calls in seen])
    for name in linears:  # layers that this pass did not reach, e.g. idle experts, stand alone
        if name not in groups:
            order.append(name)
            groups[name] = len(seen[0]) + len(order)
    layer = layer_numbers(model)
    heads = heads_of(model.config)
    sites = []
    for name in order:
        size = features(linears[name])
        axis = _head_axis(name, *size, heads, model.device)
        sites.append(Site(name, linears[name], *size, layer(name), groups[name], axis, layouts[name]))
    return Topology(sites)


def _watched(model: Any, linears: Mapping[str, nn.Module], rows: int, tokens: int) -> list[tuple[str, Tensor]]:
    """The layers of one pass over rows that are alike, in the order of their calls, and what each call got."""
    calls: list[tuple[str, Tensor]] = []  # keeps the inputs alive, so that an address is not used twice
    handles = [
        module.register_forward_pre_hook(lambda _module, args, name=name: calls.append((name, args[0])))
        for name, module in linears.items()
    ]
    ids = (torch.arange(tokens, device=model.device) + 1).remainder(vocabulary_of(model.config)).repeat(rows, 1)
    forward = ForwardPass.of(model)
    try:
        # No inference mode: what is repacked now has to serve passes with gradients as well.
        with libraries_silenced(), torch.no_grad():
            model(**forward.arguments(ids))
    except UNRUNNABLE as error:
        text = f"{type(model).__name__} can't be run: {first_line(error)}"
        raise BaseError(text, next_step="Use another base or --precision, and report this one") from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _groups(calls: Sequence[tuple[str, Tensor]]) -> dict[str, int]:
    """Equal numbers for layers that read the very same tensor."""
    numbers: dict[int, int] = {}
    return {name: numbers.setdefault(id(x), len(numbers)) for name, x in calls}


def _layouts(linears: Mapping[str, nn.Module], inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Layout | None]:
    """The layout of each layer. One of several experts is shown some of the tokens, even where it once got all."""
    found: dict[str, Layout | None] = {}
    alike: dict[str, set[Layout | None]] = {}
    for name in linears:
        got = [calls[name] for calls in inputs if name in calls]
        found[name] = layout_of(got) if len(got) == len(inputs) else None
        alike.setdefault(_unnumbered(name), set()).add(found[name])
    return {name: layout if len(alike[_unnumbered(name)]) == 1 else None for name, layout in found.items()}


def _unnumbered(name: str) -> str:
    """The name without the numbers of its block and its expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".#", name)


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
