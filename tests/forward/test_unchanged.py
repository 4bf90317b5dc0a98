"""What was replaced, hooked or moved since somebody looked is seen, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lora_rt.core.forward.unchanged import Parameters, have_hooks, own, place_in, stand


def block() -> nn.ModuleDict:
    return nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False)})


def test_a_module_that_is_replaced_or_gone_no_longer_stands() -> None:
    owner = block()
    places = [place_in(owner, name) for name in ("a", "b")]
    assert stand(places)
    owner["a"], owner["b"] = owner["b"], owner["a"]
    assert not stand(places)
    owner["a"], owner["b"] = owner["b"], owner["a"]
    assert stand(places)
    del owner["b"]
    assert not stand(places)
    assert place_in(owner, "b").module is None


def test_hooks_of_both_kinds_are_seen_until_they_are_taken_away() -> None:
    modules = list(block().values())
    assert not have_hooks(modules)
    for register in (modules[1].register_forward_hook, modules[0].register_forward_pre_hook):
        handle = register(lambda *_: None)
        assert have_hooks(modules)
        handle.remove()
        assert not have_hooks(modules)
    assert own(modules, "forward") == [None, None]
    modules[0].forward = len  # type: ignore[assignment]
    assert own(modules, "forward") == [len, None]


def _replaced(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def _moved(layer: Any) -> None:
    layer.weight.data = layer.weight.data.clone()


def _shorter(layer: Any) -> None:
    layer.weight.data = layer.weight.data[:2]


def _strided(layer: Any) -> None:
    layer.weight.data = layer.weight.data.T


def _in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def _gone(layer: Any) -> None:
    layer.weight = None


@pytest.mark.parametrize("change", [_replaced, _moved, _shorter, _strided, _gone])
def test_parameters_that_are_read_where_they_lie(change: Callable[[Any], None]) -> None:
    modules = list(block().values())
    weights, biases = Parameters(modules, "weight"), Parameters(modules, "bias")
    _in_place(modules[1])
    assert weights.stand()
    change(modules[0])
    assert not weights.stand()
    assert biases.stand()
    modules[1].bias = nn.Parameter(torch.ones(4))
    assert not biases.stand()


@pytest.mark.parametrize("change", [_replaced, _moved, _in_place, _gone])
def test_parameters_of_which_copies_were_made(change: Callable[[Any], None]) -> None:
    modules = list(block().values())
    weights = Parameters(modules, "weight", copied=True)
    assert weights.stand()
    change(modules[1])
    assert not weights.stand()
