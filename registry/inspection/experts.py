"""Experts and routers: PEFT's names for a module's parameters, and files that are older than fused experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lora_rt.registry.inspection.adapted import Linears, LoraModule, OldExpert, Parts, shape_problems
from lora_rt.registry.inspection.keys import inner_path
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.strict_json import shown

_OLD_EXPERT = re.compile(
    r"(?P<block>.+)\.(block_sparse_moe|mlp|feed_forward)\.experts\.(?P<number>\d{1,4})\."
    r"(?P<leaf>w1|w2|w3|gate_proj|up_proj|down_proj)"
)
_OLD_LEAVES = {
    **dict.fromkeys(("w1", "gate_proj"), ("gate_up_proj", 0, 2)),
    **dict.fromkeys(("w3", "up_proj"), ("gate_up_proj", 1, 2)),
    **dict.fromkeys(("w2", "down_proj"), ("down_proj", 0, 1)),
}


def parameter_paths(paths: Iterable[str], settings: LoraSettings, linears: Linears) -> dict[str, str]:
    """For paths in a file: the parameters that they stand for. PEFT wraps a module once for each of its parameters.

    mlp.experts.base_layer   the first, gate_up_proj          mlp.experts   the last, down_proj
    """
    wrapped: dict[str, list[str]] = {}
    for path in linears:
        if is_parameter(path, linears) and settings.adapts_parameter(path):
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


def old_routers(paths: Iterable[str], linears: Linears) -> dict[str, str]:
    """Layers that route, in files that are older than routers which are modules of their own."""
    routers = {inner_path(path): path for path in linears if path.endswith(".gate.weight")}
    now = {path: path.replace(".block_sparse_moe.", ".mlp.") + ".weight" for path in paths if path.endswith(".gate")}
    return {path: routers[inner_path(name)] for path, name in now.items() if inner_path(name) in routers}


def old_experts(
    parts: Mapping[str, Parts], settings: LoraSettings, linears: Linears
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
        problems += shape_problems(settings.rank_of(path), given, (out // count, width))
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


def is_parameter(path: str, linears: Linears) -> bool:
    return len(linears[path]) == 3 or path.endswith(".weight")
