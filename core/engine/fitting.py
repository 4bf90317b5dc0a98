"""An adapter over one model: checked against the layers that it names, and put as the factors that these take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.upstream import own_tensors
from lora_rt.core.engine.resident import BankError, ResidentAdapter
from lora_rt.core.engine.special import embedded, of_bias, of_tokens, rescaled, side_by_side, turned, twin
from lora_rt.core.engine.stack import Factors
from lora_rt.core.engine.topology import Site, Topology

_ADDED = ": tokens were added to the base that it was trained on"
_RESIZE = "Resize the base's embedding as it was for the training (resize_token_embeddings), save it, and use that"
_OTHER = "Use the base that it was trained on"


def fitted(
    adapter: ResidentAdapter,
    topology: Topology,
    modules: Mapping[str, nn.Module],
    dtype_on: Callable[[torch.device], torch.dtype],
) -> ResidentAdapter:
    """The adapter with every factor where its layer computes, trained token rows and biases among them.

    Args:
        modules: the model's own of those that the adapter holds as a whole, by name.
        dtype_on: what factors on a device are kept in.

    Raises:
        BankError: a factor names no site of this model or has another shape, all of them listed.
    """
    sites = {site.name: site for site in topology.sites}
    if problems := [*_misfits(adapter, sites), *_misfits_of_whole(adapter, modules)]:
        text = f"the adapter {adapter.name!r} does not fit this base"
        raise BankError(text, problems=problems, next_step=_RESIZE if _ADDED in problems[-1] else _OTHER)
    factors = _with_tokens_and_biases(adapter, topology, sites)
    moved = {name: _moved(one, sites[name], dtype_on(sites[name].device)) for name, one in factors.items()}
    return replace(
        adapter,
        factors=moved,
        apart=bool(adapter.whole) or any(sites[name].layout is None for name in moved),
        plain=not any(one.scale is not None or sites[name].embeds for name, one in moved.items()),
        twins={name: twin(modules[name], tensors) for name, tensors in adapter.whole.items()},
    )


def _misfits(adapter: ResidentAdapter, sites: Mapping[str, Site]) -> Iterator[str]:
    for name, factors in adapter.factors.items():
        site = sites.get(name)
        if site is None:
            yield f"{name}: the model has no such linear layer"
            continue
        count, rank = (site.experts,) if site.experts else (), factors.rank
        a, b = (*count, rank, site.in_features), (*count, site.out_features, rank)
        if factors.a.shape != a or factors.b.shape != b:
            shapes = f"A {tuple(factors.a.shape)} and B {tuple(factors.b.shape)}"
            yield f"{name}: {shapes} do not fit ({site.out_features}, {site.in_features})"
        if factors.bias is not None and factors.bias.shape != (site.out_features,):
            yield f"{name}: the bias {tuple(factors.bias.shape)} does not fit ({site.out_features},)"
    for name, rows in adapter.tokens.items():
        site = sites.get(name)
        sizes = (0, 0) if site is None else (site.in_features, site.out_features)
        words, width = sizes if site is None or site.embeds else sizes[::-1]
        if site is None or rows.values.shape != (len(rows.ids), width):
            yield f"{name}: the model has no embedding of this name and width"
        elif int(rows.ids.max()) >= words:
            yield f"{name}: it trains token {int(rows.ids.max())}, the model has {words:,}"
    for name, bias in adapter.biases.items():
        if name not in sites or bias.shape != (sites[name].out_features,):
            yield f"{name}: the model has no bias of this shape there"
    if not (adapter.factors or adapter.tokens or adapter.biases):
        yield "it has no factors"


def _misfits_of_whole(adapter: ResidentAdapter, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    for name, tensors in adapter.whole.items():
        own = own_tensors(modules[name])[0] if name in modules else {}
        for key, tensor in tensors.items():
            there = own.get(key)
            if there is None or there.shape != tensor.shape:
                mine = "none of this name" if there is None else f"{tuple(there.shape)}"
                longer = there is not None and there.shape[1:] == tensor.shape[1:] and len(tensor) > len(there)
                why = _ADDED if longer and isinstance(modules[name], nn.Embedding | nn.Linear) else ""
                yield f"{name}.{key}: the adapter's is {tuple(tensor.shape)}, the model has {mine}{why}"


def _with_tokens_and_biases(
    adapter: ResidentAdapter, topology: Topology, sites: Mapping[str, Site]
) -> dict[str, Factors]:
    """The adapter's factors, with trained token rows and biases as ranks of their own beside them.

    Two of five words of an embedding of width 3, and the head that is tied to it:

        embedding   a (2, 5): picks the words      b (3, 2): what they became minus what they were
        head        a (2, 3): that change, turned  b (5, 2): the picks, turned
    """
    factors = dict(adapter.factors)

    def beside(name: str, own: Factors) -> None:
        factors[name] = side_by_side(factors.get(name), own)

    for name, rows in adapter.tokens.items():
        site = sites[name]
        own = of_tokens(rows, site.module)
        beside(name, own if site.embeds else turned(own))
        tied = topology.sites if site.embeds else []
        for head in tied:
            if not head.embeds and getattr(head.module, "weight", None) is site.module.weight:
                beside(head.name, turned(own))
    for name, bias in adapter.biases.items():
        beside(name, of_bias(bias, sites[name].module, sites[name].in_features))
    return factors


def _moved(factors: Factors, site: Site, dtype: torch.dtype) -> Factors:
    def move(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().to(device=site.device, dtype=dtype).contiguous()

    if factors.magnitude is not None:
        factors = rescaled(factors, site.module)
    if site.embeds:
        factors = embedded(factors, site.module)
    # Of one matrix, rank after rank lies in memory: so it is multiplied and laid out fastest.
    b = move(factors.b.T).T if factors.b.dim() == 2 else move(factors.b)
    return Factors(move(factors.a), b, move(factors.bias), scale=move(factors.scale))
