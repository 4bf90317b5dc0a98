"""Plugins that are not installed: a module made in the test, behind an entry point that loads it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from lora_rt.plugins.contract import LORA_RT_API, hookimpl
from lora_rt.plugins.testing import InlinePoint


def plugin(*functions: Callable[..., Any], api: Any = LORA_RT_API, **others: Any) -> ModuleType:
    """A module with these functions as hooks, each under its own name; `api=None` leaves the version out."""
    module = ModuleType("inline")
    for function in functions:
        setattr(module, function.__name__, hookimpl(function))
    vars(module).update(others)
    if api is not None:
        vars(module)["LORA_RT_API"] = api
    return module


def point(made: object, name: str = "stranger", package: str = "stranger-mode") -> InlinePoint:
    """An entry point that loads this module or object; a function is called to load."""
    return InlinePoint(name, made if callable(made) else lambda: made, package)
