"""A model's own modules under the names that they have in its base, also where PEFT or torch.compile wraps some."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_rt.core.base.upstream import own_tensors

_INNER = ("base_layer", "original_module")
"""Where PEFT keeps the layer that it wraps: one that a tuner adapts, one that is trained whole."""


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what torch.compile makes of a module: the module's own is its `_orig_mod`."""
    return isinstance(module._modules.get("_orig_mod"), nn.Module)


def inner_of(module: nn.Module) -> nn.Module:
    """The module itself, or the one that PEFT or torch.compile has wrapped, however often."""
    while is_compiled(module) or any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
        names = ("_orig_mod",) if is_compiled(module) else _INNER
        inner = next((found for name in names if isinstance(found := getattr(module, name, None), nn.Module)), None)
        if inner is None:
            break
        module = inner
    return module


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the base alone: none that PEFT has put there, and the names without it."""
    return _walk(model, "", set())


def wrappers_of(model: nn.Module) -> list[nn.Module]:
    """What PEFT and torch.compile have put around modules of the base, of each the outermost."""
    children = (child for _, module in bare_modules(model) for child in module.children())
    return [child for child in children if inner_of(child) is not child]


def bare_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's parameters, each under every name that it has: a tied head is the embedding, too."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in bare_modules(model)
        for key, value in own_tensors(module)[0].items()
        if value is not None
    }


def _walk(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    inner = inner_of(module)
    if id(inner) not in seen:
        seen.add(id(inner))
        yield name, inner
        for part, child in inner.named_children():
            yield from _walk(child, f"{name}.{part}" if name else part, seen)
