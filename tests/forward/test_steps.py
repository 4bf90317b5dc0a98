"""Recorded decoding steps: what they say, which places they use, and when they are recorded anew.

Nothing is recorded on a CPU: a stand-in runs each step as it is, over the same places.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.forward import steps as module
from lora_rt.core.forward.pool import rounded
from lora_rt.core.forward.steps import Seated, Steps, rounded_columns, rounded_rows
from lora_rt.core.requests.running import RequestRow
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from support.tiny import Zoo, mode_host

pytestmark = pytest.mark.slow

PROMPTS = ("rain, tin roof", "a", "two and two. So: four", "the unpaid bill on the table and a late bus", "so it is")
SPECS = (None, "one:0.7 two:0.3", "two:-1.5", "fading:2", "one[So:] fading", "biased", "fading:3 one", "three biased")


class Fading:
    """Comes in over the first tokens of the answer, by position."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook of a module has no self
        answered = context.positions - (context.prompt_lengths[:, None] - 1)
        return Gate(ranks=(answered / 4).clamp(0, 1)[..., None])


class Heads:
    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]
        return Gate(heads=torch.tensor([0.2, 0.8, 1.4, 2.0]))


class StandIn:
    """Runs a step as it is; counts recordings and runs."""

    def __init__(self) -> None:
        self.recorded = 0
        self.ran = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1

        def replay() -> Tensor:
            self.ran += 1
            return run()

        return replay


def load(zoo: Zoo, device: str = "cpu") -> Runtime:
    runtime = zoo.runtime_with(mode_host(fading=Fading, heads=Heads), "llama", device=device)
    adapters = {
        "one": zoo.adapter("llama", seed=41),
        "two": zoo.adapter("llama", seed=42, r=3, targets=["q_proj", "down_proj"]),
        "three": zoo.adapter("llama", seed=43, r=20),
        "biased": zoo.adapter("llama", seed=44, lora_bias=True),
        "fading": zoo.adapter("llama", mode="fading", seed=3),
        "headed": zoo.adapter("llama", mode="heads", seed=4),
    }
    for name, adapter in adapters.items():
        runtime.load_adapter(str(adapter), name=name)
    return runtime


@pytest.fixture
def stand_in() -> StandIn:
    return StandIn()


@pytest.fixture(scope="module")
def plain(zoo: Zoo) -> Runtime:
    """A runtime that records nothing."""
    return load(zoo)


@pytest.fixture
def recording(zoo: Zoo, stand_in: StandIn) -> Runtime:
    """One that does, by the stand-in."""
    runtime = load(zoo)
    runtime.parts.lm.steps = Steps(runtime.parts.lm, stand_in)
    return runtime


def answers(runtime: Runtime, specs: Any, tokens: int = 20, **options: Any) -> list[list[int]]:
    given = [runtime.text.prompt_ids(prompt) for prompt in PROMPTS[: len(specs)]]
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, **options}
    return [[*column] for column in zip(*runtime.decode(given, specs, **settings), strict=True)]  # type: ignore[misc]


def steps_of(runtime: Runtime) -> Steps:
    assert runtime.parts.lm.steps is not None
    return runtime.parts.lm.steps


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_recorded_step_says_what_a_plain_pass_says(
    plain: Runtime, recording: Runtime, stand_in: StandIn, count: int
) -> None:
    for start in range(len(SPECS)):
        specs = [SPECS[(start + row) % len(SPECS)] for row in range(count)]
        assert answers(recording, specs) == answers(plain, specs), specs
    assert stand_in.ran >= 15 * len(SPECS)


@pytest.mark.parametrize("seed", range(4))
def test_rows_join_and_leave_recorded_steps_and_say_what_they_say_alone(
    plain: Runtime, recording: Runtime, stand_in: StandIn, seed: int
) -> None:
    def rows(runtime: Runtime) -> list[RequestRow]:
        dice = random.Random(seed)
        ways: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.2, "top_p": 0.9, "seed": seed})
        found = []
        for _ in range(12):
            settings = {"max_new_tokens": dice.randrange(2, 30), **dice.choice(ways)}
            found += runtime.rows([dice.choice(PROMPTS)], [dice.choice(SPECS)], **settings)
        return found

    dice = random.Random(seed)
    together, waiting = rows(recording), []
    waiting += together
    batch = recording.batch(chunk=dice.choice([None, 7]))
    while waiting or batch.rows:
        batch.add([waiting.pop() for _ in range(min(dice.choice([0, 1, 3]), len(waiting)))])
        batch.step()
    for row in (alone := rows(plain)):
        single = plain.batch()
        single.add([row])
        while single.rows:
            single.step()
    assert [row.answer for row in together] == [row.answer for row in alone]
    assert stand_in.ran > 10


