"""`lora-rt bridge`: where items come from, and what is printed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lora_rt.core.cli.app import app
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import UsageError
from lora_rt.plugins.modes.bridge.items import ItemsError, read_items
from lora_rt.registry.bases import BaseIdentity
from support.pairs import DOCUMENT, PAIRS, write_lines
from support.tiny import Zoo

pytestmark = pytest.mark.slow

Run = Callable[..., Result]


@pytest.fixture
def run(learned: tuple[Runtime, Path], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a bridge command with the learned adapter, over the runtime that is loaded already."""
    runtime, folder = learned
    monkeypatch.setattr(Runtime, "load", lambda *args, **settings: runtime)
    identity = BaseIdentity(runtime.base.id, runtime.base.revision, runtime.base.digest)
    monkeypatch.setattr("lora_rt.core.cli.look_up.identify_base", lambda text: identity)

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        options = () if {"eval", "measure"} & set(arguments) else ("--adapter", str(folder))
        return CliRunner().invoke(app, [*arguments, *options], input=stdin, catch_exceptions=False)

    return invoke


def test_arguments_give_one_line_each(run: Run) -> None:
    assert run("bridge", "compress", "aaaa", "hhhh").stdout == "a\nh\n"
    assert run("bridge", "expand", "c").stdout == "cccc\n"


def test_an_adapter_that_is_no_bridge_is_said_to_be_none(run: Run, zoo: Zoo) -> None:
    assert "not trained as a bridge" not in run("bridge", "compress", "aaaa").stderr
    other = ["bridge", "compress", "aaaa", "--adapter", str(zoo.adapter("llama", seed=1))]
    done = CliRunner().invoke(app, other, catch_exceptions=False)
    assert done.exit_code == 0
    assert "was not trained as a bridge (its mode: output-only)" in done.stderr


def test_standard_input_gives_one_item_a_line_and_can_be_piped_on(run: Run) -> None:
    texts = run("bridge", "expand", stdin="a\n\nb\n").stdout
    assert run("bridge", "compress", stdin=texts).stdout == "a\nb\n"


def test_json_lines_are_read_from_standard_input_and_from_a_file(run: Run, tmp_path: Path) -> None:
    lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS[:2])
    assert run("bridge", "compress", stdin=lines).stdout == "a\nb\n"
    file = write_lines(tmp_path / "pairs.jsonl", PAIRS[:2])
    assert run("bridge", "expand", "--data", str(file)).stdout == "aaaa\nbbbb\n"


def test_json_is_one_document(run: Run) -> None:
    assert json.loads(run("bridge", "compress", "aaaa", "--json").stdout) == [{"text": "aaaa", "scene": "a"}]
    found = json.loads(run("bridge", "roundtrip", "b", "--candidates", "2", "--json").stdout)
    assert found == [{"scene": "b", "text": "bbbb", "back": "b"}]
    found = json.loads(run("bridge", "roundtrip", "bbbb", "--from", "text", "--json").stdout)
    assert found == [{"text": "bbbb", "scene": "b", "back": "bbbb"}]


def test_the_documents_own_pair_goes_through(run: Run) -> None:
    (row,) = json.loads(run("bridge", "compress", DOCUMENT["text"], "--json").stdout)
    assert row["text"] == DOCUMENT["text"]
    (row,) = json.loads(run("bridge", "roundtrip", DOCUMENT["scene"], "--json").stdout)
    assert row["scene"] == DOCUMENT["scene"]


def test_a_cycle_writes_lines_to_train_on(run: Run, tmp_path: Path) -> None:
    scenes, out = write_lines(tmp_path / "scenes.jsonl", [{"scene": "e"}]), tmp_path / "cycle.jsonl"
    assert run("bridge", "cycle", "--scenes", str(scenes), "--out", str(out)).exit_code == 0
    assert json.loads(out.read_text()) == {"scene": "e", "text": "eeee", "direction": "compress"}


@pytest.mark.parametrize("words", [["bridge", "measure"], ["bridge", "eval"], ["eval", "--bridge"]], ids=" ".join)
def test_bridges_are_measured_and_one_document_is_printed(
    run: Run, learned: tuple[Runtime, Path], tmp_path: Path, words: list[str]
) -> None:
    file = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    done = run(*words, str(learned[1]), "--data", f"pairs={file}", "--json")
    old = words[0] == "eval"
    assert ("lora-rt bridge measure" in done.stderr) == old, "the old spelling points to the new one"
    found = json.loads(done.stdout)
    assert found["examples"] == {"pairs": 8}
    assert found["bridge"]["pairs"][str(learned[1])]["compress"]["f1"]["mean"] == 1.0


def test_a_pair_that_is_too_long_is_named_by_its_line_before_any_is_read(
    run: Run, learned: tuple[Runtime, Path], tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    write_lines(file, [PAIRS[0], {"scene": "b", "text": "b" * 2000}])
    file.write_text("\n" + file.read_text())
    with pytest.raises(LoraRtError, match=r"pairs\.jsonl has 1 problem") as caught:
        run("bridge", "measure", str(learned[1]), "--data", str(file))
    assert re.fullmatch(r"line 3: 2\d{3} tokens, and the base reads 1024", caught.value.problems[0])


class Terminal(StringIO):
    """Standard input that is a person."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        (Terminal(), "there is no text"),
        (StringIO("\n \n"), "there is no text"),
        (StringIO('fine\n{"scene": "a"}\n{"text": 3}\n{\n'), 'line 2 is not a JSON object with a "text"'),
    ],
)
def test_items_that_are_missing_or_bad_are_named(stdin: StringIO, said: str) -> None:
    with pytest.raises((ItemsError, UsageError)) as caught:
        read_items([], None, "text", stdin)
    assert said in str(caught.value)


def test_every_bad_line_is_named() -> None:
    with pytest.raises(ItemsError) as caught:
        read_items([], None, "text", StringIO('{"a": 1}\nfine\n{"text": ""}\n'))
    assert [problem[:6] for problem in caught.value.problems] == ["line 1", "line 3"]


def test_arguments_and_a_file_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both arguments and --data"):
        read_items(["a"], tmp_path / "pairs.jsonl", "text")


def test_a_command_takes_what_compose_takes_of_base_and_sampling(run: Run) -> None:
    """What differs by seed was sampled; what a template does not have was asked for."""
    hot = ["--temperature", "30", "--top-p", "1", "--repetition-penalty", "1.2", "--top-k", "0"]
    said = {run("bridge", "expand", "c", *hot, "--seed", str(seed)).stdout for seed in range(4)}
    assert len(said) > 1
    assert run("bridge", "compress", "aaaa", "--max-new-tokens", "1", "--allow-base-mismatch").stdout == "a\n"
    for command in ("compress", "expand", "roundtrip", "cycle"):
        shown = CliRunner().invoke(app, ["bridge", command, "--help"], env={"COLUMNS": "200"}).stdout
        for option in ("--template-var", "--special-tokens", "--allow-base-mismatch", "--temperature", "--top-p"):
            assert option in shown
    assert "--template-var" in CliRunner().invoke(app, ["bridge", "measure", "--help"]).stdout
    with pytest.raises(UsageError, match="template variable"):
        run("bridge", "compress", "aaaa", "--template-var", "thinking")
