"""Weights, gates and classifier learn by gradient through the engine's plan; base and adapters stay as they are."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lora_rt
from lora_rt.core.cli.app import app
from lora_rt.core.requests.composition import Composition
from lora_rt.core.tuning.data import Item, held_out
from lora_rt.core.tuning.scenes import SceneFit
from lora_rt.core.tuning.session import Job, open_job
from lora_rt.core.tuning.settings import SceneSettings, TuneError, TuneSettings
from lora_rt.core.tuning.weights import mean_loss, tune
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import GateContext
from lora_rt.registry import durable, home
from lora_rt.registry.compositions import NamedComposition, NamedCompositions, NamedTerm
from lora_rt.registry.registry import Registry
from lora_rt.registry.store import Store
from support.adapters import in_parts
from support.cli import Cli
from support.opens import opened_from_now_on
from support.tiny import Zoo

pytestmark = pytest.mark.slow

Made = Callable[..., Path]


def job(zoo: Zoo, spec: str, data: Path = Path("none")) -> Job:
    return Job(Composition.parse(spec), data, str(zoo.base("llama")), "float32", "cpu")


def items(zoo: Zoo) -> list[Item]:
    """Prompts of x are of type logic and of y of type body; answers likewise differ."""
    letters = {"logic": (200, 201), "body": (100, 101), "neutral": (150, 151)}
    return [
        Item([1, first, first, 20 + n], [second, first, 2], kind)
        for n in range(4)
        for kind, (first, second) in letters.items()
    ]


def test_prompts_without_answers_teach_the_classifier_alone(zoo: Zoo, made: Made) -> None:
    """They are of letters that the data gives to the other type; the gates are what they are without them."""
    more = [Item([1, 200, 60 + n], [], "body") for n in range(6)]
    adapter, found = made("logic", gates=None), []
    for taught in ([], more):
        frozen, weights, _ = open_job(job(zoo, f"{adapter}:0.5"), Registry())
        fit = SceneFit(frozen, weights, items(zoo), SceneSettings(epochs=1, classifier_steps=40))
        fit.fit_classifier(more=taught)
        right, _ = fit.accuracy([Item([1, 200, 70], [], "body")])
        found.append((right, fit.fit_gates()))
    (before, losses), (after, same) = found
    assert (before, after) == (0, 1)
    assert same == losses


def test_fitting_changes_the_state_and_nothing_else(zoo: Zoo, made: Made) -> None:
    frozen, weights, _ = open_job(job(zoo, f"{made('logic', gates=None)}:0.5 {made('body', seed=2)}:0.5"), Registry())
    digest = frozen.base.digest()
    factors = {n: {s: f.b.clone() for s, f in a.factors.items()} for n, a in frozen.bank.residents.items()}
    fit = SceneFit(frozen, weights, items(zoo), SceneSettings(epochs=10, learning_rate=0.2, classifier_steps=40))
    right = fit.fit_classifier()
    before = {name: {key: value.detach().clone() for key, value in s.items()} for name, s in fit.states.items()}
    losses = fit.fit_gates()
    assert right == 1.0
    assert sum(losses[-3:]) < sum(losses[:3])
    for name, state in fit.states.items():
        assert not torch.equal(state["theta"], before[name]["theta"])
        assert not torch.equal(state["scale"], before[name]["scale"])
        assert torch.equal(state["registrar"], before[name]["registrar"])
    assert torch.equal(fit.states["logic"]["registrar"], fit.states["body"]["registrar"])
    assert frozen.base.digest() == digest
    for name, adapter in frozen.bank.residents.items():
        assert all(torch.equal(f.b, factors[name][s]) and not f.b.requires_grad for s, f in adapter.factors.items())


def test_a_fit_begins_at_the_static_mix(zoo: Zoo, made: Made) -> None:
    spec = f"{made('logic', gates=None)}:0.5 {made('body', gates=None)}:-0.3"
    frozen, weights, _ = open_job(job(zoo, spec), Registry())
    fit = SceneFit(frozen, weights, items(zoo), SceneSettings(epochs=0.01, batch_size=12))
    static = mean_loss(
        frozen, [i for i in items(zoo) if i.scene_type != "neutral"], {n: torch.tensor([w]) for n, w in weights.items()}
    )
    assert fit.fit_gates()[0] == pytest.approx(static, abs=1e-4)


def test_a_penalty_keeps_the_gates_near_the_static_mix(zoo: Zoo, made: Made) -> None:
    distances = []
    for keep in (0.0, 30.0):
        frozen, weights, _ = open_job(job(zoo, f"{made(f'logic{keep:g}', gates=None)}:0.5"), Registry())
        fit = SceneFit(frozen, weights, items(zoo), SceneSettings(epochs=5, keep=keep))
        fit.fit_gates()
        (state,) = fit.states.values()
        distances.append(float((2 * state["theta"].detach().sigmoid() - 1).abs().mean()))
    assert distances[1] < distances[0] / 2


def test_weights_find_the_composition_that_wrote_the_answers(zoo: Zoo) -> None:
    """The answers are the greedy ones of `first`: from an even mix on, its weight rises and the other's falls."""
    first, second = zoo.adapter("llama", seed=1, r=8), zoo.adapter("llama", seed=2, r=8)
    frozen, weights, _ = open_job(job(zoo, f"{first}:0.5 {second}:0.5"), Registry())
    runtime = zoo.runtime("llama", fresh=True)
    name = runtime.load_adapter(str(first))
    data = []
    for seed in range(6):
        prompt = [1, *range(20 + 7 * seed, 26 + 7 * seed)]
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(runtime.logits([ids], compositions=f"{name}:1.5")[0, -1].argmax()))
        data.append(Item(prompt, ids[len(prompt) :]))
    for per in ("adapter", "layer"):
        tuned = tune(frozen, weights, data, TuneSettings(per=per, epochs=15, learning_rate=0.05, pull=0.0))
        good, bad = (sum(tuned.weights[path.name]) / len(tuned.weights[path.name]) for path in (first, second))
        assert good > 0.6
        assert bad < 0.45
        assert tuned.loss_after < tuned.loss_before


