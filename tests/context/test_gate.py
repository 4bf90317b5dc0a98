"""The gate of a context adapter: by scene type, layer and head, between 0 and 2, and exactly 1 at the start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lora_rt.core.requests.rows import RequestError
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from support.tiny import HEAD_SIZE, HEADS, LAYERS, Zoo, deltas, dense_model, some_ids

Made = Callable[..., Path]


def test_an_untrained_gate_equals_the_static_composition_bit_for_bit(zoo: Zoo, runtime: Runtime, made: Made) -> None:
    runtime.load_adapter(str(made("logic", gates=None)), "logic")
    runtime.load_adapter(str(zoo.adapter("llama", seed=1)), "plain")
    ids = some_ids(2)
    for scene in (None, "body", "neutral", {"logic": 0.3, "body": 0.7}):
        gated = runtime.logits(ids, compositions="logic:0.8", scenes=[scene, scene])
        assert torch.equal(gated, runtime.logits(ids, compositions="plain:0.8"))


def test_neutral_text_is_under_the_static_composition(zoo: Zoo, runtime: Runtime, made: Made) -> None:
    runtime.load_adapter(str(made("logic", gates=3)), "logic")
    runtime.load_adapter(str(zoo.adapter("llama", seed=1)), "plain")
    ids = some_ids()
    plain = runtime.logits(ids, compositions="plain:0.8")
    assert torch.allclose(runtime.logits(ids, compositions="logic:0.8", scenes="neutral"), plain, atol=1e-5)
    assert not torch.allclose(runtime.logits(ids, compositions="logic:0.8", scenes="body"), plain, atol=1e-3)


@pytest.mark.parametrize("scene", ["logic", "body"])
def test_the_gated_model_equals_a_dense_one_with_scaled_heads(
    zoo: Zoo, runtime: Runtime, made: Made, scene: str
) -> None:
    """Queries and values scaled on the output side, the output projection on its input side, key/value heads pooled."""
    folder = made("logic", gates=3)
    runtime.load_adapter(str(folder), "logic")
    state = load_file(folder / "mode.safetensors")
    kind = ("logic", "body").index(scene)
    heads = 2 * state["theta"][kind].sigmoid()
    weight = 0.8 * float(state["scale"][kind].exp())
    model = dense_model(zoo.base("llama"), [])
    with torch.no_grad():
        for name, (change, _) in deltas(zoo.base("llama"), zoo.adapter("llama", seed=1)).items():
            layer = int(name.split(".")[2])
            each = heads[layer]
            if name.endswith(("k_proj", "v_proj")):
                each = each.reshape(-1, HEADS // 2).mean(1)
            spread = each.repeat_interleave(HEAD_SIZE)
            scaled = change * spread if name.endswith("o_proj") else change * spread[:, None]
            model.get_submodule(name).weight += weight * scaled
        expected = model(input_ids=some_ids()).logits
    assert torch.allclose(runtime.logits(some_ids(), compositions="logic:0.8", scenes=scene), expected, atol=1e-4)


def test_a_distribution_gives_the_mixture_of_the_gates(runtime: Runtime, made: Made) -> None:
    folder = made("logic", gates=3)
    runtime.load_adapter(str(folder), "logic")
    ids = some_ids()
    whole = runtime.logits(ids, compositions="logic", scenes=[{"logic": 1.0, "body": 0.0}])
    assert torch.allclose(whole, runtime.logits(ids, compositions="logic", scenes="logic"), atol=1e-6)
    half = runtime.logits(ids, compositions="logic", scenes=[{"logic": 0.5, "body": 0.5}])
    assert not torch.allclose(half, whole, atol=1e-3)


def test_every_row_has_its_own_scene(runtime: Runtime, made: Made) -> None:
    runtime.load_adapter(str(made("logic", gates=3)), "logic")
    ids = some_ids(3)
    scenes = ["logic", "neutral", "body"]
    together = runtime.logits(ids, compositions="logic:0.5", scenes=scenes)
    for row, scene in enumerate(scenes):
        alone = runtime.logits(ids[row : row + 1], compositions="logic:0.5", scenes=scene)
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_one_factor_per_layer_acts_as_that_factor_on_every_head(runtime: Runtime, made: Made) -> None:
    narrow = made("narrow", gates=3, heads=1)
    wide = made("wide", gates=3)
    from safetensors.torch import save_file

    state = load_file(narrow / "mode.safetensors")
    save_file({**state, "theta": state["theta"].expand(2, LAYERS, HEADS).contiguous()}, wide / "mode.safetensors")
    (wide / "register.json").unlink()
    (wide / "register.json").write_text(
        (narrow / "register.json").read_text().replace(f"{LAYERS},\n        1", f"{LAYERS},\n        {HEADS}")
    )
    for folder in (narrow, wide):
        runtime.load_adapter(str(folder), folder.name)
    ids = some_ids()
    logits = [runtime.logits(ids, compositions=name, scenes="body") for name in ("narrow", "wide")]
    assert torch.allclose(*logits, atol=1e-5)


def test_an_unknown_scene_type_is_refused_with_those_that_are_known(runtime: Runtime, made: Made) -> None:
    runtime.load_adapter(str(made("logic", gates=3)), "logic")
    with pytest.raises(LoraRtError, match="does not know the scene type 'boddy'") as caught:
        runtime.logits(some_ids(), compositions="logic", scenes="boddy")
    assert caught.value.next_step == "Use one of: logic, body, neutral"


def test_a_state_of_another_shape_is_the_adapter_s_fault(runtime: Runtime, made: Made) -> None:
    runtime.load_adapter(str(made("logic", gates=3, heads=HEADS + 1)), "logic")
    with pytest.raises(
        LoraRtError, match=r"'theta' in the state of 'logic' has the shape \(2, 2, 5\), not \(2, 2, 4\)"
    ):
        runtime.logits(some_ids(), compositions="logic", scenes="body")


@pytest.mark.parametrize("scene", [{"body": 5}, {"body": float("nan")}, {"body": -0.1}, {"body": 0.7, "logic": 0.7}, 5])
def test_what_are_no_shares_of_scene_types_is_the_callers_mistake(runtime: Runtime, made: Made, scene: Any) -> None:
    spec = str(made("mine"))
    with pytest.raises(RequestError, match=r"shares|not a scene"):
        runtime.generate("ab", spec, scenes=[scene], max_new_tokens=2)
    assert runtime.generate("ab", spec, scenes=[{"body": 0.7, "logic": 0.3}], max_new_tokens=2, min_new_tokens=2)


def test_the_weight_is_rescaled_by_the_registered_scene(runtime: Runtime, made: Made) -> None:
    from lora_rt.plugins.contract import ComposeContext, TermFacts
    from lora_rt.plugins.modes.context import lora_rt_compose

    state = {"scale": torch.tensor([2.0, 0.5]).log()}
    term = TermFacts("logic", -0.5, "context", {"scene_types": ["logic", "body"]}, state)
    for scene, factor in (("logic", 2.0), ("body", 0.5), ("neutral", 1.0), ({"logic": 0.5, "neutral": 0.5}, 1.5)):
        context = ComposeContext([term], [0], None, scene, runtime.base)
        weights = lora_rt_compose(context)
        assert weights is not None
        assert float(weights[0]) == pytest.approx(-0.5 * factor)
    assert lora_rt_compose(ComposeContext([term], [0], None, None, runtime.base)) is None
