"""What can be said without torch is said before it is imported: a newcomer's mistake is answered at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.cli import Cli
from support.forks import Forks
from support.tiny import Zoo

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten good lines."""
    file = tmp_path / "good.jsonl"
    file.write_text('{"scene": "a", "text": "b"}\n' * 10)
    return file


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["train", "x", "--data", "BAD"], 1, "line 2: not JSON"),
        (["train", "x", "--data", "GOOD", "--r", "-4"], 2, "r is -4"),
        (["train", "x", "--data", "GOOD", "--mode", "nonsense"], 2, "nonsense"),
        (["train", "x", "--data", "GOOD", "--precision", "int3"], 2, "int3"),
        (["train", "x", "--data", "GOOD", "--base", "./nowhere"], 1, "./nowhere"),
        (["tune", "emotion", "--data", "BAD"], 1, "line 2: not JSON"),
        (["tune", "emotion", "--data", "GOOD", "--epochs", "-1"], 2, "epochs is -1"),
        (["tune", "emotion", "--data", "GOOD", "--lr", "nan"], 2, "the learning rate is nan"),
        (["tune", "emotion", "--data", "GOOD", "--batch-size", "0"], 2, "the batch size is 0"),
        (["tune", "emotion", "--data", "GOOD", "--precision", "int3"], 2, "int3"),
        (["tune", "nobody", "--data", "GOOD"], 1, "there is no adapter 'nobody'"),
        (["tune", "emotion", "--data", "GOOD", "--name", "logic"], 1, "'logic' is the name of an adapter"),
        (["tune", "emotion", "--data", "GOOD", "--per", "scene"], 1, "scene_type"),
        (["tune", "emotion", "--data", "GOOD", "--prompts", "GOOD"], 2, "belong to --per scene"),
        (["tune", "emotion", "--data", "GOOD", "--per", "scene", "--out", "GOOD"], 1, "nothing can be written into"),
        (["eval", "nobody", "--data", "x=GOOD"], 1, "there is no adapter 'nobody'"),
        (["eval", "emotion", "--data", "x=GOOD", "--device", "tpu"], 2, "there is no device 'tpu'"),
        (["eval", "emotion", "--data", "x=GOOD", "--precision", "int3"], 2, "int3"),
        (["eval", "emotion", "--data", "x=BAD"], 1, "line 2: not JSON"),
        (["eval", "emotion", "--data", "x=GOOD", "--plot", "nowhere/m.png"], 1, "no folder nowhere"),
        (["compose", "emotion", "-p", "ab", "--base", "./nowhere"], 1, "./nowhere"),
        (["explain", "emotion:x", "-p", "ab"], 2, "'x' is not a number"),
        (["export", "nobody", "-o", "out"], 1, "there is no adapter 'nobody'"),
        (["export", "emotion", "-o", "GOOD"], 1, "is there and not empty"),
        (["export", "emotion", "-o", "GOOD/below"], 1, "good.jsonl: Not a directory"),
        (["eval", "emotion", "--data", "x=GOOD", "--plot", "FOLDER"], 1, "it is a folder"),
        (["bench", "--quick", "--plot", "FOLDER"], 1, "it is a folder"),
        (["bridge", "cycle", "--texts", "GOOD", "--out", "GOOD"], 1, "is there already"),
        (["bridge", "cycle", "--texts", "GOOD", "--out", "nowhere/x.jsonl"], 1, "nowhere/x.jsonl can't be written"),
        (["bridge", "cycle", "--texts", "GOOD", "--out", "x" * 256], 1, "can't be written: File name too long"),
        (["export", "emotion", "-o", "new/" + "x" * 256], 1, "File name too long"),
        (["bridge", "cycle", "--out", "new.jsonl"], 2, "there are neither texts nor scenes"),
        (["plan", "--base", "./nowhere"], 1, "./nowhere"),
        (["plan", "--r", "-1"], 2, "r is -1"),
        (["plan", "--batch", "0"], 2, "batch is 0"),
        (["plan", "--labels", "-5"], 2, "labels is -5"),
        (["plan", "--target-modules", "nope"], 1, "no layer is called 'nope'"),
        (["plan", "--target-modules", ","], 2, "there are no target modules"),
        (["train", "x", "--data", "GOOD", "--target-modules", "nope"], 1, "no layer is called 'nope'"),
        (["train", "x", "--data", "GOOD", "--target-modules", ""], 2, "there are no target modules"),
        (["train", "x", "--data", "GOOD", "--device", "cuda:97"], 1, "Use "),
        (["compose", "emotion", "-p", "ab", "--device", "cuda:97"], 1, "Use "),
        (["bench", "--device", "cuda:97"], 1, "Use "),
        (["bench", "--systems", "nonsense"], 2, "nonsense"),
    ],
)
def test_a_mistake_is_answered_before_torch_is_imported(
    arguments: list[str], code: int, named: str, data: Path, tmp_path: Path, light: Forks
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"scene": "a", "text": "b"}\n{\n')
    folder = tmp_path / "folder.png"
    folder.mkdir()
    places = {"BAD": bad, "GOOD": data, "FOLDER": folder}
    given = [re.sub("BAD|GOOD|FOLDER", lambda found: str(places[found[0]]), word) for word in arguments]
    done = light(given)
    assert (done.code, done.heavy) == (code, set()), done.err
    assert named in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "emotion", "--data", "x=GOOD", "--plot", "m.png"],
        ["explain", "emotion", "-p", "ab", "--png", "m.png"],
        ["bench", "--quick", "--plot", "m.png"],
    ],
)
def test_a_missing_matplotlib_is_said_before_anything_is_measured(
    arguments: list[str], data: Path, light: Forks
) -> None:
    done = light([word.replace("GOOD", str(data)) for word in arguments], without="matplotlib")
    assert (done.code, done.heavy) == (1, set()), done.err
    assert "needs matplotlib. Install it with: pip install 'lora-rt[plot]'" in done.err


