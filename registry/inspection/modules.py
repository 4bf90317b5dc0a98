"""From tensor names to adapted modules: which A belongs to which B, and whether both fit configuration and base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lora_rt.registry.inspection import kinds
from lora_rt.registry.inspection.keys import (
    MAGNITUDE,
    PREFIX,
    base_key,
    inner_path,
    is_embedding,
    lora_key,
    renamed,
    tokens_key,
    whole_key,
)
from lora_rt.registry.inspection.safetensors_header import TensorEntry
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.strict_json import shown

FLOATS = ("F32", "F16", "BF16")
MAX_RANK = 4096
MAX_EXPERTS = 1024

# What PEFT copies out of the base into an adapter's file: biases, and embedding and head when it adapts one of them.
_COPIED = re.compile(r"(.*\.)?(base_layer\.weight|(lm_head|embed_tokens|embed_out|embed_in|wte|output)\.weight|bias)")
_FIRST, _SECOND = (re.compile(rf"\.lora_(embedding_)?{part}(\.|$)") for part in "AB")
_LAYER = re.compile(r"(^|\.)\d+\.")
_OLD_EXPERT = re.compile(
    r"(?P<block>.+)\.(block_sparse_moe|mlp|feed_forward)\.experts\.(?P<number>\d{1,4})\."
    r"(?P<leaf>w1|w2|w3|gate_proj|up_proj|down_proj)"
)
_OLD_LEAVES = {
    **dict.fromkeys(("w1", "gate_proj"), ("gate_up_proj", 0, 2)),
    **dict.fromkeys(("w3", "up_proj"), ("gate_up_proj", 1, 2)),
    **dict.fromkeys(("w2", "down_proj"), ("down_proj", 0, 1)),
}
Linears = Mapping[str, tuple[int, ...]]
"""Path -> (out, in) of a linear layer or a router's parameter, (experts, out, in) of a parameter of fused experts."""
_Parts = dict[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class OldExpert:
    """A layer of one expert, in a file that is older than fused experts: its number, and its part of the fused rows."""

    number: int
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted linear layer, or an embedding, whose `in` is the number of tokens.

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


@dataclass(frozen=True, slots=True)
class TokenModule:
    """An embedding some of whose rows were trained: (k, n) in the file, of the tokens `ids`."""

    module: str
    ids: tuple[int, ...]
    key: str


@dataclass(frozen=True, slots=True)
class Pairing:
    """What the tensors are: adapted modules, trained token rows, modules that were trained as a whole by the base's
    (module, weight | bias), and tensors that claim to be the base's own by their name in the base.
    """

    modules: tuple[LoraModule, ...]
    copies: Mapping[str, str]
    problems: list[str]
    tokens: tuple[TokenModule, ...] = ()
    whole: Mapping[tuple[str, str], str] = field(default_factory=dict)


def pair_modules(entries: Mapping[str, TensorEntry], settings: LoraSettings, linears: Linears | None) -> Pairing:
    """The adapted modules in the base's order (by name without a base), and everything that is wrong with tensors.

    A path that the base does not have is looked for under its other names (`keys.renamed`).
    """
    given, copies, problems, special = _group(entries, settings)
    wanted = [*given, *special.tokens]
    new_paths = {**renamed(wanted, linears or ()), **parameter_paths(given, settings, linears or {})}
    new_paths |= _old_routers(given, linears or {})
    tokens = tuple(_tokens(special, settings, new_paths, problems))
    old_paths = {new_paths.get(path, path): path for path in given}
    if len(old_paths) != len(given):
        twice = sorted(new for new, count in Counter(new_paths.get(p, p) for p in given).items() if count > 1)
        problems += [f"{shown(path)} is there under two names" for path in twice]
    parts = {new: given[old] for new, old in old_paths.items()}
    fused, wrong = _old_experts(parts, settings, linears or {})
    problems += wrong
    expected = _expected(settings, linears, [path for path in parts if path not in fused] if new_paths else None)
    modules: list[LoraModule] = [*fused.values()]
    parts = {path: found for path, found in parts.items() if path not in fused}
    for module in _ordered(parts, linears):
        paths = (module, old_paths[module])
        wrong = _module_problems(paths, parts[module], settings, linears)
        problems += wrong
        if not wrong:
            size = (linears or {}).get(module, ())
            modules.append(_lora_module(paths, parts[module], settings, size[0] if len(size) == 3 else 0))
    missing = [module for module in expected or () if module not in parts and _is_required(module, settings)]
    problems += [f"{shown(module)} is to be adapted and has no tensors" for module in missing]
    if not parts and not fused and not problems:
        problems.append("it holds no factors of a LoRA")
    if expected is not None and not expected and not fused:
        problems.append("target_modules selects no linear layer of this base")
    return Pairing(tuple(modules), copies, problems, tokens, special.whole)


def rank_problems(entries: Mapping[str, TensorEntry], *, experts: bool = False) -> list[str]:
    """Factors of a rank beyond all use, told by the header alone, before a value is read.

    With `experts` one matrix holds the factors of up to a thousand of them.
    """
    limit = MAX_RANK * (MAX_EXPERTS if experts else 1)
    ranks = [
        (key, entry.shape[0] if _FIRST.search(key) else entry.shape[-1])
        for key, entry in entries.items()
        if len(entry.shape) == 2 and (_FIRST.search(key) or _SECOND.search(key))
    ]
    return [f"{shown(key)} is of rank {rank:,}, more than {limit:,}" for key, rank in ranks if rank > limit]


def parameter_paths(paths: Iterable[str], settings: LoraSettings, linears: Linears) -> dict[str, str]:
    """For paths in a file: the parameters that they stand for. PEFT wraps a module once for each of its parameters.

    mlp.experts.base_layer   the first, gate_up_proj          mlp.experts   the last, down_proj
    """
    wrapped: dict[str, list[str]] = {}
    for path in linears:
        if _is_parameter(path, linears) and settings.adapts_parameter(path):
            wrapped.setdefault(path.rpartition(".")[0], []).append(path)
    found = {}
    by_inner = {inner_path(owner): owner for owner in wrapped}
    for path in paths:
        owner, depth = path, 0
        while owner.endswith(".base_layer"):
            owner, depth = owner.removesuffix(".base_layer"), depth + 1
        own = wrapped.get(owner) or wrapped.get(by_inner.get(inner_path(owner), ""), [])
        if depth < len(own):
            found[path] = own[len(own) - 1 - depth]
    return found


def _old_routers(paths: Iterable[str], linears: Linears) -> dict[str, str]:
    """Layers that route, in files that are older than routers which are modules of their own."""
    routers = {inner_path(path): path for path in linears if path.endswith(".gate.weight")}
    now = {path: path.replace(".block_sparse_moe.", ".mlp.") + ".weight" for path in paths if path.endswith(".gate")}
    return {path: routers[inner_path(name)] for path, name in now.items() if inner_path(name) in routers}


def _old_experts(
    parts: Mapping[str, _Parts], settings: LoraSettings, linears: Linears
) -> tuple[dict[str, LoraModule], list[str]]:
    """Path -> the layers of single experts, where the base of today keeps them fused.

    block_sparse_moe.experts.3.w1    ->    mlp.experts.gate_up_proj, matrix 3, the upper half of its rows
    """
    fused = {inner_path(path): path for path, size in linears.items() if len(size) == 3}
    found: dict[str, LoraModule] = {}
    problems: list[str] = []
    for path, given in parts.items():
        old = _OLD_EXPERT.fullmatch(path)
        if old is None or path in linears or "lora_A.weight" not in given or "lora_B.weight" not in given:
            continue
        leaf, part, count = _OLD_LEAVES[old["leaf"]]
        site = fused.get(inner_path(f"{old['block']}.mlp.experts.{leaf}"))
        if site is None:
            continue
        experts, out, width = linears[site]
        expert = OldExpert(int(old["number"]), part, count)
        problems += _shape_problems(settings.rank_of(path), given, (out // count, width))
        problems += [f"{shown(path)}: the base has {experts} experts"] if expert.number >= experts else []
        found[path] = LoraModule(
            module=site,
            rank=settings.rank_of(path),
            scaling=settings.scaling_of(path),
            a_key=given["lora_A.weight"].key,
            b_key=given["lora_B.weight"].key,
            bias_key=None,
            experts=experts,
            expert=expert,
        )
    return found, problems


def _is_parameter(path: str, linears: Linears) -> bool:
    return len(linears[path]) == 3 or path.endswith(".weight")


@dataclass(frozen=True, slots=True)
class _Special:
    """Tensors that are no factors: of trained token rows by their module, of whole modules by (module, leaf)."""

    tokens: dict[str, TensorEntry] = field(default_factory=dict)
    whole: dict[tuple[str, str], str] = field(default_factory=dict)


def _tokens(
    special: _Special, settings: LoraSettings, new_paths: Mapping[str, str], problems: list[str]
) -> Iterator[TokenModule]:
    for module, entry in special.tokens.items():
        ids = settings.tokens_of(module)
        if ids is None or len(entry.shape) != 2 or entry.shape[0] != len(ids) or entry.dtype not in FLOATS:
            count = "no" if ids is None else f"{len(ids):,}"
            problems.append(f"{shown(entry.key)} is {_shape(entry.shape)}, and the configuration names {count} tokens")
        else:
            yield TokenModule(new_paths.get(module, module), ids, entry.key)
    for name in settings.saves:
        if not any(module.endswith(name) for module, _ in special.whole):
            problems.append(f"modules_to_save names {shown(name)}, and there are no tensors of it")
    if settings.tokens and not special.tokens:
        problems.append("trainable_token_indices names tokens, and there are no rows of them")


def _group(
    entries: Mapping[str, TensorEntry], settings: LoraSettings
) -> tuple[dict[str, _Parts], dict[str, str], list[str], _Special]:
    special = _Special()
    parts: dict[str, _Parts] = {}
    copies: dict[str, str] = {}
    strangers: dict[str, list[str]] = {}
    names: set[str] = set()
    problems = []
    for key, entry in entries.items():
        found = lora_key(key)
        if found is None:
            if (owner := tokens_key(key)) is not None:
                special.tokens[owner] = entry
            elif (leaf := whole_key(key)) is not None and settings.keeps(leaf[0]) and "lora_" not in key:
                special.whole[leaf] = key
            elif _COPIED.fullmatch(key) and "lora_" not in key:
                copies[key] = base_key(key)
            else:
                strangers.setdefault(kinds.of_tensor(key), []).append(key)
            continue
        module, part, name = found
        group = parts.setdefault(module, {})
        if part in group:
            problems.append(f"{shown(key)} is there twice, with and without {PREFIX!r} or an adapter's name")
        group[part] = entry
        names.add(name)
        if entry.dtype not in FLOATS:
            problems.append(f"{shown(key)} is {entry.dtype}; {', '.join(FLOATS)} are loaded")
    if len(names) > 1:
        problems.append(f"it holds several adapters, {shown(sorted(names))}; save each by itself")
    for what, keys in strangers.items():
        others = f", and {len(keys) - 3:,} more tensors are" if len(keys) > 3 else ""
        problems += [f"{shown(key)} is {what}" for key in keys[:2]] + [f"{shown(k)}{others} {what}" for k in keys[2:3]]
    return parts, copies, problems, special


def _expected(settings: LoraSettings, linears: Linears | None, found: list[str] | None) -> dict[str, None] | None:
    """The modules that must have tensors; None where nobody can say. `found` limits them to its part of the model."""
    if linears is None or settings.selects is None:
        return None
    chosen = [m for m in linears if (settings.adapts_parameter(m) if _is_parameter(m, linears) else settings.adapts(m))]
    if found is not None:
        # Written for another class of the model, maybe for its text part alone: other towers are not expected.
        towers = {inner_path(module).partition(".")[0] for module in found}
        chosen = [m for m in chosen if inner_path(m).partition(".")[0] in towers] or found
    return dict.fromkeys(chosen)


def _is_required(module: str, settings: LoraSettings) -> bool:
    # "all-linear" leaves out the output head, which lies outside of the numbered layers.
    return not settings.all_linear or (_LAYER.search(module) is not None and not settings.adapts_parameter(module))


def _ordered(parts: Mapping[str, _Parts], linears: Linears | None) -> Iterable[str]:
    if linears is None:
        return sorted(parts)
    return [*(name for name in linears if name in parts), *sorted(name for name in parts if name not in linears)]


def _module_problems(
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
    if linears is not None and size is None:
        problems.append(f"{shown(module)} is not a linear layer of this base")
    elif not settings.adapts(*paths, module.removesuffix(".weight")) and not settings.adapts_parameter(module):
        if size is None and settings.parameters:
            return problems  # a parameter's, maybe: its base tells
        problems.append(f"{shown(module)} has tensors but is not among target_modules")
    problems += _shape_problems(settings.rank_of(*paths), found, size)
    return problems


def _shape_problems(rank: int, found: Mapping[str, TensorEntry], size: tuple[int, ...] | None) -> list[str]:
    out_features, in_features = size[-2:] if size else (None, None)
    if size and len(size) == 3:
        rank *= size[0]
    wanted: Mapping[str, tuple[int | None, ...]] = {
        "lora_A.weight": (rank, in_features),
        "lora_B.weight": (out_features, rank),
        "lora_B.bias": (out_features,),
        MAGNITUDE: (out_features,),
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


def _lora_module(
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
    )
