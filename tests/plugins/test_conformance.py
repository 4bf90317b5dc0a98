"""The built-in modes and the example hold what every mode has to hold; modes that do not are caught by that suite."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lora_rt.plugins.contract import Encoded, Gate, Objective, hookimpl
from lora_rt.plugins.manager.loading import installed
from lora_rt.plugins.testing import Conformance, conformance, host_of
from lora_rt.plugins.testing.workshop import EXAMPLES, Workshop
from lora_rt.registry.packages import package_of
from support.plugins import plugin

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "fade-in-mode" / "fade_in_mode.py"


def example() -> ModuleType:
    """The example's module, importable by its name as if it were installed."""
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        return importlib.import_module(EXAMPLE.stem)
    finally:
        sys.path.remove(str(EXAMPLE.parent))


fade_in = example()


class TestFadeIn(conformance(fade_in, options={"tokens": "4"}, static_at_start=False)):  # type: ignore[misc]
    """The module is not installed here: the end-to-end test installs it."""

    @pytest.fixture(autouse=True)
    def path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(EXAMPLE.parent))


# One class for every mode that this package brings, under the options that make its gate do something.
_SETTINGS: dict[str, dict[str, Any]] = {"bridge": {"options": {"reserve": "0.25"}, "static_at_start": False}}
for _point in installed()[0]:
    if package_of(_point)[0] == "lora-rt":
        _name = "".join(word.capitalize() for word in _point.name.split("-"))
        vars()[f"Test{_name}"] = conformance(_point.name, **_SETTINGS.get(_point.name, {}))


def test_every_built_in_mode_is_tested() -> None:
    """The loop above found each that the project's own file names."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    modes = project["project"]["entry-points"]["lora_rt.modes"]
    assert {"Test" + "".join(map(str.capitalize, mode.split("-"))) for mode in modes} <= globals().keys()


@pytest.mark.parametrize(("position", "expected"), [(0, 0.2), (2, 0.2), (3, 0.4), (5, 0.8), (6, 1.0), (9, 1.0)])
def test_the_fade_is_linear_from_the_first_token_of_the_answer(position: int, expected: float) -> None:
    """A prompt of three tokens: position 2 predicts the first of the answer."""
    from lora_rt.plugins.testing import gate_context

    state = fade_in.Fade(tokens=4, start=0.2).tensors()
    gate = host_of(fade_in).gate("mine", gate_context([3], 10, state=state))
    assert gate is not None
    assert gate.ranks is not None
    assert gate.ranks[0, position, 0].item() == pytest.approx(expected)


# Modes that break one promise each, and the claim that must catch them.


@hookimpl
def lora_rt_objective(context: Any) -> Objective:
    """As output-only, options ignored."""
    return SceneToText(context)


class SceneToText(Objective):
    def __init__(self, context: Any) -> None:
        self.context = context

    def encode(self, example: Any) -> list[Encoded]:
        ids = [*self.context.prompt_ids(example["scene"]), *self.context.answer_ids(example["text"])]
        return [Encoded(ids, ids)]


def leaks_between_rows(context: Any) -> Gate:
    return Gate(ranks=(context.input_ids.float().mean() / 100)[None])


def counts_the_tokens_of_the_pass(context: Any) -> Gate:
    steps = torch.arange(context.input_ids.shape[1], dtype=torch.float32)
    return Gate(ranks=(steps / 4)[:, None])


def doubles(context: Any) -> Gate:
    return Gate(ranks=torch.tensor([2.0]))


def adds_weight(context: Any) -> list[float]:
    return [context.terms[i].weight + 1 for i in context.mine]


def learns_at_random(context: Any) -> Objective:
    objective = SceneToText(context)
    objective.state = nn.Linear(2, 2)
    return objective


def forgets_the_loss(context: Any) -> Objective:
    class Flat(SceneToText):
        def loss(self, logits: Any, labels: Any, extra: Any) -> Any:
            return logits.sum() * 0

    return Flat(context)


WRONG: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "ignores options": ({}, "test_an_option_that_it_does_not_know_is_refused"),
    "leaks between rows": ({"lora_rt_gate": leaks_between_rows}, "test_a_row_of_a_batch_equals_the_row_alone"),
    "forgets the cache": (
        {"lora_rt_gate": counts_the_tokens_of_the_pass},
        "test_a_gate_with_a_cache_equals_one_pass",
    ),
    "is not static": ({"lora_rt_gate": doubles}, "test_its_untrained_state_composes_statically"),
    "brings back weight 0": ({"lora_rt_compose": adds_weight}, "test_the_weight_zero_is_the_base"),
    "starts at random": ({"lora_rt_objective": learns_at_random}, "test_two_runs_with_one_seed_begin_alike"),
    "learns nothing": ({"lora_rt_objective": forgets_the_loss}, "test_a_step_of_training_moves_the_adapter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mode_that_breaks_a_promise_is_caught(case: str, tmp_path: Path) -> None:
    hooks, claim = WRONG[case]
    module = plugin(**{"lora_rt_objective": lora_rt_objective} | {name: _hook(f) for name, f in hooks.items()})
    workshop = Workshop(tmp_path, host_of(module), "mine", {}, EXAMPLES, ("body", "logic"))
    suite: Conformance = conformance(module)()
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(suite, claim)(workshop)


def test_a_mode_that_imports_core_or_torch_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy_mode.py").write_text("import lora_rt.registry\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = ModuleType("heavy_mode")
    workshop = Workshop(tmp_path, host_of(module), "mine", {}, EXAMPLES, ())
    with pytest.raises(AssertionError, match="brings these in"):
        conformance(module)().test_its_import_is_light_and_stands_on_the_contract(workshop)


def _hook(function: Callable[..., Any]) -> Callable[..., Any]:
    return function if hasattr(function, "lora_rt_impl") else hookimpl(function)
