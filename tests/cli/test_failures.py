"""Failures of the machine are explained like any other."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lora_rt.core.cli.app import app
from lora_rt.core.cli.console import check_output
from lora_rt.errors import LoraRtError
from support.cli import Cli
from support.forks import Forks
from support.plugins import torn_package
from support.tiny import Zoo

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", [["list"], ["compose", "x", "-p", "ab"], ["doctor"]])
def test_a_home_that_is_a_file_is_no_traceback(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_RT_HOME", str(tmp_path / "file"))
    assert cli(*command).code in (0, 1)


def test_the_home_of_nobody_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_RT_HOME", "~nobodyx/home")
    done = cli("list")
    assert done.code == 1
    assert "LORA_RT_HOME is ~nobodyx/home, and this machine has no such user" in done.err


def test_a_home_that_cannot_be_written_is_named_with_what_to_do(
    cli: Cli, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_RT_HOME", str(tmp_path / "file" / "home"))
    done = cli(
        "compose", str(zoo.adapter("llama")), "-p", "ab", "--base", str(zoo.base("llama")), "--precision", "int4"
    )
    assert done.code == 1
    assert "Set LORA_RT_HOME to a folder that you can write" in done.err
    assert done.err.strip().count("\n") == 0


def test_doctor_says_that_a_home_which_is_a_file_is_broken(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_RT_HOME", str(tmp_path / "file"))
    checks = {check["name"]: check for check in json.loads(cli("doctor", "--json").out)}
    assert checks["home"]["status"] == "broken"


def test_a_piped_prompt_is_the_prompt_that_was_typed(cli: Cli, zoo: Zoo) -> None:
    tiny = [
        "--base",
        str(zoo.base("llama")),
        "--precision",
        "float32",
        "--max-new-tokens",
        "4",
        "--json",
        "--seed",
        "1",
    ]
    piped = json.loads(cli("compose", str(zoo.adapter("llama")), *tiny, stdin="spare key\n").out)
    typed = json.loads(cli("compose", str(zoo.adapter("llama")), "-p", "spare key", *tiny).out)
    assert (piped["prompt"], piped["text"]) == (typed["prompt"], typed["text"])


def test_one_torn_package_hides_no_adapter_and_doctor_names_it(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn_package(tmp_path, monkeypatch)
    assert "logic" in [row["name"] for row in json.loads(cli("list", "--json").out)]
    assert cli("verify", "logic", "--offline").code == 0
    checks = {check["name"]: check for check in json.loads(cli("doctor", "--json").out)}
    found = checks["package torn-mode"]
    assert (found["status"], found["todo"]) == ("broken", "python -m pip uninstall torn-mode")
    assert str(tmp_path / "site") in found["detail"]
    assert "shipped logic" in checks


def test_a_library_that_fails_because_of_a_torn_package_is_not_blamed(
    cli: Cli, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.metadata import entry_points

    from lora_rt.core.base.source import BaseError

    def load(*_: object) -> None:
        try:
            entry_points(group="a.library")
        except Exception as error:
            raise BaseError("the base can't be loaded") from error

    torn_package(tmp_path, monkeypatch)
    monkeypatch.setattr("lora_rt.core.runtime.load_base", load)
    done = cli("compose", str(zoo.adapter("llama")), "-p", "ab", "--base", str(zoo.base("llama")))
    assert done.code == 1
    assert f"the entry_points.txt of torn-mode in {tmp_path / 'site'} is damaged" in done.err
    assert done.err.strip().count("\n") == 0


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "nobody", "-p", "x"],
        ["scene", "x", "--adapter", "nobody"],
        ["eval", "nobody", "--data", "x=none.jsonl"],
        ["tune", "nobody", "--data", "none.jsonl"],
        ["bridge", "expand", "x", "--adapter", "nobody"],
    ],
)
def test_a_wrong_name_is_found_before_a_base_is_loaded(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("lora_rt.core.runtime.load_base", load)
    monkeypatch.setattr("lora_rt.core.tuning.session.load_base", load)
    done = cli(*command)
    assert done.code == 1
    assert "there is no adapter 'nobody'" in done.err


def test_a_closed_standard_output_is_no_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        done = cli("list", "--json")
        assert sys.stdout is not None
        sys.stdout.close()
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (["compose", "emotion"], 2, "the prompt is empty"),
        (["rm", "nobody"], 1, "has no adapter 'nobody'"),
        (["bridge", "compress"], 2, "there is no text"),
    ],
)
def test_a_closed_standard_input_is_an_empty_one(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, typed: list[str], code: int, said: str
) -> None:
    monkeypatch.setattr("support.cli.Piped", lambda _text: None)
    done = cli(*typed)
    assert (done.code, said in done.err) == (code, True), done.err
    sys.stdin.close()


def test_bytes_on_standard_input_that_are_no_text_are_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    read = io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8")
    monkeypatch.setattr("support.cli.Piped", lambda _text: read)
    done = cli("compose", "emotion")
    assert (done.code, "the prompt is not Unicode text: character 2" in done.err) == (2, True), done.err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("how", ["--json", "--compare"])
def test_what_the_encoding_of_standard_output_lacks_is_spelled(
    cli: Cli, zoo: Zoo, monkeypatch: pytest.MonkeyPatch, encoding: str, how: str
) -> None:
    command = ["compose", str(zoo.adapter("llama")), "-p", "日é", "--base", str(zoo.base("llama")), how]
    command += ["--precision", "float32", "--max-new-tokens", "2", "--seed", "1"]
    plain = cli(*command).out
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    done = cli(*command)
    sys.stdout.flush()
    told = printed.getvalue().decode(encoding)
    assert done.code == 0, done.err
    if how == "--json":
        assert {**json.loads(told), "seconds": 0} == {**json.loads(plain), "seconds": 0}
    else:
        assert told.startswith("prompt \\u65e5")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("compos emotion", "there is no command 'compos'; did you mean 'compose'? See: lora-rt --help"),
        ("brigde compress x", "there is no command 'brigde'; did you mean 'bridge'? See: lora-rt --help"),
        ("bridge comprss x", "there is no command 'comprss'; did you mean 'compress'? See: lora-rt bridge --help"),
        ("nothing-like-it", "there is no command 'nothing-like-it'. See: lora-rt --help"),
        ("list --jsn", "there is no option --jsn; did you mean --json? See: lora-rt list --help"),
        ("compose", "SPEC is missing. See: lora-rt compose --help"),
        ("train x", "--data is missing. See: lora-rt train --help"),
        ("list x", "this command does not take x. See: lora-rt list --help"),
        ("compose emotion -p", "option '-p' needs a value. See: lora-rt compose --help"),
        ("compose emotion -p x --seed no", "--seed: 'no' is not a whole number. See: lora-rt compose --help"),
        ("compose emotion -p x --seed -1", "--seed: '-1' must be at least 0. See: lora-rt compose --help"),
        ("compose emotion -p x --temperature hot", "--temperature: 'hot' is not a number. See: lora-rt compose --help"),
        ("compose --compare=3 x", "option '--compare' takes no value. See: lora-rt compose --help"),
        (
            "export x -o y --format z",
            "--format: 'z' is not one of 'peft', 'gguf', 'merged'. See: lora-rt export --help",
        ),
    ],
)
def test_a_command_line_that_cannot_be_read_gets_one_plain_line(cli: Cli, typed: str, said: str) -> None:
    done = cli(*typed.split())
    assert (done.code, done.out, done.err) == (2, "", f"error: {said}\n")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["verify", "emotoin", "--offline"], "there is no adapter 'emotoin'; did you mean 'emotion'?"),
        (["rm", "emotoin"], "the store has no adapter 'emotoin'; did you mean 'emotion'?"),
        (
            ["compose", "emotion", "0.7", "-p", "x"],
            "'0.7'; a weight stands behind a name and a colon, as in emotion:0.7",
        ),
        (["compose", "emotoin", "lojic", "-p", "x"], "did you mean 'emotion'? See: lora-rt list"),
    ],
)
def test_what_is_nearly_right_is_answered_with_what_is_right(cli: Cli, typed: list[str], said: str) -> None:
    done = cli(*typed)
    assert done.code == 1
    assert said in done.err


def test_no_command_at_all_shows_the_help(cli: Cli) -> None:
    done = cli()
    assert (done.code, done.err) == (2, "")
    assert "compose" in done.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("kind", [["--json"], []])
def test_results_that_can_not_be_printed_are_kept_and_the_error_says_where(
    kind: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: Forks
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = ["bench", "--random-base", "tiny", "--precision", "float32", "--device", "cpu", "--repeats", "1"]
    done = warm([*command, "--workloads", "quick-row1", "--systems", "base,ours", *kind], out=Path("/dev/full"))
    assert (done.code, "the results can't be printed: No space left on device" in done.err) == (1, True)
    (kept,) = tmp_path.glob("lora-rt-*.json")
    assert f"They are kept in {kept}" in done.err
    assert json.loads(kept.read_text())["rows"]


def test_a_full_disk_is_told_before_the_results_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr(os, "fstatvfs", lambda _output: room)
    with (tmp_path / "results.json").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with pytest.raises(LoraRtError, match="the disk is full"):
            check_output()
        room.f_bavail = 1000
        check_output()


def test_with_json_what_anyone_else_prints_is_not_on_standard_output() -> None:
    """Libraries in C and hooks of plugins too; the document is, where standard output led."""
    program = (
        "import os\n"
        "from lora_rt.core.cli.console import print_json, printing_aside\n"
        "with printing_aside():\n"
        "    print('from a hook')\n"
        "    os.write(1, b'from C\\n')\n"
        "    print_json(['a document'])\n"
        "print('afterwards')\n"
        "with printing_aside():\n"
        "    print('of a command that fails')\n"
        "os.write(1, b'the end\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == '[\n  "a document"\n]\nafterwards\nthe end\n'
    assert sorted(done.stderr.splitlines()) == ["from C", "from a hook", "of a command that fails"]


def test_a_file_that_ends_too_early_is_not_taken_for_a_ctrl_d(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(_registry: object) -> list[object]:
        raise EOFError("marshal data too short")

    monkeypatch.setattr("lora_rt.core.cli.list.everything_named", cut_off)
    error = CliRunner().invoke(app, ["list"]).exception
    assert isinstance(error, LoraRtError)
    assert error.message == "a file ends too early: marshal data too short"
