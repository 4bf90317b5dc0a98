"""From tensor names to adapted modules: which A belongs to which B, and whether both fit configuration and base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lora_rt.registry.inspection import kinds
from lora_rt.registry.inspection.adapted import (
    FLOATS,
    MAX_RANK,
    Linears,
    LoraModule,
    Parts,
    TokenModule,
    lora_module,
    module_problems,
    shape_text,
)
from lora_rt.registry.inspection.experts import is_parameter, old_experts, old_routers, parameter_paths
from lora_rt.registry.inspection.keys import (
    PREFIX,
    base_key,
    inner_path,
    is_unused,
    lora_key,
    renamed,
    tokens_key,
    whole_key,
)
from lora_rt.registry.inspection.safetensors_header import TensorEntry
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.strict_json import shown

MAX_EXPERTS = 1024

# What PEFT copies out of the base into an adapter's file: biases, and embedding and head when it adapts one of them.
_COPIED = re.compile(r"(.*\.)?(base_layer\.weight|(lm_head|embed_tokens|embed_out|embed_in|wte|output)\.weight|bias)")
_FIRST, _SECOND = (re.compile(rf"\.lora_(embedding_)?{part}(\.|$)") for part in "AB")
_LAYER = re.compile(r"(^|\.)\d+\.")


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
    given, copies, problems, special = _group(entries, settings, linears is not None)
    wanted = [*given, *special.tokens]
    new_paths = {**renamed(wanted, linears or ()), **parameter_paths(given, settings, linears or {})}
    new_paths |= old_routers(given, linears or {})
    tokens = tuple(_tokens(special, settings, new_paths, problems))
    old_paths = {new_paths.get(path, path): path for path in given}
    if len(old_paths) != len(given):
        twice = sorted(new for new, count in Counter(new_paths.get(p, p) for p in given).items() if count > 1)
        problems += [f"{shown(path)} is there under two names" for path in twice]
    parts = {new: given[old] for new, old in old_paths.items()}
    fused, wrong = old_experts(parts, settings, linears or {})
    problems += wrong
    expected = _expected(settings, linears, [path for path in parts if path not in fused] if new_paths else None)
    modules: list[LoraModule] = [*fused.values()]
    parts = {path: found for path, found in parts.items() if path not in fused}
    for module in _ordered(parts, linears):
        paths = (module, old_paths[module])
        wrong = module_problems(paths, parts[module], settings, linears)
        problems += wrong
        if not wrong:
            size = (linears or {}).get(module, ())
            modules.append(lora_module(paths, parts[module], settings, size[0] if len(size) == 3 else 0))
    missing = [module for module in expected or () if module not in parts and _is_required(module, settings)]
    problems += [f"{shown(module)} is to be adapted and has no tensors" for module in missing]
    if not parts and not fused and not problems:
        problems.append("it holds no factors of a LoRA")
    if expected is not None and not expected and not fused and not settings.parameters:
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
            problems.append(
                f"{shown(entry.key)} is {shape_text(entry.shape)}, and the configuration names {count} tokens"
            )
        else:
            yield TokenModule(new_paths.get(module, module), ids, entry.key)
    for name in settings.saves:
        if not any(f"{name}." in f"{module}." for module, _ in special.whole):
            problems.append(f"modules_to_save names {shown(name)}, and there are no tensors of it")
    if settings.tokens and not special.tokens:
        problems.append("trainable_token_indices names tokens, and there are no rows of them")


def _group(
    entries: Mapping[str, TensorEntry], settings: LoraSettings, has_base: bool
) -> tuple[dict[str, Parts], dict[str, str], list[str], _Special]:
    special = _Special()
    parts: dict[str, Parts] = {}
    copies: dict[str, str] = {}
    strangers: dict[str, list[str]] = {}
    names: set[str] = set()
    problems = []
    for key, entry in entries.items():
        found = lora_key(key)
        if found is None:
            if (owner := tokens_key(key)) is not None:
                special.tokens[owner] = entry
            elif is_unused(key) and settings.saves:
                continue
            elif (leaf := whole_key(key)) is not None and settings.keeps(leaf[0]) and "lora_" not in key:
                special.whole[leaf] = key
            elif "lora_" not in key and (_COPIED.fullmatch(key) or (has_base and leaf is not None)):
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
    chosen = [
        m
        for m in linears
        if (settings.adapts_parameter(m) if is_parameter(m, linears) else settings.adapts(m))
        or settings.adapts_parameter(f"{m}.weight")
    ]
    chosen = [module for module in chosen if not settings.keeps(module)]
    if found is not None:
        # Written for another class of the model, maybe for its text part alone: other towers are not expected.
        towers = {inner_path(module).partition(".")[0] for module in found}
        chosen = [m for m in chosen if inner_path(m).partition(".")[0] in towers] or found
    return dict.fromkeys(chosen)


def _is_required(module: str, settings: LoraSettings) -> bool:
    # "all-linear" leaves out the output head, which lies outside of the numbered layers.
    return not settings.all_linear or (_LAYER.search(module) is not None and not settings.adapts_parameter(module))


def _ordered(parts: Mapping[str, Parts], linears: Linears | None) -> Iterable[str]:
    if linears is None:
        return sorted(parts)
    return [*(name for name in linears if name in parts), *sorted(name for name in parts if name not in linears)]