def test_an_adapter_for_another_base_is_refused_before_torch_is_imported(zoo: Zoo, light: Forks) -> None:
    base = str(zoo.base("llama", changes={"hidden_size": 32, "head_dim": 8}))
    done = light(["compose", "emotion", "-p", "ab", "--base", base, "--precision", "float32"])
    assert (done.code, done.heavy) == (1, set()), done.err
    assert "Use --base default" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["compose", "emotion", "-p", "ab", "--base", ""],
        ["compose", "emotion", "-p", "ab", "--base", "a b"],
        ["compose", "a/b/c", "-p", "ab"],
        ["show", ""],
        ["show", "a b"],
        ["pull", ""],
        ["pull", "./folder"],
        ["pull", "mood"],
        ["pull", "org/repo", "--as", "a b"],
        ["push", "", "org/repo"],
        ["push", "emotion", "nowhere"],
        ["rm", ""],
        ["verify", "a b"],
        ["search", "--base", ""],
        ["scene", ""],
        ["scene", "ab", "--adapter", "a b"],
        ["tune", "emotion", "--data", "GOOD", "--name", "a b"],
        ["tune", "a b c/d/e", "--data", "GOOD"],
        ["export", "a/b/c", "-o", "out"],
        ["export", "emotion", "-o", "out", "--base", " "],
        ["eval", "a/b/c", "--data", "x=GOOD"],
        ["eval", "emotion", "--data", "x=GOOD", "--plot", "picture.doc"],
        ["explain", "emotion", "-p", "ab", "--png", "picture"],
        ["bench", "--quick", "--plot", "picture.doc"],
        ["bench", "--base", ""],
        ["plan", ""],
        ["train", "x", "--data", "GOOD", "--base", ""],
        ["train", "x", "--data", "GOOD", "--mode", ""],
        ["bridge", "compress", "ab", "--adapter", "a/b/c"],
        ["bridge", "compress", "ab", "--data", "GOOD"],
        ["bridge", "compress", "ab", "--base", ""],
        ["bridge", "measure", "--data", "x="],
    ],
)
def test_what_makes_no_sense_on_any_machine_is_a_usage_error(arguments: list[str], data: Path, cli: Cli) -> None:
    ended = cli(*(word.replace("GOOD", str(data)) for word in arguments))
    assert ended.code == 2, ended.err
    assert ended.err.startswith("error: ")
