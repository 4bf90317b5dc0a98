"""Which modules a configuration adapts: `target_modules` and its neighbours, with PEFT's meaning.

A pattern that can't be matched safely (see `patterns`) is never matched: the tensors say which modules are adapted, and
a list or a plain pattern is only the second witness.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lora_rt.registry.inspection.patterns import TamePattern, compile_tame
from lora_rt.registry.strict_json import shown

MAX_TARGETS = 10_000
Selects = Callable[[str], bool]

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,300}")
_NUMBERED = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")
_NUMBER = re.compile(r"\.(?P<layer>\d+)\.")


def selector(config: dict[str, Any]) -> tuple[Selects | None, list[str]]:
    """A function that says of a module's path whether it is adapted, and what is wrong with the fields.

    None where nothing is wrong: a pattern among the fields is not one that can be matched safely.
    """
    problems: list[str] = []
    targets = _matcher(config.get("target_modules"), "target_modules", problems, bool(config.get("target_parameters")))
    excludes = _matcher(config.get("exclude_modules") or [], "exclude_modules", problems)
    layers = _layers(config.get("layers_to_transform"), problems)
    numbered = _layer_patterns(config.get("layers_pattern"), problems)
    if problems or targets is None or excludes is None:
        return None, problems
    only_layers = layers and not isinstance(config["target_modules"], str)

    def selects(module: str) -> bool:
        if excludes(module) or not targets(module):
            return False
        return not only_layers or _layer_of(module, numbered) in layers

    return selects, []


def target_parameters(config: dict[str, Any]) -> tuple[tuple[str, ...], list[str]]:
    """The parameters that are adapted without a layer, such as fused experts, and what is wrong with them."""
    value = config.get("target_parameters") or []
    if not isinstance(value, list) or len(value) > MAX_TARGETS or not all(isinstance(item, str) for item in value):
        return (), [f"target_parameters is {shown(value)}, not a list of names"]
    strange = [item for item in value if not _PATH.fullmatch(item)]
    return tuple(value), [f"target_parameters holds {shown(item)}, which is not a name" for item in strange[:20]]


def _matcher(value: Any, field: str, problems: list[str], parameters: bool = False) -> Selects | None:
    if isinstance(value, str):
        return _regex(value)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        problems.append(f"{field} is {shown(value)}, not a list of module names")
        return None
    if field == "target_modules" and not value and not parameters:
        problems.append(f"{field} is empty, so nothing is adapted")
        return None
    if len(value) > MAX_TARGETS:
        problems.append(f"{field} has {len(value):,} entries, more than {MAX_TARGETS:,}")
        return None
    strange = [item for item in value if not _PATH.fullmatch(item)]
    problems += [f"{field} holds {shown(item)}, which is not a module name" for item in strange[:20]]
    names = frozenset(value)

    def matches(module: str) -> bool:
        # PEFT: the whole path, or any dotted end of it.
        parts = module.split(".")
        return any(".".join(parts[start:]) in names for start in range(len(parts)))

    return matches


def _regex(value: str) -> Selects | None:
    if value == "all-linear":
        return lambda module: True
    compiled = compile_tame(value)
    return None if compiled is None else compiled.fullmatch


def _layers(value: Any, problems: list[str]) -> frozenset[int]:
    numbers = [value] if isinstance(value, int) else value
    if numbers is None:
        return frozenset()
    if not isinstance(numbers, list) or len(numbers) > MAX_TARGETS or not all(_is_layer(item) for item in numbers):
        problems.append(f"layers_to_transform is {shown(value)}, not a list of layer numbers")
        return frozenset()
    return frozenset(numbers)


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_TARGETS


def _layer_patterns(value: Any, problems: list[str]) -> list[TamePattern]:
    names = [value] if isinstance(value, str) else value or []
    if not isinstance(names, list) or len(names) > 100 or not all(isinstance(n, str) for n in names):
        problems.append(f"layers_pattern is {shown(value)}, not a list of names")
        return []
    patterns = {name: compile_tame(rf"(?:|.*\.)(?:{name})") for name in names if name}
    problems += [f"layers_pattern holds {shown(n)}, which is not a module name" for n, p in patterns.items() if not p]
    return [pattern for pattern in patterns.values() if pattern]


def _layer_of(module: str, patterns: list[TamePattern]) -> int | None:
    if not patterns:
        found = _NUMBERED.match(module)
        return int(found["layer"]) if found else None
    for pattern in patterns:
        end = pattern.first_end(module, lambda rest: _NUMBER.match(rest) is not None)
        if end is not None and (found := _NUMBER.match(module[end:])):
            return int(found["layer"])
    return None
