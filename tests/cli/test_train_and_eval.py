"""`lora-rt train` and `lora-rt eval`, as a user chains them: train, compose, evaluate."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from support.cli import Cli
from support.tiny import Zoo

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [json.dumps({"scene": f"scene {number}", "text": "abcabc"}) for number in range(16)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def tiny(zoo: Zoo) -> list[str]:
    return ["--base", str(zoo.base("llama")), "--precision", "float32"]


RUN = ["--r", "4", "--alpha", "8", "--lr", "0.02", "--epochs", "2", "--batch-size", "4"]


def test_what_is_trained_is_listed_composed_and_measured_under_its_name(cli: Cli, data: Path, tiny: list[str]) -> None:
    trained = cli("train", "letters", "--mode", "output-only", "--data", str(data), *RUN, *tiny)
    assert trained.code == 0
    assert "held-out loss" in trained.out
    (listed,) = [item for item in json.loads(cli("list", "--json").out) if item["name"] == "letters"]
    assert (listed["register"], listed["mode"], listed["source"]) == ("letters", "output-only", "trained here")
    assert cli("compose", "letters", "-p", "scene 1", "--max-new-tokens", "4", *tiny).code == 0
    document = json.loads(cli("eval", "letters", "letters:0.5", "--data", f"mine={data}", "--json", *tiny).out)
    nll = document["nll"]["mine"]
    assert nll["letters"] < nll["letters:0.5"] < nll["base"]
    assert document["examples"] == {"mine": 16}


def test_what_goes_with_an_adapter_that_is_replaced_or_removed_is_said(cli: Cli, data: Path, tiny: list[str]) -> None:
    once = ["--data", str(data), *RUN, *tiny]
    assert "replaced" not in cli("train", "letters", *once).err
    assert "letters is in the store already, and will be replaced\n" in cli("train", "letters", *once).err
    tuned = cli(
        "tune", "letters:0.2", "--data", str(data), "--name", "mixed", "--lr", "0.1", "--batch-size", "4", *tiny
    )
    assert tuned.code == 0, tuned.err
    replaced = cli("train", "letters", *once, "--seed", "1").err
    assert "replaced; compositions that were tuned with it have to be tuned anew: mixed" in replaced
    refused = cli("train", "mixed", *once)
    assert refused.code == 1
    assert "'mixed' is a composition (tuned here), which would be used in place of an adapter" in refused.err
    assert "lora-rt rm mixed" in refused.err
    removed = cli("rm", "letters", "-y")
    assert removed.code == 0
    assert "mixed is a composition of letters, and can't be used without it" in removed.err


@pytest.mark.parametrize("option", ["--data", "--held-out"])
def test_one_source_is_read_and_a_second_is_not_dropped(cli: Cli, data: Path, option: str) -> None:
    both = ["--data", str(data), option, str(data), option, str(data)]
    done = cli("train", "letters", *both)
    assert done.code == 2
    assert f"{option} is given {both.count(option)} times" in done.err
    done = (
        cli("train", "letters", "--data", str(data), option, "")
        if option != "--data"
        else cli("train", "x", option, "")
    )
    assert done.code == 2
    assert f"{option} is empty" in done.err


def test_out_puts_the_adapter_into_a_folder_and_not_into_the_store(
    cli: Cli, data: Path, tiny: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "made" / "letters"
    assert (
        cli("train", "letters", "--mode", "output-only", "--data", str(data), "--out", str(out), *RUN, *tiny).code == 0
    )
    assert {file.name for file in out.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "register.json",
    }
    assert "letters" not in [item["name"] for item in json.loads(cli("list", "--json").out)]
    again = cli("train", "letters", "--mode", "output-only", "--data", str(data), "--out", str(out), *RUN, *tiny)
    assert again.code == 1
    assert "not empty" in again.err


def test_bad_data_is_named_line_by_line_before_anything_is_trained(cli: Cli, tiny: list[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"scene": "a"}\n{\n{"scene": "a", "text": "b"}\n')
    done = cli("train", "x", "--mode", "output-only", "--data", str(bad), *tiny)
    assert done.code == 1
    assert 'line 1: "text" is missing' in done.err
    assert "line 2: not JSON" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--mode", "no-such-mode"], 2, "no-such-mode"),
        (["--target-modules", "q_porj"], 1, "the nearest is 'q_proj'"),
        (["--option", "x"], 2, "KEY=VALUE"),
        (["--r", "0"], 2, "r is 0"),
        (["--resume"], 1, "no checkpoint"),
    ],
)
def test_a_run_that_cannot_be_is_explained(
    cli: Cli, data: Path, tiny: list[str], arguments: list[str], code: int, named: str
) -> None:
    done = cli("train", "x", "--data", str(data), *arguments, *tiny)
    assert done.code == code
    assert named in done.err


def test_a_register_that_is_no_name_is_refused_before_the_base_is_loaded(cli: Cli, data: Path) -> None:
    done = cli("train", "../x", "--mode", "output-only", "--data", str(data))
    assert done.code == 2
    assert "is not a name" in done.err


@pytest.mark.parametrize(
    ("item", "code", "named"),
    [("emotion", 2, "NAME=FILE"), ("emotion=", 2, "NAME=FILE"), ("a=none.jsonl", 1, "can't be read")],
)
def test_eval_explains_data_that_it_cannot_read(
    cli: Cli, zoo: Zoo, tiny: list[str], item: str, code: int, named: str
) -> None:
    done = cli("eval", str(zoo.adapter("llama")), "--data", item, *tiny)
    assert done.code == code
    assert named in done.err


def test_two_data_sets_of_one_name_are_refused(cli: Cli, zoo: Zoo, data: Path, tiny: list[str]) -> None:
    done = cli("eval", str(zoo.adapter("llama")), "--data", f"mine={data}", "--data", f"mine={data}", *tiny)
    assert done.code == 2
    assert "--data names 'mine' more than once" in done.err


def test_eval_draws_its_matrix(cli: Cli, zoo: Zoo, data: Path, tiny: list[str], tmp_path: Path) -> None:
    done = cli("eval", str(zoo.adapter("llama")), "--data", f"mine={data}", "--plot", str(tmp_path / "m.png"), *tiny)
    assert done.code == 0
    assert "mine" in done.out
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_a_sweep_draws_the_curve_of_a_knob(cli: Cli, zoo: Zoo, data: Path, tiny: list[str], tmp_path: Path) -> None:
    pair = [zoo.adapter("llama", seed=seed) for seed in (1, 2)]
    given = ["--sweep", f"{pair[0]}:{pair[1]}", "--data", f"mine={data}", *tiny]
    nll = json.loads(cli("eval", *given, "--json").out)["nll"]["mine"]
    ends = json.loads(cli("eval", f"{pair[0]}", f"{pair[1]}", "--data", f"mine={data}", "--json", *tiny).out)["nll"]
    assert len(nll) == 6  # the base, and w = 0, 0.25, 0.5, 0.75, 1
    assert nll[f"{pair[0]}:1 {pair[1]}:0"] == pytest.approx(ends["mine"][str(pair[0])], abs=1e-4)
    assert nll[f"{pair[0]}:0 {pair[1]}:1"] == pytest.approx(ends["mine"][str(pair[1])], abs=1e-4)
    shown = cli("eval", *given, "--plot", str(tmp_path / "k.png"))
    swept = {spec: loss for spec, loss in nll.items() if spec != "base"}
    best = min(swept, key=lambda spec: swept[spec])
    assert f"best at {best.split(' ')[0].rpartition(':')[2]}: {swept[best]:.2f}" in shown.out
    assert (tmp_path / "k.png").stat().st_size > 1000


def test_eval_normalizes_every_composition_but_those_within_the_sum(
    cli: Cli, zoo: Zoo, data: Path, tiny: list[str]
) -> None:
    a, b = (str(zoo.adapter("llama", seed=seed)) for seed in (1, 2))
    measured = ["--data", f"mine={data}", "--json", *tiny]
    done = cli("eval", f"{a}:1.5 {b}:0.5", f"{a}:0.5", "--normalize", "1", *measured)
    assert "normalized: the weights added up to 2, each was multiplied by 0.5" in done.err
    plain = cli("eval", f"{a}:0.75 {b}:0.25", f"{a}:0.5", *measured)
    assert json.loads(done.out)["nll"] == json.loads(plain.out)["nll"]


@pytest.mark.parametrize("given", [["--sweep", "emotion"], ["--sweep", "a:a"], ["--sweep", "a:b:c"], []])
def test_what_is_no_knob_is_a_usage_error(cli: Cli, data: Path, given: list[str]) -> None:
    done = cli("eval", *given, "--data", f"mine={data}")
    assert done.code == 2
    assert "--sweep emotion:logic" in done.err


def test_a_knob_whose_weights_would_be_changed_is_a_usage_error(cli: Cli, data: Path) -> None:
    done = cli("eval", "--sweep", "a:b", "--normalize", "0.5", "--data", f"mine={data}")
    assert done.code == 2
    assert "--normalize 0.5 would change them" in done.err


@pytest.mark.parametrize("command", [["train", "letters"], ["eval", "ADAPTER"], ["tune", "ADAPTER"]])
def test_examples_that_are_too_long_are_named_by_their_lines(
    cli: Cli, zoo: Zoo, tiny: list[str], tmp_path: Path, command: list[str]
) -> None:
    file = tmp_path / "long.jsonl"
    short, long = ({"scene": "ab", "text": text} for text in ("cd", "cd" * 500))
    file.write_text("\n\n".join(json.dumps(line) for line in [short, short, long, short, long]))  # every other is blank
    given = [str(zoo.adapter("llama")) if word == "ADAPTER" else word for word in command]
    done = cli(*given, "--data", f"mine={file}" if command[0] == "eval" else str(file), *tiny)
    assert done.code == 1
    assert "2 problems" in done.err
    assert re.findall(r"line \d+", done.err) == ["line 5", "line 9"]
