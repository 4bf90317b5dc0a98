"""A run as a file: what it says is what the command line says, and everything wrong with it is said at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_rt.core.step.runfile import read_run, written
from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.core.training.rehearsal import Rehearsal
from lora_rt.core.training.run import train
from lora_rt.plugins.manager import load_modes
from support.cli import Cli

Make = Callable[..., TrainSettings]


def as_file(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return folder / "run.yaml"


def test_settings_that_are_written_are_read_again(settings: Make, tmp_path: Path) -> None:
    chosen = settings(
        options={"half-life": "24"}, template_variables={"think": False}, scene_types=("sea", "fog"), optimizer="adamw"
    )
    found = read_run(as_file(tmp_path, written(chosen, out=Path("x"), resume=True)))
    assert found.problems == ()
    values = dict(found.values)
    assert (values.pop("out"), values.pop("resume")) == (Path("x"), True)
    assert TrainSettings(**values) == chosen


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("epocs: 3", "no option 'epocs'; the nearest is 'epochs'"),
        ("r: true", "r: it is not a number"),
        ("r: 4.5", "r: it is not a whole number"),
        ("lr: fast", "lr: it is not a number"),
        ("mode: 3", "mode: it is not a text"),
        ("target-modules: [q_proj, 3]", "target-modules.1: it is not a text"),
        ("batch_size: 4\nbatch-size: 4", "'batch-size': it is given twice"),
        ("special-tokens: perhaps", "special-tokens: it is neither true nor false"),
        ("option: {a: [1]}", "option.a: it is not a text"),
    ],
)
def test_a_line_that_cannot_be_is_named_as_it_was_written(tmp_path: Path, line: str, named: str) -> None:
    found = read_run(as_file(tmp_path, f"dropout: 0.5\n{line}\n"))
    assert [named in problem for problem in found.problems] == [True]
    assert found.values["dropout"] == 0.5


@pytest.mark.parametrize(
    ("text", "named"),
    [("a: b: c", "not YAML, line 1"), ("- a", "holds a list"), ("r: 1\nr: 2", "'r' stands there twice")],
)
def test_what_is_no_file_of_options_is_refused(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        read_run(as_file(tmp_path, text))


def test_yaml_numbers_without_a_dot_and_paths_of_the_home_are_read(tmp_path: Path) -> None:
    found = read_run(as_file(tmp_path, "lr: 1e-3\ndata: ~/x.jsonl\noption: {on: true, n: 3, no: no}\nheld-out: null"))
    assert found.values == {
        "learning_rate": 1e-3,
        "data": Path.home() / "x.jsonl",
        "options": {"on": "true", "n": "3", "no": "no"},
        "held_out": None,
    }


def test_everything_wrong_in_file_and_command_line_is_told_at_once(cli: Cli, tmp_path: Path) -> None:
    file = as_file(tmp_path, "register: x\nepocs: 3\nprecision: int3\nr: 0\nbase: nowhere/at/all")
    done = cli("train", "--config", str(file), "--data", "none.jsonl", "--mode", "no-such-mode", "--dropout", "2")
    assert done.code == 2
    for word in ("epocs", "int3", "r is 0", "dropout is 2", "nowhere", "none.jsonl", "no-such-mode"):
        assert word in done.err
    assert "Traceback" not in done.err


def test_a_run_without_register_and_data_asks_for_both(cli: Cli) -> None:
    done = cli("train")
    assert done.code == 2
    assert "REGISTER is missing" in done.err
    assert "--data is missing" in done.err


@pytest.mark.slow
def test_the_command_line_wins_and_what_was_resolved_is_said(settings: Make, cli: Cli, tmp_path: Path) -> None:
    file = as_file(tmp_path, written(settings(epochs=1, r=2)))
    done = cli("train", "--config", str(file), "--r", "4", "--out", str(tmp_path / "made"))
    assert done.code == 0
    card = json.loads((tmp_path / "made" / "register.json").read_text())
    assert (card["training"]["r"], card["training"]["epochs"]) == (4, 1)
    for line in ("r: 4", "epochs: 1", "optimizer: adamw", "accumulation: 1"):
        assert f"\n{line}" in done.err


@pytest.mark.slow
def test_a_dry_run_tells_what_a_run_would_be_and_writes_nothing(settings: Make, cli: Cli, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    chosen = settings()
    file = as_file(tmp_path, written(chosen))
    done = cli("train", "--config", str(file), "--dry-run", "--out", str(tmp_path / "made"))
    assert done.code == 0
    assert "22 to train on, 2 held out" in done.out
    assert "12 of 4 sequences, 2 passes" in done.out
    for word in ("tokens", "memory", "(planned)", "(measured)", "nothing was written"):
        assert word in done.out
    new = {path.name for path in set(tmp_path.rglob("*")) - before}
    assert "made" not in new
    assert not [name for name in new if name.startswith(("checkpoint", "adapter", "letters"))]


def test_a_dry_run_of_several_processes_tells_the_memory_of_each_and_of_all() -> None:
    sizes = {"base": 2**30, "program": 2**29, "needed": 2**29, "free": 2**33, "tokens": 1, "labels": 1, "longest": 1}
    counts = {"examples": 1, "held_out": 1, "epochs": 1.0, "steps": 1, "batch_size": 2}
    found = Rehearsal(**sizes, **counts, processes=2, seconds_per_step=1.0, seconds=1.0)
    memory = dict(found.lines())["memory"]
    assert memory.startswith("2 GiB in each of 2 processes at most, 4 in all (planned)")
    assert "1 GiB of the base and 0.5 of the program" in memory


@pytest.mark.slow
def test_the_card_alone_repeats_the_run_byte_by_byte(settings: Make, cli: Cli, tmp_path: Path) -> None:
    chosen = replace(settings(epochs=1, seed=3, dropout=0.1), scene_types=("sea",), licence="MIT")
    train(chosen, load_modes(), tmp_path / "a")
    done = cli("train", "--config", str(tmp_path / "a" / "register.json"), "--out", str(tmp_path / "b"))
    assert done.code == 0
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert one == two
    assert {"adapter_model.safetensors", "register.json", "loss.png"} <= set(one)
