"""A scene type that nobody gave is registered once per request, from the prompt alone, by the base's early state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import SceneContext, ScenePrediction, hookimpl
from lora_rt.plugins.modes import context as mode
from support.tiny import Zoo, mode_host, some_ids

Made = Callable[..., Path]


class Counted:
    """The context mode under another name, counting its registrations."""

    rows: list[int] = []  # noqa: RUF012  # shared on purpose: hooks are functions

    lora_rt_gate = mode.lora_rt_gate
    lora_rt_compose = mode.lora_rt_compose

    @hookimpl
    def lora_rt_scene(context: SceneContext) -> ScenePrediction | None:  # type: ignore[misc]  # becomes a module's function
        Counted.rows.append(len(context.hidden))
        return mode.lora_rt_scene(context)


def counted_runtime(zoo: Zoo, folder: Path) -> Runtime:
    card = (folder / "register.json").read_text()
    (folder / "register.json").write_text(card.replace('"mode": "context"', '"mode": "counted"'))
    runtime = zoo.runtime_with(mode_host(counted=Counted), "llama")
    runtime.load_adapter(str(folder), "logic")
    Counted.rows.clear()
    return runtime


def test_it_happens_once_for_all_rows_that_have_no_type_and_never_while_decoding(zoo: Zoo, made: Made) -> None:
    runtime = counted_runtime(zoo, made("logic", gates=3))
    runtime.generate(
        ["a", "b", "c", "d"],
        ["logic", "logic:0.5", "logic", None],
        scenes=[None, None, "body", None],
        max_new_tokens=5,
        min_new_tokens=5,
    )
    assert Counted.rows == [2]


def test_registered_is_as_if_the_caller_had_given_the_distribution(runtime: Runtime, made: Made) -> None:
    runtime.load_adapter(str(made("logic", gates=3)), "logic")
    prompts, answers = ["it rains", "two and two"], ["abc", "no"]
    shares = runtime.register_scenes(prompts, "logic")
    assert set(shares[0]) == {"logic", "body", "neutral"}
    assert shares[0] != shares[1]
    found = runtime.answer_nll(prompts, answers, "logic")
    given = runtime.answer_nll(prompts, answers, "logic", scenes=shares)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, given, strict=True))


def test_what_follows_the_prompt_does_not_change_the_type(runtime: Runtime, made: Made) -> None:
    """A type read off the answer would let the answer's own words choose the gates that score it."""
    runtime.load_adapter(str(made("logic", gates=3)), "logic")
    one, other = (runtime.answer_nll(["it rains"], [answer], "logic")[0] for answer in ("abc", "abz"))
    assert torch.allclose(one[:2], other[:2], atol=1e-5)


def test_a_prompt_in_a_padded_batch_is_registered_as_alone(runtime: Runtime, made: Made) -> None:
    runtime.load_adapter(str(made("logic", gates=3)), "logic")
    together = runtime.register_scenes(["a", "a much longer prompt than that"], "logic")
    assert together[0] == pytest.approx(runtime.register_scenes(["a"], "logic")[0], abs=1e-5)


def test_the_base_alone_and_modes_without_a_registrar_pay_nothing(
    zoo: Zoo, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama")))
    monkeypatch.setattr(
        runtime.parts.classifier, "features", lambda _prompts: pytest.fail("the early state was computed")
    )
    runtime.logits(some_ids(), compositions=name)
    runtime.logits(some_ids())
    monkeypatch.undo()
    with pytest.raises(LoraRtError, match="recognizes no scenes"):
        runtime.register_scenes(["a"], name)
