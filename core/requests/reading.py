"""From an inspected adapter to one in memory: the tensors that the inspection read, with the scaling folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.engine.special import TokenRows
from lora_rt.core.engine.stack import Factors
from lora_rt.core.engine.wrappers import bare_parameters
from lora_rt.registry.inspection import InspectedAdapter, LoraModule, OwnWeights, RawTensor
from lora_rt.registry.inspection.keys import inner_path

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_adapter(inspected: InspectedAdapter, name: str) -> ResidentAdapter:
    """The factors of every module, B (and a bias) already times alpha/r or alpha/sqrt(r), in float32.

    The inspection was asked to load: its tensors are used, no file is opened again.
    """
    factors: dict[str, Factors] = {}
    tensors = inspected.tensors
    for module in inspected.modules:
        if module.expert is not None:
            continue
        bias = as_tensor(tensors[module.bias_key]).float() * module.scaling if module.bias_key else None
        a, b = as_tensor(tensors[module.a_key]).float(), as_tensor(tensors[module.b_key]).float() * module.scaling
        if module.experts:  # (experts * r, in) -> (experts, r, in); (out, r * experts) -> (experts, out, r)
            a = a.view(module.experts, module.rank, -1)
            b = b.view(-1, module.rank, module.experts).permute(2, 0, 1)
        magnitude = as_tensor(tensors[module.magnitude_key]).float() if module.magnitude_key else None
        factors[module.module] = Factors(a, b, bias, magnitude)
    factors |= _fused([module for module in inspected.modules if module.expert is not None], tensors)
    card: Mapping[str, Any] = inspected.card.model_dump() if inspected.card else {}
    state = {key: as_tensor(tensor) for key, tensor in inspected.state.items()}
    whole: dict[str, dict[str, Tensor]] = {}
    for (owner, leaf), key in inspected.whole.items():
        whole.setdefault(owner, {})[leaf] = as_tensor(tensors[key])
    rows = {t.module: TokenRows(torch.tensor(t.ids), as_tensor(tensors[t.key]).float()) for t in inspected.tokens}
    biases = {owner: as_tensor(tensors[key]).float() for owner, key in inspected.biases.items()}
    return ResidentAdapter(
        name,
        factors,
        inspected.mode,
        card,
        state,
        tokens=rows,
        biases=biases,
        whole=whole,
        invocation=inspected.invocation,
    )


def _fused(modules: Sequence[LoraModule], tensors: Mapping[str, RawTensor]) -> dict[str, Factors]:
    """The factors of layers of single experts at the parameters that hold all of them.

    Two layers that one parameter holds lie side by side: A of both below one another, B of each in its own rows.
    """
    found: dict[str, Factors] = {}
    for module in modules:
        own = module.expert
        assert own is not None
        a, b = as_tensor(tensors[module.a_key]).float(), as_tensor(tensors[module.b_key]).float() * module.scaling
        ranks = max(other.rank for other in modules if other.module == module.module)
        if module.module not in found:
            whole_a = a.new_zeros(module.experts, own.parts * ranks, a.shape[1])
            whole_b = b.new_zeros(module.experts, own.parts * len(b), own.parts * ranks)
            found[module.module] = Factors(whole_a, whole_b)
        there, first = found[module.module], own.part * ranks
        there.a[own.number, first : first + len(a)] = a
        there.b[own.number, own.part * len(b) : (own.part + 1) * len(b), first : first + len(a)] = b
    return found


def as_tensor(raw: RawTensor) -> Tensor:
    """The tensor over the bytes that were read, which nobody else holds."""
    return torch.from_numpy(raw.data).view(_DTYPES[raw.dtype]).reshape(raw.shape)


def own_weights(model: nn.Module) -> OwnWeights:
    """Compares a tensor of an adapter's file with the model's own, after the cast that made one of them from the other.

    A tied head is found under its own name. A layer that is kept in 4 or 8 bits equals nothing.
    """
    # The same parameter under every name that it has: a tied head is the embedding.
    own = bare_parameters(model)
    return _comparing(own, own.__getitem__)


def own_weights_in(weight_files: Sequence[Path]) -> OwnWeights:
    """The same with the weights of a base that is not loaded: one tensor of its safetensors files at a time."""
    places: dict[str, Path] = {}
    for path in weight_files:
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    embeddings = [name for name in places if name.split(".")[-2:-1] in (["embed_tokens"], ["wte"], ["embed_in"])]
    alias = embeddings[0] if len(embeddings) == 1 else ""

    def read(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    tied = {} if "lm_head.weight" in places or not alias else {"lm_head.weight": alias}
    return _comparing([*places, *tied], lambda name: read(tied.get(name, name)))


def _comparing(names: Iterable[str], get: Callable[[str], Tensor]) -> OwnWeights:
    there = set(names)
    inner: dict[str, list[str]] = {}
    for name in there:
        inner.setdefault(inner_path(name), []).append(name)

    def compare(name: str, raw: RawTensor) -> bool | None:
        same = [name] if name in there else inner.get(inner_path(name), [])
        if len(same) != 1:
            return None
        given, mine = as_tensor(raw), get(same[0])
        if given.shape != mine.shape or not given.dtype.is_floating_point:
            return False
        kept = mine.detach().cpu()
        return torch.equal(given.to(kept.dtype), kept) or torch.equal(kept.to(given.dtype), given)

    return compare
