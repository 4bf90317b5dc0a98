"""The author's manual, the hook specifications and the tests name the same hooks."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_type_hints

import pytest

import lora_rt.plugins
from lora_rt.plugins import contract
from lora_rt.plugins.contract import hooks
from lora_rt.plugins.manager.surface import SPECS

MANUAL = inspect.getdoc(lora_rt.plugins) or ""
TESTS = Path(__file__).parents[1]


def test_the_manual_shows_every_hook_with_its_arguments_and_no_other() -> None:
    shown = dict(re.findall(r"def (lora_rt_\w+)\(([^)]*)\)", MANUAL))
    assert shown == {name: ", ".join(inspect.signature(spec).parameters) for name, spec in SPECS.items()}


def test_the_manual_fits_on_a_screen() -> None:
    assert len(MANUAL.splitlines()) <= 60


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_is_typed_and_says_when_it_fires(name: str) -> None:
    signature = inspect.signature(SPECS[name])
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    assert signature.return_annotation is not inspect.Signature.empty
    assert (inspect.getdoc(SPECS[name]) or "").startswith("Fires ")


@pytest.mark.parametrize("name", SPECS)
def test_the_types_of_a_hook_are_part_of_the_contract(name: str) -> None:
    """What a hook receives and returns can be imported from the contract, so a mode needs nothing else of ours."""
    words = set(re.findall(r"[A-Z]\w+", " ".join(map(str, inspect.get_annotations(SPECS[name]).values()))))
    assert words - {"Callable", "Sequence", "Any", "None", "Typer"} <= set(contract.__all__)


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_has_a_test_that_implements_it(name: str) -> None:
    """In a plugin of its own: as a function of that name, or handed to one under that name."""
    texts = [file.read_text(encoding="utf-8") for file in TESTS.rglob("test_*.py") if file.name != Path(__file__).name]
    assert any(re.search(rf'def {name}\(|"{name}"', text) for text in texts)


def test_the_contract_exports_what_it_defines() -> None:
    for name in contract.__all__:
        assert hasattr(contract, name)
    assert get_type_hints(contract.Encoded)
    assert hooks.LORA_RT_API == contract.LORA_RT_API == 1
