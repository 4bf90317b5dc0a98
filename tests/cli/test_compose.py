"""`lora-rt compose`: one answer, JSON, side by side, a chat, and what is said to wrong things."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.cli.compose.keyboard import Keyboard
from lora_rt.core.requests.running import RowStream
from lora_rt.core.runtime import Runtime
from lora_rt.registry.store import Store
from support.cli import Cli
from support.tiny import Zoo


@pytest.fixture
def tiny(zoo: Zoo) -> list[str]:
    """Options that choose a tiny base and short answers."""
    return ["--base", str(zoo.base("llama")), "--precision", "float32", "--max-new-tokens", "8"]


@pytest.fixture
def adapters(zoo: Zoo) -> tuple[str, str]:
    return str(zoo.adapter("llama", seed=1)), str(zoo.adapter("llama", seed=2))


def test_an_answer_goes_to_standard_output_and_everything_else_to_standard_error(
    cli: Cli, tiny: list[str], adapters: tuple[str, str]
) -> None:
    done = cli("compose", f"{adapters[0]}:0.7", f"{adapters[1]}:0.3", "-p", "ab", "--seed", "1", *tiny)
    name = Path(adapters[0]).name
    assert done.code == 0
    assert done.out.strip()
    assert name not in done.out
    assert f"{name}:0.7" in done.err
    assert "seed 1" in done.err


def test_what_is_printed_is_what_the_runtime_generates(
    cli: Cli, tiny: list[str], adapters: tuple[str, str], zoo: Zoo
) -> None:
    done = cli("compose", f"{adapters[0]}:0.7", "-p", "ab", "--temperature", "0", *tiny)
    runtime = zoo.runtime("llama")
    assert done.out.rstrip("\n") == runtime.generate("ab", f"{adapters[0]}:0.7", max_new_tokens=8)


def test_a_folder_with_blanks_is_one_argument(cli: Cli, tiny: list[str], zoo: Zoo, tmp_path: Path) -> None:
    folder, other = tmp_path / "My Adapters, new" / "é (2)", zoo.adapter("llama", seed=2)
    shutil.copytree(zoo.adapter("llama", seed=1), folder)
    settings = ["-p", "ab", "--temperature", "0", *tiny]
    plain = cli("compose", f"{zoo.adapter('llama', seed=1)}:0.7", f"{other}:-0.3", *settings)
    for args in ([f"{folder}:0.7", f"{other}:-0.3"], [f'"{folder}":0.7 {other}:-0.3']):
        done = cli("compose", *args, *settings)
        assert (done.code, done.out) == (0, plain.out), done.err
    missing = cli("compose", f"{folder}x:0.7", *settings)
    assert missing.code != 0


@pytest.mark.parametrize(
    ("options", "meaning"),
    [
        (["--temperature", "0"], {}),
        (["--temperature", "0", "--repetition-penalty", "1.3"], {"repetition_penalty": 1.3}),
        (["--temperature", "2"], {"temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.1}),
        (
            ["--temperature", "2", "--top-p", "1", "--top-k", "3", "--repetition-penalty", "1"],
            {"temperature": 2.0, "top_k": 3},
        ),
    ],
    ids=["greedy", "greedy with a penalty", "sampled", "sampled otherwise"],
)
def test_the_options_of_sampling_mean_what_the_runtime_means_by_them(
    cli: Cli, tiny: list[str], adapters: tuple[str, str], zoo: Zoo, options: list[str], meaning: dict[str, Any]
) -> None:
    asked = ["compose", f"{adapters[0]}:0.7", "-p", "ab", "--json", "--seed", "3", *tiny, "--max-new-tokens", "24"]
    told = zoo.runtime("llama").generate("ab", f"{adapters[0]}:0.7", max_new_tokens=24, seed=3, **meaning)
    assert json.loads(cli(*asked, *options).out)["text"] == told


def test_a_system_message_stands_before_the_prompt(
    cli: Cli, tiny: list[str], adapters: tuple[str, str], zoo: Zoo
) -> None:
    asked = ["compose", adapters[0], "-p", "ab", "--temperature", "0", "--json", *tiny]
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ab"}]
    (told,) = zoo.runtime("llama").generate([chat], adapters[0], max_new_tokens=8)
    document = json.loads(cli(*asked, "--system", "be kind").out)
    assert (document["prompt"], document["text"]) == ("ab", told)
    assert told != json.loads(cli(*asked).out)["text"]


@pytest.mark.parametrize("command", ["compose", "explain", "scene"])
def test_a_prompt_that_is_not_unicode_is_refused_before_anything_is_loaded(cli: Cli, command: str) -> None:
    prompt = ["a\udcff"] if command == "scene" else ["emotion", "-p", "a\udcff"]
    done = cli(command, *prompt, "--base", "./nowhere")
    assert done.code == 2
    assert "character 2 is '\\udcff'" in done.err


def test_json_is_one_document_in_the_contracts_form(cli: Cli, tiny: list[str], adapters: tuple[str, str]) -> None:
    done = cli("compose", f"{adapters[0]}:0.7", "--json", "--seed", "3", *tiny, stdin="ab\n")
    document = json.loads(done.out)
    assert set(document) == {"prompt", "text", "base", "precision", "seed", "terms", "tokens", "seconds"}
    assert document["prompt"].strip() == "ab"
    assert (document["precision"], document["seed"]) == ("float32", 3)
    (term,) = document["terms"]
    assert set(term) == {"name", "weight", "mode", "source", "revision", "sha256"}
    assert (term["weight"], term["mode"], len(term["sha256"])) == (0.7, "output-only", 64)


def test_one_seed_gives_one_text(cli: Cli, tiny: list[str], adapters: tuple[str, str]) -> None:
    texts = [
        json.loads(cli("compose", adapters[0], "-p", "ab", "--json", "--seed", s, *tiny).out)["text"] for s in "112"
    ]
    assert texts[0] == texts[1] != texts[2]


def test_compare_shows_the_base_each_part_and_the_whole(
    cli: Cli, tiny: list[str], adapters: tuple[str, str], zoo: Zoo
) -> None:
    spec = f"{adapters[0]}:3 {adapters[1]}:-3"
    document = json.loads(cli("compose", spec, "-p", "ab", "--compare", "--json", "--seed", "1", *tiny).out)
    specs = [column["spec"] for column in document["columns"]]
    assert specs == ["base", f"{adapters[0]}:3", f"{adapters[1]}:-3", spec] or specs == ["base", *adapters, spec]
    settings = {"max_new_tokens": 8, "seed": 1, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    wanted = zoo.runtime("llama").generate(["ab"] * 4, [None, *specs[1:]], **settings)
    assert [column["text"] for column in document["columns"]] == wanted
    assert len(set(wanted)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int4", "float32"])
def test_compared_deterministically_an_answer_is_the_one_given_alone(
    cli: Cli, tiny: list[str], adapters: tuple[str, str], zoo: Zoo, precision: str
) -> None:
    options = [*tiny[:3], precision, *tiny[4:], "--seed", "1", "--deterministic", "--json"]
    spec = f"{adapters[0]}:3 {adapters[1]}:-3"
    columns = json.loads(cli("compose", spec, "-p", "ab", "--compare", *options).out)["columns"]
    alone = json.loads(cli("compose", spec, "-p", "ab", *options).out)
    assert columns[-1]["text"] == alone["text"]


def test_compare_draws_every_column(cli: Cli, tiny: list[str], adapters: tuple[str, str]) -> None:
    done = cli("compose", adapters[0], "-p", "ab", "--compare", *tiny)
    assert "base" in done.out
    assert done.code == 0


def test_a_text_that_an_adapter_waits_for_and_that_never_comes_is_told(
    cli: Cli, tiny: list[str], adapters: tuple[str, str]
) -> None:
    done = cli("compose", f"{adapters[0]}:0.5[qq]", "-p", "ab", "--max-new-tokens", "1", *tiny)
    assert "waits for 'qq', and acts from there on" in done.err
    assert "'qq' did not appear, so what waits for it did not act" in done.err
    done = cli("compose", f"{adapters[0]}:0.5[ab]", "-p", "ab", "--max-new-tokens", "1", *tiny)
    assert "did not appear" not in done.err


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("emotion:x", "'x' is not a number"),
        ("emotion::1", "emotion::1"),
        ("emotion:", "no weight follows the colon"),
        (":1", "there is no name before the colon"),
        ("emotion:nan", "not a finite number"),
        ("emotion:inf", "not a finite number"),
        ("emotion/logic/body", "org/repo"),
        ("emotion:0.5[]", "the bracket is empty"),
        ("emotion:0.5[So: I", "the bracket is not closed"),
        ("emotion[So:]:0.5", "the weight comes before the bracket"),
        ("./mine[So:]", "a path needs its weight before the bracket, as in ./mine:1[So:]"),
        ("[So:]", "there is no name"),
    ],
)
def test_a_spec_that_is_none_gets_one_line_and_exit_code_2(cli: Cli, spec: str, named: str) -> None:
    done = cli("compose", spec, "-p", "ab")
    assert done.code == 2
    assert named in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


@pytest.mark.parametrize(
    ("spec", "named"), [("emotoin", "there is no adapter 'emotoin'"), ("../nowhere", "../nowhere")]
)
def test_a_name_that_nothing_has_gets_one_line_and_exit_code_1(cli: Cli, spec: str, named: str) -> None:
    done = cli("compose", spec, "-p", "ab")
    assert done.code == 1
    assert named in done.err
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(
    cli: Cli, zoo: Zoo, adapters: tuple[str, str]
) -> None:
    store = Store()
    with store.staging() as folder:
        for file in Path(adapters[0]).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        store.publish(folder, "melancholy", source="a test", revision=None)
    assert "melancholy" in cli("compose", "melancoly", "-p", "ab").err


def test_every_bad_term_is_named_at_once(cli: Cli) -> None:
    err = cli("compose", "a:x", "b:y", "-p", "ab").err
    assert "'a:x'" in err
    assert "'b:y'" in err


def test_an_adapter_for_another_base_is_refused_with_both_named(cli: Cli, zoo: Zoo, tiny: list[str]) -> None:
    changes = {"hidden_size": 32, "head_dim": 8}
    other = str(zoo.adapter("llama", mode="output-only", changes=changes))
    done = cli("compose", other, "-p", "ab", *tiny)
    assert done.code == 1
    assert "is refused" in done.err
    own, used = zoo.base("llama", **changes).name, zoo.base("llama").name
    assert f"it names the base {own!r}, in use is {used!r}" in done.err


@pytest.mark.parametrize("arguments", [["-p", ""], ["-p", "  "], []])
def test_an_empty_prompt_is_refused(cli: Cli, adapters: tuple[str, str], arguments: list[str]) -> None:
    done = cli("compose", adapters[0], *arguments)
    assert done.code == 2
    assert "the prompt is empty" in done.err


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--precision", "int3", "there is no precision 'int3'"),
        ("--temperature", "-1", "temperature is -1"),
        ("--max-new-tokens", "0", "max_new_tokens is 0"),
        ("--device", "tpu", "'tpu'"),
    ],
)
def test_settings_that_cannot_be_are_usage_errors(
    cli: Cli, adapters: tuple[str, str], option: str, value: str, named: str
) -> None:
    done = cli("compose", adapters[0], "-p", "ab", option, value)
    assert done.code == 2
    assert named in done.err


def test_a_base_that_is_not_there_is_named(cli: Cli, adapters: tuple[str, str]) -> None:
    done = cli("compose", adapters[0], "-p", "ab", "--base", "./nowhere")
    assert (done.code, "there is no base model at ./nowhere" in done.err) == (1, True)


@pytest.mark.parametrize(
    ("weights", "warnings"),
    [
        ((0.7, 0.3), 0),
        ((1.25, 0), 0),
        ((1, 1), 1),
        ((-0.6, 0.3), 1),
    ],
)
def test_weights_beyond_what_was_measured_get_one_line_of_warning(
    cli: Cli, tiny: list[str], adapters: tuple[str, str], weights: tuple[float, float], warnings: int
) -> None:
    spec = [f"{adapter}:{weight}" for adapter, weight in zip(adapters, weights, strict=True)]
    assert cli("compose", *spec, "-p", "ab", *tiny).err.count("warning:") == warnings


def test_normalize_scales_the_weights_and_says_so(cli: Cli, tiny: list[str], adapters: tuple[str, str]) -> None:
    spec = [f"{adapters[0]}:3", f"{adapters[1]}:1"]
    done = cli("compose", *spec, "--normalize", "1", "-p", "ab", "--max-new-tokens", "2", "--json", *tiny)
    assert [term["weight"] for term in json.loads(done.out)["terms"]] == [0.75, 0.25]
    assert "the weights added up to 4, each was multiplied by 0.25" in done.err
    assert "warning:" not in done.err
    small = cli("compose", f"{adapters[0]}:0.5", "--normalize", "1", "-p", "ab", "--max-new-tokens", "2", *tiny)
    assert "normalized" not in small.err


def test_a_doubled_term_is_said_once(cli: Cli, tiny: list[str], adapters: tuple[str, str]) -> None:
    err = cli("compose", f"{adapters[0]}:0.2", f"{adapters[0]}:0.3", "-p", "ab", *tiny).err
    assert (err.count("warning:"), "named more than once" in err) == (1, True)


def test_usage_errors_have_exit_code_2(cli: Cli) -> None:
    assert cli("compose").code == 2
    assert cli("compose", "emotion", "--no-such-option").code == 2
    assert cli("no-such-command").code == 2


class Typing:
    """A person at a terminal."""

    def __init__(self, lines: list[str]) -> None:
        self._lines: Iterator[str] = iter(lines)

    def __call__(self, _prompt: str = "") -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise EOFError from None


def test_a_chat_keeps_the_conversation_and_changes_the_weights(
    cli: Cli, zoo: Zoo, tiny: list[str], adapters: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], str]] = []
    stream = Runtime.stream

    def listen(self: Runtime, prompt: list[dict[str, str]], composition: object, **options: object) -> Iterator[str]:
        asked.append(([message["content"] for message in prompt], str(composition)))
        return stream(self, prompt, composition, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Runtime, "stream", listen)
    monkeypatch.setattr(
        "builtins.input",
        Typing(["ab", f"/weights {adapters[1]}:0.5", "/weights nobody", "/dance", "cd", "/quit", "never"]),
    )
    monkeypatch.setattr(sys, "stdin", sys.__stdin__)
    monkeypatch.setattr("lora_rt.core.cli.options.piped", lambda: None)
    done = cli("compose", adapters[0], *tiny)
    assert done.code == 0
    assert [spec for _, spec in asked] == [adapters[0], f"{adapters[1]}:0.5"]
    assert (asked[1][0][0], asked[1][0][-1], len(asked[1][0])) == ("ab", "cd", 3)
    assert "there is no adapter 'nobody'" in done.err
    assert "there is no /dance" in done.err


def test_a_chat_warns_once_of_weights_beyond_what_was_measured(
    cli: Cli, tiny: list[str], adapters: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"/weights {adapters[1]}:{weight}" for weight in (2, 3, 0.5, 4)]
    monkeypatch.setattr("builtins.input", Typing([*lines, "/quit"]))
    monkeypatch.setattr(sys, "stdin", sys.__stdin__)
    monkeypatch.setattr("lora_rt.core.cli.options.piped", lambda: None)
    assert cli("compose", adapters[0], *tiny).err.count("warning:") == 1


def test_weights_of_a_chat_go_through_the_options_of_the_command_line(
    cli: Cli, tiny: list[str], adapters: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = adapters
    at = {"between answers": f"/weights {one}:3 {two}:1", "during one": f"/weights {one}:1 {two}:3[x]"}
    polled, asked, stream, compose = [[], [], [at["during one"]]], [], Runtime.stream, RowStream.compose

    def listen(self: Runtime, prompt: object, composition: object, **options: object) -> Any:
        asked.append(str(composition))
        return stream(self, prompt, composition, **options)  # type: ignore[arg-type]

    def turned(self: RowStream, composition: object) -> None:
        asked.append(str(composition))
        compose(self, composition)  # type: ignore[arg-type]

    monkeypatch.setattr(Runtime, "stream", listen)
    monkeypatch.setattr(RowStream, "compose", turned)
    monkeypatch.setattr(Keyboard, "poll", lambda self: polled.pop() if asked and polled else [])
    monkeypatch.setattr(Keyboard, "withdraw", lambda self, line: None)
    monkeypatch.setattr("builtins.input", Typing([at["between answers"], "ab"]))
    monkeypatch.setattr("lora_rt.core.cli.options.piped", lambda: None)
    done = cli("compose", f"{one}:0.5", "--normalize", "1", "--after", "So:", "--temperature", "0", *tiny)
    assert asked == [f"{one}:0.75[So:] {two}:0.25[So:]", f"{one}:0.25[So:] {two}:0.75[x]"], done.err
    assert done.err.count("normalized: the weights added up to 4") == 2
    assert f"{one} waits for 'So:'" in done.err


def test_a_chat_that_has_outgrown_the_context_names_the_way_out(
    cli: Cli, zoo: Zoo, adapters: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["--base", str(zoo.base("llama", max_position_embeddings=48)), "--allow-base-mismatch"]
    monkeypatch.setattr("builtins.input", Typing(["ab", "ab" * 40, "/reset", "ab" * 40, "cd"]))
    monkeypatch.setattr("lora_rt.core.cli.options.piped", lambda: None)
    done = cli("compose", adapters[0], *base, "--precision", "float32", "--max-new-tokens", "2")
    told = [line for line in done.err.splitlines() if line.startswith("error: ")]
    ways = ["/reset" in line for line in told]
    assert ways == [True, False], "a message that is too long alone is none that /reset helps"


def test_an_adapter_whose_mode_has_commands_says_so_beside_the_answer_and_not_in_json(
    cli: Cli, tiny: list[str], zoo: Zoo
) -> None:
    bridge = str(zoo.adapter("llama", mode="bridge", seed=1))
    done = cli("compose", bridge, "-p", "ab", *tiny)
    assert "bridge has commands of its own: lora-rt bridge compress|expand|roundtrip|cycle" in done.err
    assert "of its own" not in done.out
    assert "of its own" not in cli("compose", str(zoo.adapter("llama", seed=1)), "-p", "ab", *tiny).err
    assert cli("compose", bridge, "-p", "ab", "--json", *tiny).err == ""
