"""One adapted layer: which tensors of a file are its factors, and whether these fit configuration and base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_rt.registry.inspection.keys import MAGNITUDE, is_embedding
from lora_rt.registry.inspection.safetensors_header import TensorEntry
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.strict_json import shown

FLOATS = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
MAX_RANK = 4096
MERGE = "merge it into its base, and extract a plain LoRA"
Linears = Mapping[str, tuple[int, ...]]
"""Path -> (out, in) of a linear layer or a router's parameter, (experts, out, in) of a parameter of fused experts."""
Parts = dict[str, TensorEntry]
"""The tensors of one layer by their part: lora_A.weight, lora_B.weight, lora_B.bias, lora_magnitude_vector."""


@dataclass(frozen=True, slots=True)
class OldExpert:
    """A layer of one expert, in a file that is older than fused experts: its number, and its part of the fused rows."""

    number: int
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted linear layer, or an embedding, whose `in` is the number of tokens.

    `of_weight` says that not the layer but its weight was adapted (`target_parameters`), as it lies in memory: turned,
    where it is a Conv1D's or an embedding's, which is not composed.

    `module` is its path in the base; A (`a_key`) is (rank, in), B (`b_key`) is (out, rank), the bias of B where there
    is one is (out,). The layer adds `scaling * B A x`, and `scaling * bias`. DoRA's magnitude is (out,).

    Of a parameter of fused experts (`experts` above 0) A is (experts * rank, in) and B (out, rank * experts), the
    experts outside in A and inside in B.
    """

    module: str
    rank: int
    scaling: float
    a_key: str
    b_key: str
    bias_key: str | None
    experts: int = 0
    magnitude_key: str | None = None
    embeds: bool = False
    expert: OldExpert | None = None
    of_weight: bool = False


@dataclass(frozen=True, slots=True)
class TokenModule:
    """An embedding some of whose rows were trained: (k, n) in the file, of the tokens `ids`."""

    module: str
    ids: tuple[int, ...]
    key: str


def module_problems(
    paths: tuple[str, str],
    found: Mapping[str, TensorEntry],
    settings: LoraSettings,
    linears: Linears | None,
) -> list[str]:
    module = paths[0]
    problems = [f"{shown(module)} has no {part}" for part in ("lora_A.weight", "lora_B.weight") if part not in found]
    if settings.lora_bias and "lora_B.bias" not in found:
        problems.append(f"{shown(module)} has no lora_B.bias though lora_bias is true")
    if not settings.lora_bias and "lora_B.bias" in found:
        problems.append(f"{shown(module)} has a lora_B.bias though lora_bias is not true")
    if settings.dora and MAGNITUDE not in found:
        problems.append(f"{shown(module)} has no {MAGNITUDE}, which DoRA needs (use_dora is true)")
    if not settings.dora and MAGNITUDE in found:
        problems.append(f"{shown(module)} has a {MAGNITUDE} of DoRA though use_dora is not true")
    if settings.dora and "lora_A.weight" in found and is_embedding(found["lora_A.weight"].key):
        problems.append(f"{shown(module)} is an embedding with DoRA; merge it into its base, and extract a plain LoRA")
    size = linears.get(module) if linears is not None else None
    if linears is not None and size is None and settings.adapts_parameters_of(module):
        return [f"{shown(module)}: its parameters (target_parameters) are not composed on this base; {MERGE}"]
    if linears is not None and size is None:
        problems.append(f"{shown(module)} is not a linear layer of this base")
    elif not (
        settings.adapts(*paths, module.removesuffix(".weight"))
        or settings.adapts_parameter(module)
        or settings.adapts_parameter(f"{module}.weight")
        or settings.is_tied(module)
    ):
        if size is None and settings.parameters:
            return problems  # a parameter's, maybe: its base tells
        problems.append(f"{shown(module)} has tensors but is not among target_modules")
    wrong = shape_problems(settings.rank_of(*paths), found, size)
    if wrong and settings.adapts_parameter(f"{module}.weight") and not settings.adapts(*paths):
        wrong = [f"{shown(module)}: its weight (target_parameters) lies turned in this base; {MERGE}"]
    return problems + wrong


def shape_problems(rank: int, found: Mapping[str, TensorEntry], size: tuple[int, ...] | None) -> list[str]:
    out_features, in_features = size[-2:] if size else (None, None)
    if size and len(size) == 3:
        rank *= size[0]
    wanted: Mapping[str, tuple[int | None, ...]] = {
        "lora_A.weight": (rank, in_features),
        "lora_B.weight": (out_features, rank),
        "lora_B.bias": (out_features,),
        MAGNITUDE: (out_features,),
    }
    ranks = {"lora_A.weight": 0, "lora_B.weight": 1}
    problems = []
    for part, entry in found.items():
        if _fits(entry.shape, wanted[part]):
            continue
        place = ranks.get(part)
        otherwise = tuple(None if at == place else size for at, size in enumerate(wanted[part]))
        why = " by r or rank_pattern" if place is not None and _fits(entry.shape, otherwise) else ""
        problems.append(f"{shown(entry.key)} is {shape_text(entry.shape)}, should be {shape_text(wanted[part])}{why}")
    return problems


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, have) for have, want in zip(shape, wanted, strict=True))


def shape_text(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def lora_module(
    paths: tuple[str, str], found: Mapping[str, TensorEntry], settings: LoraSettings, experts: int
) -> LoraModule:
    bias, magnitude = found.get("lora_B.bias"), found.get(MAGNITUDE)
    return LoraModule(
        module=paths[0],
        rank=settings.rank_of(*paths),
        scaling=settings.scaling_of(*paths),
        a_key=found["lora_A.weight"].key,
        b_key=found["lora_B.weight"].key,
        bias_key=bias.key if bias else None,
        experts=experts,
        magnitude_key=magnitude.key if magnitude else None,
        embeds=is_embedding(found["lora_A.weight"].key),
        of_weight=not settings.adapts(*paths) and settings.adapts_parameter(f"{paths[0]}.weight"),
    )
