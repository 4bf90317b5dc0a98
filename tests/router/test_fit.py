"""A router learns by gradient from the tokens themselves, starts at the static mix, and is kept as a composition."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lora_rt.core.cli.app import app
from lora_rt.core.requests.composition import Composition
from lora_rt.core.tuning import shares
from lora_rt.core.tuning.data import Item
from lora_rt.core.tuning.mixes import MixFit
from lora_rt.core.tuning.session import Job, open_job
from lora_rt.core.tuning.settings import MixSettings, TuneError, settings_for
from lora_rt.errors import LoraRtError
from lora_rt.plugins.modes.router import gates
from lora_rt.registry.registry import Registry
from support.tiny import Zoo

pytestmark = pytest.mark.slow


def spec(zoo: Zoo, *weights: float) -> str:
    paths = [zoo.adapter("llama", seed=seed, r=8) for seed in range(1, 1 + len(weights))]
    return " ".join(f"{path}:{weight}" for path, weight in zip(paths, weights, strict=True))


def opened(zoo: Zoo, text: str) -> tuple[Any, dict[str, float]]:
    job = Job(Composition.parse(text), Path("none"), str(zoo.base("llama")), "float32", "cpu")
    frozen, weights, _ = open_job(job, Registry())
    return frozen, weights


def turning(zoo: Zoo) -> list[Item]:
    """Answers whose first half one adapter wrote greedily and whose second half the other did, after the token 9."""
    runtime = zoo.runtime("llama", fresh=True)
    names = [runtime.load_adapter(str(zoo.adapter("llama", seed=seed, r=8))) for seed in (1, 2)]
    items = []
    for seed in range(8):
        ids = prompt = [1, *range(20 + 7 * seed, 26 + 7 * seed)]
        for name in names:
            for _ in range(5):
                ids = [*ids, int(runtime.logits([ids], compositions=f"{name}:1.5")[0, -1].argmax())]
            ids = [*ids, 9]
        items.append(Item(prompt, ids[len(prompt) :]))
    return items


@pytest.mark.parametrize("gate", ["softmax", "independent", "top1"])
def test_it_gets_better_than_the_static_mix_and_changes_nothing_else(zoo: Zoo, gate: str) -> None:
    frozen, weights = opened(zoo, spec(zoo, 0.6, 0.6))
    digest = frozen.base.digest()
    items = turning(zoo)
    settings = MixSettings("router", {"gate": gate, "hidden-layers": "1"}, epochs=40, learning_rate=0.1, keep=0.0)
    fit = MixFit(frozen, "mine", weights, items, settings)
    first, last, losses = fit.fit(items)
    assert last < first - 0.02
    assert sum(losses[-4:]) < sum(losses[:4])
    assert frozen.base.digest() == digest
    assert fit.hidden_layers == 1


def test_a_fit_begins_at_the_static_mix_and_a_pull_keeps_it_there(zoo: Zoo) -> None:
    items = turning(zoo)
    sizes = []
    for keep in (0.0, 30.0):
        frozen, weights = opened(zoo, spec(zoo, 0.6, -0.2))
        fit = MixFit(frozen, "mine", weights, items, MixSettings("router", epochs=5, keep=keep))
        static = frozen.nll(items, [weights], {})
        assert fit.loss(items) == pytest.approx(float(static[0]) / static[1], abs=1e-4)
        fit.fit(items)
        with torch.no_grad():
            sizes.append(float(fit._gates(items)[1]))
    assert sizes[1] < sizes[0] / 2


def test_a_control_learns_from_states_that_are_not_the_tokens_own_in_a_batch_of_one_row_too(zoo: Zoo) -> None:
    frozen, weights = opened(zoo, spec(zoo, 0.6, 0.6))
    items = turning(zoo)[:2]
    losses = []
    for options in ({}, {"control": "true"}):
        settings = MixSettings("router", {"hidden-layers": "1", **options}, epochs=2, batch_size=1, learning_rate=0.1)
        losses.append(MixFit(frozen, "mine", weights, items, settings).fit(items))
    assert losses[0][0] == losses[1][0]  # the start is the static mix
    assert losses[0][2] != losses[1][2]


def test_shares_are_first_fitted_to_what_each_adapter_says_alone(zoo: Zoo) -> None:
    frozen, weights = opened(zoo, spec(zoo, 0.75, 0.75))
    items = turning(zoo)
    fit = MixFit(frozen, "mine", weights, items, MixSettings("router", {"hidden-layers": "1"}))
    seen = shares.batches(frozen, items, weights, 1)
    names = list(weights)
    alone = torch.stack([-frozen.losses(items, [{name: 1.5}], {}) for name in names], -1)
    assert torch.allclose(torch.cat([b.chances for b in seen]).logsumexp(0), alone[alone[..., 0] != 0].logsumexp(0))
    before, losses = fit.loss(items), list[float]()
    gates = lambda batch, hidden: fit._gates(batch, hidden)[0]  # noqa: E731
    shares.fit(list(fit.state.values()), list(weights.values()), gates, seen, seen, 0.0, losses.append)
    even = -(alone[alone[..., 0] != 0].logsumexp(-1) - math.log(2)).mean()
    assert losses[0] == pytest.approx(float(even), abs=1e-4), "the start has equal shares"
    assert losses[-1] < losses[0] - 0.01
    assert fit.loss(items) < before, "and it is a better mixture, too"
    assert float(fit.state["total"].detach().abs().max()) < 0.01, "the sum of the weights is left alone"


def test_mean_and_spread_are_those_of_the_data_and_stay_as_they_are(zoo: Zoo) -> None:
    frozen, weights = opened(zoo, spec(zoo, 0.6, 0.6))
    items = turning(zoo)[:2]
    fit = MixFit(frozen, "mine", weights, items, MixSettings("router", {"hidden-layers": "1"}, epochs=2))
    hidden = torch.cat([_state(zoo, item) for item in items])
    units = hidden / hidden.norm(dim=-1, keepdim=True)
    fit.fit(items)
    assert torch.allclose(fit.state["mean"], units.mean(0), atol=1e-5)
    assert torch.allclose(fit.state["spread"], units.std(0, correction=0), atol=1e-5)


def _state(zoo: Zoo, item: Item) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(zoo.base("llama"), dtype=torch.float32).eval()
    ids = torch.tensor([[*item.prompt, *item.answer]])
    with torch.inference_mode():
        found: torch.Tensor = model(ids, output_hidden_states=True).hidden_states[1][0].clone()
    return found


@pytest.mark.parametrize(
    ("weights", "options", "told"),
    [
        ((0.5,), {}, "one adapter leaves nothing to decide"),
        ((0.5, 0.0), {}, "has the weight 0"),
        ((0.5, 0.5), {"gate": "hard"}, "gate is 'hard', not one of: softmax, independent, top1"),
        ((0.5, 0.5), {"gates": "top1"}, "near is 'gate'"),
    ],
)
def test_what_can_not_be_routed_is_told(
    zoo: Zoo, weights: tuple[float, ...], options: dict[str, str], told: str
) -> None:
    frozen, start = opened(zoo, spec(zoo, *weights))
    with pytest.raises(LoraRtError) as caught:
        MixFit(frozen, "mine", start, [Item([1, 20], [21, 2])] * 2, MixSettings("router", options))
    assert told in "; ".join([caught.value.message, *caught.value.problems])


def test_data_of_neutral_scenes_alone_is_refused_and_not_waited_for(zoo: Zoo) -> None:
    frozen, start = opened(zoo, spec(zoo, 0.5, 0.5))
    items = [Item([1, 20], [21, 2], "neutral")] * 4
    with pytest.raises(TuneError, match="the data has only neutral examples"):
        MixFit(frozen, "mine", start, items, MixSettings("router")).fit(items)


def test_a_mode_and_options_belong_to_what_is_decided_later() -> None:
    given: dict[str, Any] = {"epochs": 1, "batch_size": 1, "learning_rate": None, "seed": 0}
    with pytest.raises(TuneError) as caught:
        settings_for("layer", mode="router", **given)
    assert list(caught.value.problems) == [
        "a mode and its options belong to --per token, and to --per scene with a --name"
    ]
    assert settings_for("token", **given) == MixSettings("router", epochs=1, batch_size=1)
    assert settings_for("scene", named=True, **given) == MixSettings(
        "context", epochs=1, batch_size=1, learning_rate=0.1
    )


LINES = [{"scene": f"x{n}", "text": "abababab cdcdcdcd"} for n in range(6)]


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_a_router_resolves_like_an_adapter_and_explains_itself(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "mix.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    given = ["--data", str(data), "--per", "token", "--name", "mine", "--epochs", "8", "--lr", "0.2", *base]
    made = invoke("tune", *spec(zoo, 0.5, 0.4).split(), *given, "--option", "hidden-layers=1")
    assert made["mode"] == "router"
    assert made["metrics"]["nll_after"] < made["metrics"]["nll_before"]
    composed = invoke("compose", "mine", "-p", "x9", "--max-new-tokens", "8", "--temperature", "0", *base)
    runtime = zoo.runtime("llama", fresh=True)
    assert composed["text"] == runtime.generate("x9", "mine", max_new_tokens=8)
    assert [term["weight"] for term in composed["terms"]] == [0.5, 0.4]
    assert invoke("show", "mine")["mode"] == "router"
    (row,) = [row for row in invoke("list") if row["name"] == "mine"]
    assert row["mode"] == "router"
    picture = tmp_path / "f.png"
    told = invoke("explain", "mine", "-p", "abab", "--max-new-tokens", "6", "--png", str(picture), *base)
    weights = torch.tensor(told["weight_per_token"])
    assert weights.shape == (2, len(told["tokens"]))
    assert (weights.amax(1) - weights.amin(1)).max() > 0.01
    # A softmax in one group shares out the same sum at every token.
    assert torch.allclose(weights.sum(0), weights.sum(0)[0].expand(weights.shape[1]), atol=1e-4)
    assert picture.stat().st_size > 1000
    shown = CliRunner().invoke(app, ["explain", "mine", "-p", "abab", *base])
    assert "weight of each at each token" in shown.output
    *_, last = shown.output.strip().splitlines()  # no colour here: a line a token, its weights in figures
    assert re.fullmatch(r"\s*\d\.\d\d\s+\d\.\d\d  '.+'", last)
    told = CliRunner().invoke(app, ["compose", "mine", "-p", "ab", "--max-new-tokens", "1", *base])
    assert "mine:1  router, decides for the adapters below" in told.output
    again = CliRunner().invoke(app, ["tune", "mine", "--data", str(data), "--name", "base", *base])
    assert "'base' means the base alone" in str(again.exception)
    again = CliRunner().invoke(app, ["tune", "mine", "--data", str(data), "--name", "registers", *base])
    assert "will stand before the composition of that name" in again.output
    assert "mine is taken as the weights" in again.output
    static = CliRunner().invoke(app, ["explain", *spec(zoo, 0.5).split(), "-p", "abab", *base])
    assert "weight of each at each token" not in static.output
    assert CliRunner().invoke(app, ["rm", "mine", "-y"]).exit_code == 0
    assert not list((Registry().compositions.folder).glob("mine*"))


def test_a_router_has_no_static_equivalent_unless_it_is_asked_for(zoo: Zoo, routed: Any, tmp_path: Path) -> None:
    routed("mine")
    given = ["export", "mine", "--format", "peft", "--base", str(zoo.base("llama"))]
    result = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "a")])
    assert isinstance(result.exception, LoraRtError)
    assert "the mode 'router' of the composition 'mine' decides" in str(
        [result.exception.message, *result.exception.problems]
    )
    assert CliRunner().invoke(app, [*given, "--static", "--out", str(tmp_path / "b")]).exit_code == 0


def test_a_control_is_given_the_states_of_other_tokens_in_no_order() -> None:
    """All of the real ones, padding where it was, the same at every step over a batch and another one over others."""
    hidden = torch.arange(4 * 9.0).view(4, 9, 1)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, :3] = 0
    ids = torch.arange(4 * 9).view(4, 9)
    found = gates._of_other_tokens(hidden, ids, mask)
    assert sorted(found.flatten().tolist()) == sorted(hidden.flatten().tolist())
    assert torch.equal(found[1, :3], hidden[1, :3])
    assert int((found != hidden).sum()) > 24
    assert len({int(number) % 9 for number in found[:, 4].flatten()}) > 1, "not of one place"
    assert torch.equal(found, gates._of_other_tokens(hidden, ids, mask))
    assert not torch.equal(found, gates._of_other_tokens(hidden, ids + 1, mask))
