"""explain: what it says of each layer, head and token is what the adapters really add."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lora_rt.core.cli.app import app
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from support.tiny import HEADS, LAYERS, Zoo

Made = Callable[..., Path]


def test_twice_the_weight_adds_twice_as_much_in_the_first_layer(zoo: Zoo, runtime: Runtime) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama", targets=["q_proj"])))
    once, twice = (runtime.explain("it rains", f"{name}:{weight}") for weight in (0.1, 0.2))
    assert once.names == [name]
    assert float(twice.layers[0, 0]) == pytest.approx(2 * float(once.layers[0, 0]), rel=1e-2)
    assert torch.allclose(twice.factors, torch.full((1, LAYERS, HEADS), 0.2))


def test_the_size_is_that_of_what_was_added_over_what_the_base_gave(zoo: Zoo, runtime: Runtime) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama", targets=["q_proj"])))
    first = runtime.model.model.layers[0]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _m, inputs, y, key=key: seen.update({key: (inputs[0], y.clone())}))
        for key, module in first.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    found = runtime.explain("it rains", name)
    for handle in handles:
        handle.remove()
    factors = runtime.resident(name).factors["model.layers.0.self_attn.q_proj"]
    added = seen["self_attn.q_proj"][0] @ factors.a.T @ factors.b.T
    base = {key: y - added if key == "self_attn.q_proj" else y for key, (_, y) in seen.items()}
    whole = torch.stack([y.square().sum() for y in base.values()]).sum()
    assert float(found.layers[0, 0]) == pytest.approx(float((added.square().sum() / whole).sqrt()), rel=1e-4)


def test_a_suppressed_adapter_adds_nothing_and_a_sleeping_one_nothing_before_its_words(
    zoo: Zoo, runtime: Runtime, made: Made
) -> None:
    runtime.load_adapter(str(made("logic", gates=3)), "logic")
    state = runtime.resident("logic").state
    state["theta"][0, 1] = -60.0  # the second layer, for scenes of type logic
    explanation = runtime.explain("it rains", "logic", scene="logic")
    assert float(explanation.layers[0, 1]) == pytest.approx(0, abs=1e-6)
    assert float(explanation.layers[0, 0]) > 0.01
    asleep = runtime.explain("it So: rains", "logic[So:]", scene="body")
    start = len(runtime.tokenizer("user: it So:").input_ids) - 1
    assert not bool(asleep.tokens[0, :start].any())
    assert bool((asleep.tokens[0, start:] > 0).all())


def test_nothing_to_explain_is_said(runtime: Runtime, zoo: Zoo) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama")))
    with pytest.raises(LoraRtError, match="no adapter acts"):
        runtime.explain("it rains", f"{name}:0")


@pytest.mark.slow
def test_what_is_no_number_is_not_drawn(runtime: Runtime, zoo: Zoo) -> None:
    name = runtime.ensure(str(zoo.adapter("llama", seed=1)))
    with pytest.raises(LoraRtError, match="not a number any more"):
        runtime.explain("it rains", f"{name}:1e30")


@pytest.mark.slow
def test_the_commands_explain_and_scene_agree_with_the_runtime(zoo: Zoo, made: Made, tmp_path: Path) -> None:
    folder = made("logic", gates=3)
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    picture = tmp_path / "map.png"
    run = CliRunner().invoke
    result = run(app, ["explain", f"{folder}:0.5", "-p", "it rains", "--json", "--png", str(picture), *base])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["adapters"] == ["logic"]
    assert len(found["layers"][0]) == LAYERS
    assert len(found["per_token"][0]) == len(found["tokens"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = json.loads(run(app, ["scene", "it rains", "--adapter", str(folder), "--json", *base]).stdout)
    assert shown["scene_types"] == pytest.approx(found["scene_type"], abs=1e-5)
    assert sum(shown["scene_types"].values()) == pytest.approx(1, abs=1e-5)
    table = run(app, ["explain", f"{folder}:0.5", "-p", "it rains", "--heads", "--tokens", *base])
    assert table.exit_code == 0
    assert "head 3" in table.stdout
    assert "it rains" in table.stdout