def test_other_adapters_of_one_layout_are_refilled_and_not_recorded_anew(
    plain: Runtime, recording: Runtime, stand_in: StandIn
) -> None:
    for spec in ("one", "one:-2", "fading", "one:0.3"):
        assert answers(recording, [spec]) == answers(plain, [spec])
    assert stand_in.recorded == 1
    answers(recording, ["one three"])  # wider
    answers(recording, ["biased"])  # with a bias
    answers(recording, [None])
    assert stand_in.recorded == 4


def test_a_running_row_is_refilled_when_its_composition_changes(plain: Runtime, recording: Runtime) -> None:
    said = []
    for runtime in (plain, recording):
        (row,) = runtime.rows([PROMPTS[0]], "one:0.7", max_new_tokens=24, min_new_tokens=24)
        batch = runtime.batch()
        batch.add([row])
        for step in range(24):
            batch.step()
            if step in (8, 12, 16):
                row.compose({8: "one:-1", 12: "three two:0.5", 16: None}[step])
        said.append(row.answer)
    assert said[0] == said[1]


def test_a_batch_sits_in_places_of_its_own_and_gives_them_back(recording: Runtime, stand_in: StandIn) -> None:
    first, second = (recording.batch() for _ in range(2))
    for batch in (first, second):
        batch.add(recording.rows([PROMPTS[0]], "one", max_new_tokens=12, min_new_tokens=12))
        batch.step()
        batch.step()
    steps = steps_of(recording)
    assert len(steps) == 2
    while first.rows:
        first.step()
    third = recording.batch()
    third.add(recording.rows([PROMPTS[1]], "one", max_new_tokens=12, min_new_tokens=12))
    third.step()
    third.step()
    assert (len(steps), stand_in.recorded) == (2, 2), "the first batch's places were free again"


def test_a_cache_that_grows_over_its_places_moves_to_larger_ones(
    zoo: Zoo, plain: Runtime, recording: Runtime, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_COLUMNS", 48)
    monkeypatch.setattr(module, "_MORE_COLUMNS", 16)
    assert answers(recording, ["one", None], 40) == answers(plain, ["one", None], 40)
    assert stand_in.recorded > 1


def test_short_answers_watched_models_and_gates_per_head_are_not_recorded(
    recording: Runtime, stand_in: StandIn
) -> None:
    answers(recording, ["one"], 4)
    answers(recording, ["headed"])
    list(recording.decode([[9, 10]], "one", max_new_tokens=12, min_new_tokens=12, deterministic=True))
    handle = recording.model.register_forward_pre_hook(lambda *_: None)
    answers(recording, ["one"])
    handle.remove()
    assert stand_in.recorded == 0


def test_a_model_whose_recorded_step_says_otherwise_is_not_recorded(
    plain: Runtime, recording: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = recording.parts.lm
    monkeypatch.setattr(lm, "at_columns", lambda ids, *_: torch.zeros(len(ids), 1, recording.base.vocab_size))
    assert answers(recording, ["one"]) == answers(plain, ["one"])
    assert len(steps_of(recording)) == 0


def test_a_step_that_cannot_be_recorded_is_a_plain_pass(plain: Runtime, recording: Runtime) -> None:
    def fails(_run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    recording.parts.lm.steps = Steps(recording.parts.lm, fails)
    assert answers(recording, ["one", "two"]) == answers(plain, ["one", "two"])
    assert len(steps_of(recording)) == 0


def test_few_recordings_are_kept(recording: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 2)
    for spec in ("one", "one three", "biased", None, "two"):
        answers(recording, [spec])
    assert len(steps_of(recording)) == 2


def test_a_seated_cache_shows_what_was_read(recording: Runtime) -> None:
    batch = recording.batch()
    batch.add(recording.rows(PROMPTS[:3], "one", max_new_tokens=12, min_new_tokens=12))
    for _ in range(3):
        batch.step()
    (group,) = batch._groups
    assert isinstance(group.cache, Seated)
    assert {layer.keys.shape[::2] for layer in group.cache.layers} == {(3, group.read)}


def test_sizes_are_rounded_up_to_few() -> None:
    assert [rounded_rows(n) for n in (1, 2, 3, 5, 16, 17, 33, 64)] == [1, 2, 4, 8, 16, 32, 48, 64]
    assert [rounded_columns(n) for n in (1, 256, 257, 512, 513)] == [256, 256, 512, 512, 1024]
    assert [rounded(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt", "gpt_neox"])
def test_every_architecture_is_recorded_or_says_the_same(zoo: Zoo, architecture: str, stand_in: StandIn) -> None:
    runtime = zoo.runtime(architecture, fresh=True)
    name = runtime.load_adapter(str(zoo.adapter(architecture)))
    given: list[list[int]] = [[9, 10, 11, 12], [20, 21]]
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    wanted = list(runtime.decode(given, [name, None], **options))
    if runtime.parts.lm.records:
        runtime.parts.lm.steps = Steps(runtime.parts.lm, stand_in)
    assert list(runtime.decode(given, [name, None], **options)) == wanted
    assert stand_in.recorded == runtime.parts.lm.records
