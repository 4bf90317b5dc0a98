"""From tensor names to adapted modules: which A belongs to which B, and whether both fit configuration and base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_rt.registry.inspection.safetensors_header import TensorEntry
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.strict_json import shown

PREFIX = "base_model.model."
FLOATS = ("F32", "F16", "BF16")

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias)")
_LAYER = re.compile(r"(^|\.)\d+\.")
Linears = Mapping[str, tuple[int, int]]
_Parts = dict[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted linear layer.

    `module` is its path in the base; A (`a_key`) is (rank, in), B (`b_key`) is (out, rank), the bias of B where there
    is one is (out,). The layer adds `scaling * B A x`, and `scaling * bias`.
    """

    module: str
    rank: int
    scaling: float
    a_key: str
    b_key: str
    bias_key: str | None


def pair_modules(
    entries: Mapping[str, TensorEntry], settings: LoraSettings, linears: Linears | None
) -> tuple[tuple[LoraModule, ...], list[str]]:
    """The adapted modules in the base's order (by name without a base), and everything that is wrong with tensors."""
    parts, problems = _group(entries)
    expected = _expected(settings, linears)
    modules: list[LoraModule] = []
    for module in _ordered(parts, linears):
        wrong = _module_problems(module, parts[module], settings, linears)
        problems += wrong
        if not wrong:
            modules.append(_lora_module(module, parts[module], settings))
    missing = [module for module in expected or () if module not in parts and _is_required(module, settings)]
    problems += [f"{shown(module)} is to be adapted and has no tensors" for module in missing]
    if linears is not None and not expected:
        problems.append("target_modules selects no linear layer of this base")
    return tuple(modules), problems


def _group(entries: Mapping[str, TensorEntry]) -> tuple[dict[str, _Parts], list[str]]:
    parts: dict[str, _Parts] = {}
    problems = []
    for key, entry in entries.items():
        found = _KEY.fullmatch(key.removeprefix(PREFIX))
        if found is None:
            problems.append(f"{shown(key)} is {_what(key)}")
            continue
        group = parts.setdefault(found["module"], {})
        if found["part"] in group:
            problems.append(f"{shown(key)} is there twice, with and without {PREFIX!r}")
        group[found["part"]] = entry
        if entry.dtype not in FLOATS:
            problems.append(f"{shown(key)} is {entry.dtype}; {', '.join(FLOATS)} are loaded")
    return parts, problems


def _what(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "a DoRA magnitude, which does not add up; merge the adapter and extract a plain LoRA"
    if "lora_embedding_" in key:
        return "a LoRA of an embedding, which is not composed; train without embeddings in target_modules"
    if "lora_" in key:
        return "no tensor that is known of a LoRA"
    return "a weight of the base, which no adapter may replace"


def _expected(settings: LoraSettings, linears: Linears | None) -> dict[str, None] | None:
    if linears is None:
        return None
    return dict.fromkeys(module for module in linears if settings.selects(module))


def _is_required(module: str, settings: LoraSettings) -> bool:
    # "all-linear" leaves out the output head, which lies outside of the numbered layers.
    return not settings.all_linear or _LAYER.search(module) is not None


def _ordered(parts: Mapping[str, _Parts], linears: Linears | None) -> Iterable[str]:
    if linears is None:
        return sorted(parts)
    return [*(name for name in linears if name in parts), *sorted(name for name in parts if name not in linears)]


def _module_problems(
    module: str,
    found: Mapping[str, TensorEntry],
    settings: LoraSettings,
    linears: Linears | None,
) -> list[str]:
    problems = [f"{shown(module)} has no {part}" for part in ("lora_A.weight", "lora_B.weight") if part not in found]
    if settings.lora_bias and "lora_B.bias" not in found:
        problems.append(f"{shown(module)} has no lora_B.bias though lora_bias is true")
    if not settings.lora_bias and "lora_B.bias" in found:
        problems.append(f"{shown(module)} has a lora_B.bias though lora_bias is not true")
    if linears is not None and module not in linears:
        problems.append(f"{shown(module)} is no linear layer of this base")
    elif not settings.selects(module):
        problems.append(f"{shown(module)} has tensors but is not among target_modules")
    size = linears.get(module) if linears is not None else None
    problems += _shape_problems(module, found, settings, size)
    return problems


def _shape_problems(
    module: str, found: Mapping[str, TensorEntry], settings: LoraSettings, size: tuple[int, int] | None
) -> list[str]:
    rank = settings.rank_of(module)
    out_features, in_features = size or (None, None)
    wanted: Mapping[str, tuple[int | None, ...]] = {
        "lora_A.weight": (rank, in_features),
        "lora_B.weight": (out_features, rank),
        "lora_B.bias": (out_features,),
    }
    return [
        f"{shown(entry.key)} is {_shape(entry.shape)}, should be {_shape(wanted[part])}"
        for part, entry in found.items()
        if not _fits(entry.shape, wanted[part])
    ]


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, have) for have, want in zip(shape, wanted, strict=True))


def _shape(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"


def _lora_module(module: str, found: Mapping[str, TensorEntry], settings: LoraSettings) -> LoraModule:
    bias = found.get("lora_B.bias")
    return LoraModule(
        module=module,
        rank=settings.rank_of(module),
        scaling=settings.scaling_of(module),
        a_key=found["lora_A.weight"].key,
        b_key=found["lora_B.weight"].key,
        bias_key=bias.key if bias else None,
    )
