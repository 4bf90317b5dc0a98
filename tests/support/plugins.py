"""Plugins that are not installed: a module made in the test, behind an entry point that loads it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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


def torn_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package "torn-mode" whose list of entry points was cut off in the middle of a line."""
    facts = folder / "site" / "torn_mode-1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torn-mode\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[lora_rt.modes]\ntorn")
    monkeypatch.syspath_prepend(str(folder / "site"))
    importlib.invalidate_caches()
