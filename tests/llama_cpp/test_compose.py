"""`lora-rt compose --engine llama.cpp`: what it prints, what it keeps, and what it refuses by name."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_rt.core.cli.compose.chat import Chat
from lora_rt.core.cli.compose.request import ComposeRequest
from lora_rt.core.llama_cpp import server
from lora_rt.core.requests.composition import Composition
from lora_rt.core.runtime import Runtime
from support.cli import Cli
from support.tiny import Zoo

needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs xllamacpp")
ENGINE = ["--engine", "llama.cpp"]
HEAVY = {"torch", "transformers", "numpy", "peft", "bitsandbytes", "gguf"}


@pytest.fixture
def options(gguf: Path) -> list[str]:
    return [*ENGINE, "--base", str(gguf), "--device", "cpu", "--max-new-tokens", "8", "-p", "ab"]


@needs_llama_cpp
def test_an_answer_is_streamed_under_a_line_about_its_terms(
    cli: Cli, options: list[str], adapters: tuple[str, str], torch_runtime: Runtime
) -> None:
    done = cli("compose", f"{adapters[0]}:0.7", "--temperature", "0", "--seed", "1", *options)
    assert done.out.rstrip("\n") == torch_runtime.generate("ab", f"{adapters[0]}:0.7", max_new_tokens=8)
    assert f"{Path(adapters[0]).name}:0.7  output-only" in done.err
    assert "over tiny (GGUF), temperature 0, seed 1" in done.err


@needs_llama_cpp
def test_json_has_the_form_of_the_other_engine(cli: Cli, options: list[str], adapters: tuple[str, str]) -> None:
    document = json.loads(cli("compose", f"{adapters[0]}:0.7", "--json", "--seed", "3", *options).out)
    assert set(document) == {"prompt", "text", "base", "precision", "seed", "terms", "tokens", "seconds"}
    (term,) = document["terms"]
    assert set(term) == {"name", "weight", "mode", "source", "revision", "sha256"}
    assert (term["weight"], document["seed"], document["precision"]) == (0.7, 3, "GGUF")


@needs_llama_cpp
def test_one_seed_gives_one_text(cli: Cli, options: list[str], adapters: tuple[str, str]) -> None:
    asked = ["compose", adapters[0], "--json", "--temperature", "2", *options, "--seed"]
    texts = [json.loads(cli(*asked, seed).out)["text"] for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


@needs_llama_cpp
def test_compared_every_column_is_the_answer_given_alone(
    cli: Cli, options: list[str], adapters: tuple[str, str], torch_runtime: Runtime
) -> None:
    spec = f"{adapters[0]}:3 {adapters[1]}:-3"
    asked = ["compose", spec, "--compare", "--json", "--temperature", "0", *options]
    columns = json.loads(cli(*asked).out)["columns"]
    compositions = [None, *adapters, spec]
    told = torch_runtime.generate(["ab"] * 4, compositions, deterministic=True, max_new_tokens=8)
    assert [column["text"] for column in columns] == told
    assert len(set(told)) > 1


@needs_llama_cpp
def test_a_chat_goes_on_under_other_weights_as_with_the_other_engine(gguf: Path, adapters: tuple[str, str]) -> None:
    told = []
    for engine, precision in (("llama.cpp", "int4"), ("torch", "float32")):
        settings = {"base": str(gguf), "precision": precision, "device": "cpu", "scene": None, "engine": engine}
        asked = ComposeRequest.checked(
            Composition.parse(f"{adapters[0]}:0.7"), None, seed=1, needs_prompt=False, after=None,
            max_new_tokens=6, temperature=0.0, system="be kind", **settings,
        )  # fmt: skip
        talk = Chat(asked.load(), asked)
        talk.say("ab")
        talk.weights(f"{adapters[0]}:0.2 {adapters[1]}:-0.5")
        talk.say("cd")
        told.append(talk.messages)
    assert told[0] == told[1]
    assert [message["role"] for message in told[0]] == ["user", "assistant"] * 2


@pytest.mark.slow
@needs_llama_cpp
def test_the_second_time_neither_torch_nor_transformers_is_imported(
    cli: Cli, options: list[str], adapters: tuple[str, str]
) -> None:
    assert cli("compose", adapters[0], *options).code == 0
    script = (
        "import sys\nfrom lora_rt.core.cli import main\ntry:\n    main()\nexcept SystemExit as end:\n"
        f"    print('CODE', end.code, sorted({HEAVY!r} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", script, "compose", adapters[0], *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "CODE 0 []" in done.stdout, done.stdout + done.stderr


@needs_llama_cpp
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("{one}:1[So:]", ["waits for 'So:'"]),
        ("{dora}", ["DoRA"]),
        ("{one}:1[So:] {dora}", ["waits for 'So:'", "DoRA"]),
        ("{alora}", ["aLoRA"]),
    ],
    ids=["an adapter that wakes up", "an adapter with a magnitude", "both", "an aLoRA"],
)
def test_what_has_no_constant_scale_is_refused_with_the_engine_that_has_it(
    cli: Cli, options: list[str], zoo: Zoo, spec: str, said: list[str]
) -> None:
    adapters = {"one": zoo.adapter("llama", seed=1), "dora": zoo.adapter("llama", seed=7, use_dora=True)}
    adapters["alora"] = zoo.adapter("llama", seed=9, alora_invocation_tokens=[40, 41])
    done = cli("compose", spec.format(**adapters), *options)
    assert (done.code, done.out) == (1, "")
    assert [part for part in said if part not in done.err] == []
    assert "--engine torch" in done.err


@needs_llama_cpp
def test_a_base_that_can_not_be_converted_is_refused(cli: Cli, zoo: Zoo) -> None:
    done = cli("compose", str(zoo.adapter("gpt2")), "-p", "ab", *ENGINE, "--base", str(zoo.base("gpt2")))
    assert done.code == 1
    assert ".gguf" in done.err
    assert "--engine torch" in done.err


@pytest.mark.parametrize(
    "given",
    [["--scene", "body"], ["--after", "So:"], ["--multiply", "dense"], ["--precision", "int8"]],
    ids=lambda given: given[0],
)
def test_options_that_only_the_other_engine_reads_are_refused_by_name(cli: Cli, given: list[str]) -> None:
    done = cli("compose", "emotion", "-p", "ab", *ENGINE, *given)
    assert done.code == 2
    assert f"no use for {given[0]}" in done.err
    assert "--engine torch" in done.err


def test_an_engine_that_is_none_is_a_usage_error(cli: Cli) -> None:
    done = cli("compose", "emotion", "-p", "ab", "--engine", "vllm")
    assert done.code == 2
    assert "there is no engine 'vllm'" in done.err


def test_without_llama_cpp_the_command_that_installs_it_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda _name: None)
    done = cli("compose", "emotion", "-p", "ab", *ENGINE, "--base", "./nowhere.gguf")
    assert (done.code, done.out) == (1, "")
    assert 'pip install "lora-rt[llama-cpp]"' in done.err
