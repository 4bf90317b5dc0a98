"""What inference takes: weights, resident adapters, the KV cache, and the most that a prefill needs beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lora_rt.core.base.choices import Precision
from lora_rt.core.base.fused import pack_experts
from lora_rt.core.base.precision import compute_dtype
from lora_rt.core.base.repacking import forbid_repacking
from lora_rt.core.base.shape import ForwardPass, layers_of
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.plan import Plan
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.engine.stack import Factors
from lora_rt.core.engine.topology import features, shapes_of
from lora_rt.core.forward.causal_lm import CACHES
from lora_rt.core.forward.decoder import can_be_one_call
from lora_rt.core.memory.live import LiveMemory
from lora_rt.core.memory.skeleton import (
    bytes_of,
    largest_dequantized,
    materialise,
    most_copies,
    over_blocks,
    resident,
    skeleton,
)
from lora_rt.core.memory.upstream import FakeTensorMode, FirstExpert, storage_key
from lora_rt.core.memory.workload import Device
from lora_rt.core.multiply.fastest import is_left_unpacked
from lora_rt.core.step.adapter import adaptable, targets
from lora_rt.core.step.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class InferenceMemory:
    """Bytes. `stacked` is the copy of several adapters side by side that a plan over them works with, `narrow` the one
    in bfloat16 that a decoding step in one call reads.

    `copies` is the most that dense copies of the weights take on a CPU. It is not in the total: what does not fit into
    half of the free memory is not kept.
    """

    weights: int
    adapters: int
    stacked: int
    kv_cache: int
    activations: int
    workspace: int
    copies: int = 0
    narrow: int = 0

    @property
    def total(self) -> int:
        return self.fixed + self.per_batch

    @property
    def fixed(self) -> int:
        """What does not grow with the batch."""
        return self.weights + self.adapters + self.stacked + self.narrow + self.workspace

    @property
    def per_batch(self) -> int:
        """What grows with rows and tokens."""
        return self.kv_cache + self.activations


def plan_inference(
    config: Any, precision: Precision, device: Device, settings: TrainSettings, *, adapters: int, rows: int, tokens: int
) -> InferenceMemory:
    """The memory of a prefill of (rows, tokens) under `adapters` adapters of these settings, all of them in use."""

    whole = skeleton(config, precision)
    unpacked = is_left_unpacked(whole, can_be_one_call(whole))

    def measure(model: Any, blocks: nn.ModuleList) -> tuple[int, ...]:
        if precision == "int4":
            pack_experts(model)
        linears = adaptable(model)
        names, parameters = targets(model, settings.target_modules)
        factors: dict[str, tuple[int, ...]] = {name: features(linears[name]) for name in names}
        factors |= {name: shape for name, shape in shapes_of(model).items() if name in parameters}
        with FakeTensorMode(), FirstExpert():
            materialise(model, device)
            packable = [m for m in model.modules() if getattr(m, "support_avx512bf16_for_cpu", False)]
            forbid_repacking(model)  # packed layers go straight to a kernel, which wants real memory
            plan = _plan(model, precision, device, factors, adapters, settings.r)
            per_token, states, activations = _prefill(model, plan, rows, tokens, len(blocks))
            if not unpacked:
                _repack(packable, compute_dtype(precision))
            return (
                bytes_of(model),
                sum(prod(shape[:-2]) * sum(shape[-2:]) for shape in factors.values()),
                per_token,
                states,
                activations,
            )

    weights, features_of_all, per_token, states, activations = over_blocks(config, precision, measure)
    item = (torch.float32 if device == "cpu" else compute_dtype(precision)).itemsize
    resident_bytes = adapters * settings.r * features_of_all * item
    return InferenceMemory(
        weights=weights,
        adapters=resident_bytes,
        stacked=resident_bytes if adapters > 1 else 0,  # that of one adapter mostly shares its memory
        kv_cache=states + (_kv_cache(config, per_token, tokens) if per_token else 0),
        activations=activations,
        workspace=largest_dequantized(whole, precision),
        copies=most_copies(whole, precision, device),
        narrow=resident_bytes // 2 if device == "cpu" and unpacked else 0,
    )


def _prefill(model: Any, plan: Plan | None, rows: int, tokens: int, layers: int) -> tuple[int, int, int]:
    """Bytes of the cache for each token and layer, all rows together; those that do not grow; the peak beside both.

    The first number is the mean over the layers, where they differ. What does not grow are a recurrence's states.
    """
    ids = torch.zeros((rows, tokens), dtype=torch.long)
    arguments = ForwardPass.of(model).arguments(ids, torch.ones_like(ids), 1) | {"use_cache": True}
    running = nullcontext() if plan is None else plan.running(rows, tokens, 1)
    with (
        LiveMemory([*resident(model), *([] if plan is None else plan.tensors())]) as live,
        torch.inference_mode(),
        running,
    ):
        output = model(**arguments)
    kept = next((found for name in CACHES if (found := getattr(output, name, None)) is not None), None)
    pairs = [
        (layer.keys, layer.values)
        for layer in getattr(kept, "layers", ())[:layers]
        if isinstance(getattr(layer, "keys", None), Tensor)
    ]
    growing = {storage_key(t): _size(t) for pair in pairs for t in pair}
    still = {storage_key(t): _size(t) for t in _tensors(kept) if storage_key(t) not in growing}
    per_token = [(keys.nbytes + values.nbytes) // keys.shape[-2] for keys, values in pairs]
    states = sum(still.values())
    return round(sum(per_token) / layers), states, live.peak - sum(growing.values()) - states


def _tensors(kept: Any) -> Iterator[Tensor]:
    """The numbers that a cache holds, whatever it is made of."""
    if isinstance(kept, Tensor):
        yield from [kept] if kept.is_floating_point() else []
    elif isinstance(kept, (list, tuple)):
        for one in kept:
            yield from _tensors(one)
    elif isinstance(kept, dict) or type(kept).__module__.startswith("transformers."):
        yield from _tensors(list(kept.values() if isinstance(kept, dict) else vars(kept).values()))


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _plan(
    model: Any, precision: Precision, device: Device, factors: dict[str, tuple[int, ...]], adapters: int, rank: int
) -> Plan | None:
    """A plan with every adapter in use, made as the runtime makes it; None where there are none."""
    bank = AdapterBank(model, compute_dtype(precision))
    if device != "cpu":
        bank.dtype = compute_dtype(precision)
    names = [str(number) for number in range(adapters)]
    for name in names:
        made = {
            site: Factors(torch.empty(*experts, rank, width), torch.empty(*experts, out, rank))
            for site in bank.topology.by_name
            if site in factors
            for *experts, out, width in [factors[site]]
        }
        bank.add(ResidentAdapter(name, made, "output-only"))
    return bank.plan([dict.fromkeys(names, 1.0)])


def _repack(layers: Sequence[Any], dtype: torch.dtype) -> None:
    """Let bitsandbytes repack 4-bit weights, as the runtime's first forward pass does."""
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
        with torch.no_grad():
            type(layer).forward(layer, torch.empty((1, 1, layer.in_features), dtype=dtype))


def _kv_cache(config: Any, per_token: int, tokens: int) -> int:
    """Bytes of all layers: a layer with a sliding window of w keeps the last w - 1 tokens."""
    layers = DynamicCache(config=config).layers or [None] * layers_of(config)
    return per_token * sum(min(tokens, getattr(layer, "sliding_window", tokens + 1) - 1) for layer in layers)