def write(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def invoke(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found: dict[str, object] = json.loads(result.stdout)
    return found


LINES = [{"scene": f"x{n}", "text": "abc", "scene_type": "logic"} for n in range(3)]
LINES += [{"scene": f"y{n}", "text": "cba", "scene_type": "body"} for n in range(3)]


@pytest.mark.parametrize("per", ["adapter", "layer"])
def test_a_tuned_composition_resolves_like_an_adapter(
    zoo: Zoo, tmp_path: Path, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapters = [zoo.adapter("llama", seed=seed) for seed in (1, 2)]
    data = write(tmp_path / "mix.jsonl", LINES)
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    spec = [f"{adapters[0]}:0.5", f"{adapters[1]}:-0.5"]
    mix = invoke("tune", *spec, "--data", str(data), "--per", per, "--name", "mine", "--epochs", "2", *base)
    assert mix["name"] == "mine"
    runtime = zoo.runtime("llama", fresh=True)
    ids = runtime.tokenizer("hello", return_tensors="pt").input_ids
    named = runtime.logits(ids, compositions="mine:0.5")
    terms: list[dict[str, object]] = mix["terms"]  # type: ignore[assignment]
    if per == "adapter":
        same = " ".join(f"{term['reference']}:{float(str(term['weight'])) / 2!r}" for term in terms)
        assert torch.allclose(named, runtime.logits(ids, compositions=same), atol=1e-5)
    else:
        assert [len(term["layers"]) for term in terms] == [2, 2]  # type: ignore[arg-type]
        assert not torch.allclose(named, runtime.logits(ids), atol=1e-4)
    saved = Registry().compositions.get("mine")
    assert saved is not None
    wrong = saved.terms[0].model_copy(update={"sha256": "0" * 64})
    Registry().compositions.save(saved.model_copy(update={"name": "stale", "terms": (wrong,)}))
    with pytest.raises(LoraRtError, match="was tuned for other files"):
        runtime.logits(ids, compositions="stale")


@pytest.mark.parametrize("parts", [False, True], ids=["one file", "in parts"])
def test_fitted_adapters_are_published_with_their_state_in_the_card(
    zoo: Zoo, made: Made, tmp_path: Path, *, parts: bool
) -> None:
    folder = made("logic", gates=None)
    if parts:
        in_parts(folder)
    data = write(tmp_path / "mix.jsonl", LINES)
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    out = tmp_path / "fitted"
    invoke("tune", f"{folder}:0.5", "--data", str(data), "--per", "scene", "--out", str(out), "--lr", "0.3", *base)
    state = load_file(out / "logic" / "mode.safetensors")
    assert bool(state["theta"].any())
    card = json.loads((out / "logic" / "register.json").read_text())
    assert card["state"]["theta"] == {"dtype": "F32", "shape": [2, 2, 4]}
    assert "gates_nll_last" in card["metrics"]
    runtime = zoo.runtime("llama", fresh=True)
    runtime.load_adapter(str(out / "logic"), "logic")
    (shares,) = runtime.register_scenes(["x7"], "logic")
    assert max(shares, key=lambda kind: shares[kind]) == "logic"
    given = runtime.answer_nll(["x7"], ["abc"], "logic", scenes=[shares])[0]
    assert torch.allclose(runtime.answer_nll(["x7"], ["abc"], "logic")[0], given, atol=1e-5)


def test_adapters_without_gates_are_named(zoo: Zoo) -> None:
    frozen, weights, _ = open_job(job(zoo, f"{zoo.adapter('llama')}"), Registry())
    with pytest.raises(TuneError, match="gates can't be fitted") as caught:
        SceneFit(frozen, weights, items(zoo), SceneSettings())
    assert "its mode is output-only" in caught.value.problems[0]


def test_a_named_composition_is_listed_composed_and_removed(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = zoo.adapter("llama", seed=1)
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    data = write(tmp_path / "mix.jsonl", LINES)
    invoke("tune", f"{adapter}:0.5", "--data", str(data), "--per", "layer", "--name", "mine", "--epochs", "1", *base)
    (listed,) = [row for row in invoke_list() if row["name"] == "mine"]
    assert listed["mode"] == "composition"
    composed = invoke("compose", "mine:0.5", "-p", "hello", "--max-new-tokens", "64", "--seed", "1", *base)
    terms: list[dict[str, object]] = composed["terms"]  # type: ignore[assignment]
    assert [term["name"] for term in terms] == [adapter.name]
    runtime = zoo.runtime("llama", fresh=True)
    settings = {"max_new_tokens": 64, "seed": 1, "temperature": 0.7, "top_p": 0.9}
    assert composed["text"] == runtime.generate("hello", "mine:0.5", repetition_penalty=1.1, **settings)
    unpenalised = runtime.generate("hello", "mine:0.5", repetition_penalty=1.0, **settings)
    assert composed["text"] != unpenalised, "too little is repeated for this test to tell anything"
    assert CliRunner().invoke(app, ["rm", "mine", "-y"]).exit_code == 0
    assert "mine" not in [row["name"] for row in invoke_list()]
    with pytest.raises(LoraRtError, match="there is no adapter 'mine'"):
        runtime.generate("hello", "mine")


@pytest.mark.parametrize("weight", ["1e300", "1e30"])
def test_weights_that_nothing_can_be_computed_with_are_refused(zoo: Zoo, weight: str) -> None:
    frozen, weights, _ = open_job(job(zoo, f"{zoo.adapter('llama', seed=1)}:{weight}"), Registry())
    with pytest.raises(LoraRtError, match="weights are too large"):
        tune(frozen, weights, items(zoo), TuneSettings())


def test_gates_without_an_example_of_their_types_are_refused(zoo: Zoo, made: Made) -> None:
    frozen, weights, _ = open_job(job(zoo, f"{made('logic', gates=None)}"), Registry())
    neutral = [item for item in items(zoo) if item.scene_type == "neutral"]
    with pytest.raises(TuneError, match="no line of the data has a scene type of these adapters: logic, body"):
        SceneFit(frozen, weights, neutral, SceneSettings()).fit_gates()


def test_gates_are_not_fitted_by_a_loss_that_is_not_a_number(
    zoo: Zoo, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, weights, _ = open_job(job(zoo, f"{made('logic', gates=None)}"), Registry())
    own = frozen.nll
    monkeypatch.setattr(frozen, "nll", lambda *given: (own(*given)[0] * float("nan"), own(*given)[1]))
    with pytest.raises(TuneError, match="the loss is nan at step 1"):
        SceneFit(frozen, weights, items(zoo), SceneSettings()).fit_gates()


def test_a_fit_tells_the_gates_where_the_prompts_end(zoo: Zoo, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, weights, _ = open_job(job(zoo, f"{made('logic', gates=None)}"), Registry())
    seen: list[GateContext] = []
    gate = frozen.modes.gate
    monkeypatch.setattr(frozen.modes, "gate", lambda mode, context: seen.append(context) or gate(mode, context))
    SceneFit(frozen, weights, items(zoo), SceneSettings(batch_size=4)).fit_gates()
    assert all(context.prompt_lengths.tolist() == [4] * 4 for context in seen)
    assert all(context.positions[0].tolist() == list(range(7)) for context in seen)


def test_a_composition_is_tuned_further_as_its_adapters(zoo: Zoo, tmp_path: Path) -> None:
    adapters = [zoo.adapter("llama", seed=seed) for seed in (1, 2)]
    data = write(tmp_path / "mix.jsonl", LINES * 3)
    common = ["--data", str(data), "--epochs", "1", "--base", str(zoo.base("llama")), "--precision", "float32"]
    first = invoke("tune", *map(str, adapters), "--name", "mine", "--per", "layer", *common)
    again = invoke("tune", "mine:0.5", "--name", "mine", "--lr", "0.0001", *common)
    for before, after in zip(first["terms"], again["terms"], strict=True):  # type: ignore[call-overload]
        assert (after["reference"], after["sha256"]) == (before["reference"], before["sha256"])
        assert after["weight"] == pytest.approx(sum(before["layers"]) / len(before["layers"]) / 2, abs=1e-3)
    runtime = zoo.runtime("llama", fresh=True)
    by_hand = " ".join(f"{term['reference']}:{term['weight']}" for term in again["terms"])  # type: ignore[attr-defined]
    assert runtime.generate("x", "mine", max_new_tokens=8) == runtime.generate("x", by_hand, max_new_tokens=8)


def test_a_name_that_a_composition_can_not_have_is_refused_before_anything_is_loaded(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_rt.core.tuning.session.load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    data, base = write(tmp_path / "mix.jsonl", LINES), str(zoo.base("llama"))
    given = ["tune", "logic", "--data", str(data), "--name", "a b", "--base", base, "--precision", "float32"]
    result = CliRunner().invoke(app, given)
    assert isinstance(result.exception, LoraRtError)
    assert "'a b' is not a name that a composition can have" in result.exception.message


def invoke_list() -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    return found


def test_after_on_the_command_line_lets_all_terms_wait(zoo: Zoo) -> None:
    adapter = zoo.adapter("llama", seed=1)
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    common = ["-p", "hello", "--max-new-tokens", "6", "--temperature", "0", "--seed", "1", *base]
    waiting = invoke("compose", f"{adapter}:3", "--after", "never", *common)
    plain = invoke("compose", f"{adapter}:0", *common)
    speaking = invoke("compose", f"{adapter}:3", "--after", "hello", *common)
    assert waiting["text"] == plain["text"]
    assert speaking["text"] != plain["text"]


@pytest.mark.parametrize("per", ["adapter", "layer", "scene"])
def test_a_fit_that_does_not_beat_its_start_is_not_published(
    zoo: Zoo, tmp_path: Path, made: Made, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that changes nothing: no weight and no gate of it is better than another."""
    monkeypatch.chdir(tmp_path)
    adapter = made("logic", gates=None)
    file = adapter / "adapter_model.safetensors"
    save_file({k: v * (".lora_B." not in k) for k, v in load_file(file).items()}, file, {"format": "pt"})
    data = write(tmp_path / "mix.jsonl", LINES)
    given = ["tune", f"{adapter}:0.5", "--data", str(data), "--per", per, "--epochs", "1"]
    given += ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu", "--name", "mine"]
    result = CliRunner().invoke(app, [*given, *(["--out", str(tmp_path / "out")] if per == "scene" else [])])
    assert isinstance(result.exception, TuneError), result.output
    assert "were better than the start on held-out examples" in result.exception.message
    assert "nats per token" in result.exception.message
    assert "mine" not in [row["name"] for row in invoke_list()]
    assert not (tmp_path / "out").exists()


def test_the_best_weights_that_were_seen_are_kept_and_not_the_last(zoo: Zoo) -> None:
    frozen, weights, _ = open_job(job(zoo, f"{zoo.adapter('llama', seed=1)}:0.5"), Registry())
    tuned = tune(frozen, weights, items(zoo), TuneSettings(epochs=10, learning_rate=3.0, batch_size=2, pull=0.0))
    _, aside = held_out(items(zoo), 0)
    kept = {name: torch.tensor(value) for name, value in tuned.weights.items()}
    assert mean_loss(frozen, aside, kept) == pytest.approx(tuned.loss_after, abs=1e-5)
    assert tuned.loss_after <= tuned.loss_before


def test_a_fit_that_can_not_be_published_is_kept_and_the_error_says_where(
    zoo: Zoo, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the fitted adapters becomes one that can't be made while the fit runs."""
    out = tmp_path / "fitted"

    def occupied(fit: SceneFit, *arguments: Any) -> tuple[float, float, list[float]]:
        out.write_text("in the way")
        return 2.0, 1.0, [1.0]

    monkeypatch.setattr(SceneFit, "fit_best_gates", occupied)
    data = write(tmp_path / "lines.jsonl", LINES)
    given = ["tune", f"{made('logic', gates=None)}:0.5", "--data", str(data), "--per", "scene", "--out", str(out)]
    given += ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    error = CliRunner().invoke(app, given).exception
    assert isinstance(error, LoraRtError)
    assert "the fit is done, but 'logic' is not published" in error.message
    (kept,) = home.checkpoints().glob("fitted-*/logic")
    assert f"all adapters are in {kept.parent}" in error.next_step
    zoo.runtime("llama", fresh=True).load_adapter(str(kept), "logic")


@pytest.mark.parametrize("per", ["adapter", "token", "scene"])
def test_a_fit_opens_modes_and_registry_once(
    zoo: Zoo, made: Made, tmp_path: Path, cli: Cli, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line and for a program: from the look at names to what is published in the store."""
    adapters = [f"{made('logic', gates=None)}:0.5", f"{made('body', seed=2, gates=None)}:0.5"]
    data = write(tmp_path / "lines.jsonl", LINES * 3)
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    opened = opened_from_now_on(monkeypatch)
    done = cli("tune", *adapters, "--data", str(data), "--per", per, "--lr", "0.3", "--epochs", "3", *base)
    assert done.code == 0, done.err
    assert sorted(opened) == ["ModeHost", "Registry"]
    opened.clear()
    settings = {"base": str(zoo.base("llama")), "precision": "float32", "device": "cpu", "epochs": 3}
    lora_rt.tune(" ".join(adapters), data, per=per, learning_rate=0.3, **settings)  # type: ignore[arg-type]
    assert sorted(opened) == ["ModeHost", "Registry"]


def other_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key: value * 2 for key, value in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"), [(other_weights, "is there now"), (shutil.rmtree, "there is no folder")], ids=["new", "gone"]
)
def test_gates_are_not_published_with_other_files_than_they_were_fitted_to(
    zoo: Zoo, made: Made, tmp_path: Path, change: Callable[[Path], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two adapters one becomes another while the fit runs; neither is published."""
    folders = [made("logic", gates=None), made("body", seed=2, gates=None)]

    def fitted(fit: SceneFit, *arguments: Any) -> tuple[float, float, list[float]]:
        change(folders[0])
        return 2.0, 1.0, [1.0]

    monkeypatch.setattr(SceneFit, "fit_best_gates", fitted)
    data, out = write(tmp_path / "lines.jsonl", LINES), tmp_path / "fitted"
    given = ["tune", *(f"{folder}:0.5" for folder in folders), "--data", str(data), "--per", "scene", "--out", str(out)]
    given += ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    error = CliRunner().invoke(app, given).exception
    assert isinstance(error, TuneError)
    assert "leads to other ones now; nothing is published" in error.message
    (problem,) = error.problems
    assert problem.startswith("logic: ")
    assert says in problem
    assert f"lora-rt tune {folders[0]}:0.5 {folders[1]}:0.5 --per scene" in error.next_step
    assert not out.exists()


def test_gates_do_not_go_in_the_place_of_an_adapter_that_a_composition_was_not_tuned_for(
    zoo: Zoo, made: Made, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own is in the store, behind one that the project has under that name; this is told before the fit."""
    monkeypatch.chdir(tmp_path)
    with Store().staging() as staged:
        shutil.copytree(made("logic", gates=None), staged, dirs_exist_ok=True)
        first = Store().publish(staged, "logic", source="trained here", revision=None)
    term = NamedTerm(reference="logic", sha256=first.sha256, weight=0.5)
    mix = NamedComposition(name="mine", base=zoo.base("llama").name, terms=(term,), data_sha256="0" * 64, seed=0)
    Registry().compositions.save(mix)
    made("other", seed=2, gates=None)
    (tmp_path / "lora-rt.toml").write_text('[adapters]\nlogic = "./other"\n')
    monkeypatch.setattr(SceneFit, "fit_classifier", lambda *_: pytest.fail("it was fitted"))
    data = write(tmp_path / "lines.jsonl", LINES)
    given = ["--data", str(data), "--per", "scene", "--base", str(zoo.base("llama")), "--precision", "float32"]
    done = cli("tune", "mine", *given, "--device", "cpu")
    assert done.code == 1
    assert f"and {first.sha256[:12]} was loaded" in done.err
    assert "lora-rt tune logic:0.5 --per scene" in done.err


def test_weights_that_can_not_be_saved_are_told(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_compositions: NamedCompositions, _composition: NamedComposition) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(NamedCompositions, "save", full)
    data = write(tmp_path / "lines.jsonl", LINES * 3)
    given = ["tune", str(zoo.adapter("llama", seed=1)), "--data", str(data), "--name", "mine"]
    given += ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    error = CliRunner().invoke(app, given).exception
    assert isinstance(error, LoraRtError)
    assert "the weights are found, but not saved" in error.message
    (line,) = error.problems
    assert NamedComposition.model_validate_json(line).name == "mine"


def test_gates_that_can_not_be_saved_lie_aside_and_work_from_there_once_they_are_moved(
    zoo: Zoo, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the home there is no room while the fit is saved."""
    write_bytes, store = durable.write_bytes, Registry().compositions.folder

    def full(path: Path, content: bytes) -> None:
        if path.is_relative_to(home.home()):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_bytes(path, content)

    data = write(tmp_path / "lines.jsonl", LINES * 3)
    given = ["tune", f"{zoo.adapter('llama', seed=1)}:0.5", "--data", str(data), "--name", "mine", "--per", "scene"]
    given += ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu", "--epochs", "5"]
    with monkeypatch.context() as patched:
        patched.setattr(durable, "write_bytes", full)
        error = CliRunner().invoke(app, given).exception
    assert isinstance(error, LoraRtError)
    assert "the gates are found, but not saved" in error.message
    folder = Path(error.next_step.partition("copy the files in ")[2].partition(" to ")[0])
    assert not list(store.glob("mine.*"))
    assert not folder.is_relative_to(home.home())
    store.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        shutil.move(path, store / path.name)
    folder.rmdir()
    found = Registry().compositions.get("mine")
    assert found is not None
    assert Registry().compositions.state(found)


def test_a_folder_for_what_is_no_adapter_and_an_empty_name_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    data = write(tmp_path / "lines.jsonl", LINES * 3)
    given = ["tune", str(zoo.adapter("llama", seed=1)), "--data", str(data), "--base", str(zoo.base("llama"))]
    for more in (["--out", str(tmp_path / "out")], ["--name", ""]):
        assert isinstance(CliRunner().invoke(app, [*given, *more]).exception, LoraRtError)
    adapter, base = str(zoo.adapter("llama", seed=1)), str(zoo.base("llama"))
    with pytest.raises(LoraRtError) as caught:
        lora_rt.tune(adapter, data, base=base, precision="float32", out=tmp_path / "out")
    assert "--out" in str(caught.value.problems)
    with pytest.raises(LoraRtError, match="''"):
        lora_rt.tune(adapter, data, base=base, precision="float32", name="")
    assert not Registry().compositions.own_names()


def test_it_is_said_which_composition_will_be_replaced(zoo: Zoo, tmp_path: Path) -> None:
    data = write(tmp_path / "lines.jsonl", LINES * 3)
    given = ["tune", f"{zoo.adapter('llama', seed=1)}:0.5", "--data", str(data), "--base", str(zoo.base("llama"))]
    given += ["--name", "mine", "--precision", "float32", "--device", "cpu", "--epochs", "5"]
    said = [CliRunner().invoke(app, given).stderr for _ in range(2)]
    assert ["mine is there already, and will be replaced" in one for one in said] == [False, True]


def test_no_adapter_is_fitted_twice_into_one_folder(zoo: Zoo, made: Made, tmp_path: Path) -> None:
    out = tmp_path / "fitted"
    (out / "logic").mkdir(parents=True)
    (out / "logic" / "mine").write_text("")
    data = write(tmp_path / "lines.jsonl", LINES)
    given = ["tune", f"{made('logic', gates=None)}:0.5", "--data", str(data), "--per", "scene", "--out", str(out)]
    error = CliRunner().invoke(app, [*given, "--base", str(zoo.base("llama")), "--precision", "float32"]).exception
    assert isinstance(error, LoraRtError)
    assert "is there and not empty" in error.message
