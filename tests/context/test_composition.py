"""A named composition of the mode context leads its adapters as context adapters of the same gates lead themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from lora_rt.core.cli.app import app
from lora_rt.core.requests.merging import _share
from lora_rt.core.requests.rows import Row
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.files import sha256_bytes
from lora_rt.registry.registry import Registry
from support.tiny import Zoo

Made = Callable[..., Path]
IDS = [1, 40, 41, 90, 7, 130, 60]
OTHER = [1, 77, 12, 200, 31, 5, 99]


@pytest.fixture
def led(zoo: Zoo, made: Made) -> list[Path]:
    """The composition `led` over two plain adapters, and two context adapters with its gates: the same files else."""
    own = [made("logic", seed=1, gates=1), made("body", seed=2, gates=2)]
    plain = [zoo.adapter("llama", seed=seed) for seed in (1, 2)]
    states = [load_file(folder / "mode.safetensors") for folder in own]
    together = {name: torch.stack([state[name] for state in states]) for name in ("theta", "scale")}
    content = save({**together, "registrar": states[0]["registrar"]})
    terms = [
        NamedTerm(reference=str(folder), sha256=Registry().resolve(str(folder)).sha256, weight=weight)
        for folder, weight in zip(plain, (0.5, -0.4), strict=True)
    ]
    made_of = NamedComposition(
        name="led", base=zoo.base("llama").name, terms=tuple(terms), mode="context", scene_types=("logic", "body"),
        hidden_layers=1, state=sha256_bytes(content),
    )  # fmt: skip
    Registry().compositions.save(made_of, content)
    return own


@pytest.mark.parametrize("scene", ["logic", "body", "neutral", None])
def test_it_is_what_adapters_with_these_gates_are(runtime: Runtime, led: list[Path], scene: str | None) -> None:
    names = [runtime.load_adapter(str(folder)) for folder in led]
    by_hand = f"{names[0]}:0.5 {names[1]}:-0.4"
    found = runtime.logits([IDS, OTHER], compositions="led", scenes=[scene, scene])
    assert torch.allclose(found, runtime.logits([IDS, OTHER], compositions=by_hand, scenes=[scene, scene]), atol=1e-4)


def test_rows_of_other_scenes_and_compositions_do_not_see_each_other(runtime: Runtime, led: list[Path]) -> None:
    name = runtime.load_adapter(str(led[0]))
    specs, scenes = ["led", "led", f"{name}:0.5", None, "led:0.5"], ["logic", "body", "body", None, None]
    rows = [IDS, OTHER, IDS, OTHER, IDS]
    together = runtime.logits(rows, compositions=specs, scenes=scenes)
    for row, spec, scene, found in zip(rows, specs, scenes, together, strict=True):
        alone = runtime.logits([row], compositions=[spec], scenes=[scene])[0]
        assert torch.allclose(found, alone, atol=1e-4)


def test_a_head_gate_holds_for_its_own_share_alone(runtime: Runtime, led: list[Path]) -> None:
    """`led` and one of its adapters beside it, as terms of one row: the static share is not scaled by the heads."""
    own = [runtime.load_adapter(str(folder)) for folder in led]
    plain = runtime.terms("led")[0][0].name
    by_hand = f"{own[0]}:0.5 {own[1]}:-0.4 {plain}:0.3"
    terms = {term.reference: term for term in Registry().compositions.own("led").terms}  # type: ignore[union-attr]
    found = runtime.logits([IDS], compositions=f"led {next(iter(terms))}:0.3", scenes=["logic"])
    assert torch.allclose(found, runtime.logits([IDS], compositions=by_hand, scenes=["logic"]), atol=1e-3)


def test_an_unknown_scene_is_refused_by_name(runtime: Runtime, led: list[Path]) -> None:
    with pytest.raises(LoraRtError, match="'led' does not know the scene type 'emotion'"):
        runtime.logits([IDS], compositions="led", scenes=["emotion"])


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_composition_learns_its_scenes_and_the_scene_command_asks_it(zoo: Zoo, tmp_path: Path) -> None:
    lines = [{"scene": f"x{n}", "text": "abc", "scene_type": "logic"} for n in range(4)]
    lines += [{"scene": f"y{n}", "text": "cba", "scene_type": "body"} for n in range(4)]
    lines += [{"scene": f"z{n}", "text": "bbb", "scene_type": "neutral"} for n in range(4)]
    data = tmp_path / "mix.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    spec = [f"{zoo.adapter('llama', seed=seed)}:0.4" for seed in (1, 2)]
    given = ["--data", str(data), "--per", "scene", "--name", "aled", "--epochs", "4", "--lr", "0.3", *base]
    made = run("tune", *spec, *given)
    assert made["mode"] == "context"
    assert made["scene_types"] == ["logic", "body"]
    assert made["metrics"]["nll_after"] < made["metrics"]["nll_before"]
    told = run("scene", "x7", *base)
    assert told["adapter"] == "aled"
    assert max(told["scene_types"], key=told["scene_types"].get) == "logic"


def test_without_scene_types_no_composition_is_led(zoo: Zoo, tmp_path: Path) -> None:
    data = tmp_path / "mix.jsonl"
    data.write_text('{"scene": "x", "text": "abc"}\n' * 4)
    given = ["tune", str(zoo.adapter("llama", seed=1)), "--data", str(data), "--per", "scene", "--name", "aled"]
    error = CliRunner().invoke(app, [*given, "--base", str(zoo.base("llama")), "--precision", "float32"]).exception
    assert isinstance(error, LoraRtError)
    assert "scene_type" in " ".join([error.message, *error.problems])


@pytest.mark.parametrize("wrong", ["logic ", "a b", "So [x]", "a,b", "a+b"])
@pytest.mark.parametrize("option", ["--data", "--prompts"])
def test_a_scene_type_that_nobody_could_name_is_refused_by_its_line(
    zoo: Zoo, tmp_path: Path, wrong: str, option: str
) -> None:
    for name, kind in (("--data", "logic"), ("--prompts", "body"), (option, wrong)):
        lines = [{"scene": "x", "text": "abc", "scene_type": "logic"}, {"scene": "y", "text": "b", "scene_type": kind}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [part for name in ("--data", "--prompts") for part in (name, str(tmp_path / f"{name}.jsonl"))]
    command = ["tune", str(zoo.adapter("llama", seed=1)), *given, "--per", "scene", "--name", "aled"]
    error = CliRunner().invoke(app, [*command, "--base", str(zoo.base("llama")), "--precision", "float32"]).exception
    assert isinstance(error, LoraRtError)
    (problem,) = error.problems
    assert problem.startswith(f'line 2: "scene_type" is {wrong!r}')


@pytest.mark.parametrize("static", [-0.5, -0.4999, 0.3])
def test_a_share_that_cancels_leaves_what_its_heads_differ_by(static: float) -> None:
    moded: Any = "led"
    heads = torch.tensor([0.25, 1.5]).view(1, 1, 1, 2)
    row = Row({}, {"a": static}, moded={moded: {"a": 0.5}})
    share = _share("a", [row], [(moded, {"a": Gate(heads=heads)})], torch.device("cpu"))
    assert share.ranks is not None
    assert share.heads is not None
    assert torch.allclose(share.ranks * share.heads, static + 0.5 * heads, atol=1e-5)
