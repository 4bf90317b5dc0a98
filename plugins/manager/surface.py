"""What a plugin offers, looked at once after its import: the API version it states, its hooks, their arguments."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import LORA_RT_API, hooks
from lora_rt.plugins.manager.record import GROUP, describe

Hook = Callable[..., Any]
PREFIX = "lora_rt_"
OF_ANY_PLUGIN = ("lora_rt_commands", "lora_rt_sources")
SPECS: dict[str, Hook] = {name: spec for name, spec in vars(hooks).items() if name.startswith(PREFIX)}


class SurfaceError(LoraRtError):
    """A plugin that does not keep to the contract; `problems` has every finding."""


def hooks_of(plugin: object, group: str = GROUP) -> dict[str, Hook]:
    """Hook name -> function of a plugin (a module, or an object with methods).

    Raises:
        SurfaceError: it states no or another API version, has a hook that the contract does not know or can't call, or
            none at all.
    """
    version = _api_problem(plugin)
    if version:
        raise SurfaceError(version)
    found: dict[str, Hook] = {}
    problems: list[str] = []
    for name, function, options in _marked(plugin):
        problem = _problem(name, function, options) or (f"{name} is implemented twice" if name in found else "")
        if problem:
            problems.append(problem)
        found[name] = function
        if group != GROUP and name in SPECS and name not in OF_ANY_PLUGIN:
            problems.append(f"{name} is a mode's, and this is an entry point of {group}, not of {GROUP}")
    problems += [f"{name} lacks its @hookimpl" for name in SPECS if _is_unmarked(plugin, name)]
    if not found and not problems:
        problems = [f"it implements no hook; the hooks are {', '.join(SPECS)}"]
    if problems:
        raise SurfaceError("; ".join(problems), problems=problems)
    return found


def summary_of(plugin: object, name: str) -> str:
    """The first line of its module's docstring, without the plugin's own name before it; empty where it has none."""
    try:
        module = plugin if isinstance(plugin, ModuleType) else inspect.getmodule(type(plugin))
        text = module.__doc__ if module is not None else None
        first = text.strip().partition("\n")[0] if isinstance(text, str) else ""
    except Exception:  # a stranger's object; what it is for is not worth refusing it
        return ""
    return describe(first.removeprefix(f"{name}: "))


def _api_problem(plugin: object) -> str:
    module = plugin if isinstance(plugin, ModuleType) else inspect.getmodule(plugin)
    version = getattr(plugin, "LORA_RT_API", getattr(module, "LORA_RT_API", None))
    if version is None:
        return f"it does not state LORA_RT_API; this lora-rt has version {LORA_RT_API}"
    if type(version) is not int or version != LORA_RT_API:
        return f"it was written for LORA_RT_API {version!r}, and this lora-rt has {LORA_RT_API}"
    return ""


def _marked(plugin: object) -> Iterator[tuple[str, Hook, dict[str, Any]]]:
    """(hook name, function, options) of everything that carries our marker, misspelled names included."""
    for name in dir(plugin):
        function = inspect.getattr_static(plugin, name, None)
        function = getattr(function, "__func__", function)
        options = getattr(function, "lora_rt_impl", None) if inspect.isfunction(function) else None
        if isinstance(options, dict):
            yield options.get("specname") or name, getattr(plugin, name), options


def _is_unmarked(plugin: object, name: str) -> bool:
    function = getattr(plugin, name, None)
    return inspect.isroutine(function) and not hasattr(function, "lora_rt_impl") and function is not SPECS[name]


def _problem(name: str, function: Hook, options: dict[str, Any]) -> str:
    if name not in SPECS:
        # Without the prefix: with it, all names are alike.
        words = [known.removeprefix(PREFIX) for known in SPECS]
        near = difflib.get_close_matches(name.removeprefix(PREFIX), words, n=1)
        return f"no hook is called {name}; " + (
            f"near is {PREFIX}{near[0]}" if near else f"the hooks are {', '.join(SPECS)}"
        )
    if options.get("wrapper") or options.get("hookwrapper"):
        return f"{name} is a wrapper, and only one plugin answers a call: there is nothing to wrap"
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        return f"{name} is async or a generator; hooks are plain functions"
    return _argument_problem(name, function)


def _argument_problem(name: str, function: Hook) -> str:
    """A hook may leave arguments out and may have more with defaults; it is called with the contract's, by name."""
    given = set(inspect.signature(SPECS[name]).parameters)
    wanted = inspect.signature(function).parameters.values()
    strange = [p.name for p in wanted if p.default is p.empty and (p.kind in _NOT_BY_NAME or p.name not in given)]
    if not strange:
        return ""
    return f"{name} takes {', '.join(strange)}; it is called with {', '.join(sorted(given))}"


_NOT_BY_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
