"""The launcher: the rank that the registers need, vLLM's flags and environment, and refusals before anything starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rt.core.export import run
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from lora_rt.registry import home
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.registry import Registry
from support.tiny import Zoo, mode_host

pytestmark = [pytest.mark.usefixtures("plugin"), pytest.mark.slow]
Install = Callable[..., None]


def launch(base: Path, **wanted: Any) -> Any:
    from lora_rt_vllm.launch import Wanted
    from lora_rt_vllm.launch import launch as make

    return make(Wanted(str(base), **wanted))


def value(found: Any, flag: str) -> str:
    words = list(found.command)
    assert words.count(flag) == 1
    return str(words[words.index(flag) + 1])


def test_the_command_line_is_whole(base: Path, tmp_path: Path) -> None:
    found = launch(base, registers=("emotion", "logic"), extra=("--tensor-parallel-size", "2"), cache=tmp_path)
    assert found.command[1:5] == ("-m", "vllm.entrypoints.cli.main", "serve", str(base))
    assert " ".join(found.command[5:]) == (
        "--served-model-name base --enable-lora --max-lora-rank 16 --max-loras 8 --max-cpu-loras 32 "
        "--api-server-count 1 --middleware lora_rt_vllm.front.Front --dtype auto --host 127.0.0.1 --port 8000 "
        "--tensor-parallel-size 2"
    )
    module, name = value(found, "--middleware").rsplit(".", 1)
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_the_plugin_reads_what_the_launcher_says(base: Path, tmp_path: Path) -> None:
    from lora_rt_vllm.settings import read

    found = launch(
        base, registers=("emotion", "logic"), cache=tmp_path, cache_gb=2.5, dtype="bfloat16", names=("b", "c")
    )
    assert read(found.environment, []) == found.settings
    assert found.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "true"
    assert (found.settings.registers, found.settings.dtype) == (("emotion", "logic"), "bfloat16")


@pytest.mark.parametrize(
    ("wanted", "rank"),
    [
        ({"registers": ("emotion",)}, 8),
        ({"registers": ("emotion", "logic")}, 16),
        ({}, 32),
        ({"max_terms": 1}, 8),
        ({"max_terms": 2}, 16),
        ({"max_rank": 320}, 320),
    ],
)
def test_the_rank_is_the_smallest_that_the_largest_registers_need_together(
    base: Path, wanted: dict[str, Any], rank: int
) -> None:
    """Ranks 4, 6 and 8."""
    assert value(launch(base, **wanted), "--max-lora-rank") == str(rank)


def test_a_named_composition_is_a_register_with_the_rank_of_its_terms(base: Path) -> None:
    terms = (NamedTerm(reference="emotion", weight=0.5), NamedTerm(reference="body"))
    Registry().compositions.save(NamedComposition(name="calm", base=base.name, terms=terms))
    found = launch(base, registers=("calm",))
    assert "calm (rank 12)" in found.notes[-1]


def test_a_rank_over_512_is_refused_with_every_rank(zoo: Zoo, base: Path, install: Install) -> None:
    for name in ("one", "two"):
        install(name, zoo.adapter("llama", seed=ord(name[0]), r=300, targets=("up_proj",)))
    with pytest.raises(LoraRtError) as caught:
        launch(base, registers=("one", "two", "body"))
    assert str(caught.value) == (
        "3 of these registers have rank 608 together, and vLLM takes 512 at most. "
        "Give fewer registers, a smaller --max-terms, or --max-rank 512\n"
        "  - one: rank 300\n  - two: rank 300\n  - body: rank 8"
    )
    assert value(launch(base, registers=("one", "two"), max_terms=1), "--max-lora-rank") == "320"


def test_a_rank_that_vllm_does_not_know_is_refused(base: Path) -> None:
    with pytest.raises(LoraRtError, match=r"vLLM takes no --max-lora-rank 24. Use one of \(1, 8, 16, 32"):
        launch(base, max_rank=24)


class Fading:
    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook is a function
        return Gate(ranks=torch.ones(1))


def test_what_vllm_cant_do_is_refused_all_at_once(
    zoo: Zoo, base: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = mode_host(fading=Fading)
    monkeypatch.setattr(run, "load_modes", lambda: host)
    install("fades", zoo.adapter("llama", seed=1, mode="fading"))
    install("biased", zoo.adapter("llama", seed=6, r=3, targets=("v_proj",), lora_bias=True))
    with pytest.raises(LoraRtError) as caught:
        launch(base, registers=("emotion", "fades", "biased", "nowhere", "./here", "emotion:2"))
    assert caught.value.message == "vLLM can't serve all of emotion, fades, biased, nowhere, ./here, emotion:2"
    assert caught.value.problems == (
        "'fades' has no static equivalent: its mode 'fading' acts at inference (lora_rt_gate) and does not say that "
        "this one is static",
        "'biased' adds biases, which vLLM does not",
        "there is no adapter 'nowhere'",
        "'./here' is not the name of an adapter or a named composition; pull it under one",
        "'emotion:2' is not the name of an adapter or a named composition; pull it under one",
    )


def test_what_was_not_asked_for_and_cant_be_served_is_said(zoo: Zoo, base: Path, install: Install) -> None:
    install("biased", zoo.adapter("llama", seed=6, r=3, targets=("v_proj",), lora_bias=True))
    found = launch(base)
    assert "not served: 'biased' adds biases, which vLLM does not" in found.notes
    assert (
        found.notes[-1]
        == "registers: body (rank 8), emotion (rank 4), logic (rank 6); one composition may have rank 32"
    )
    assert found.settings.registers == (), "what is installed later is served as well"


def test_a_base_without_registers_is_refused(zoo: Zoo) -> None:
    with pytest.raises(LoraRtError, match=r"there is no register for .* here. See: lora-rt list"):
        launch(zoo.base("gpt2"))


@pytest.mark.parametrize("flag", ["--enable-lora", "--api-server-count=2", "--max_lora_rank", "--middleware"])
def test_flags_that_are_set_already_are_refused(base: Path, flag: str) -> None:
    with pytest.raises(LoraRtError, match=r"these flags of vLLM's are set already. Leave them out"):
        launch(base, extra=(flag, "x"))


def test_the_key_is_not_on_the_command_line(base: Path) -> None:
    found = launch(base, api_key="secret")
    assert "secret" not in " ".join(found.command)
    assert found.environment["VLLM_API_KEY"] == "secret"


@pytest.mark.parametrize(
    ("before", "after"), [("a,b", "a,b,lora_rt"), ("", "lora_rt"), ("lora_rt", None), (None, None)]
)
def test_our_plugin_is_let_in_and_others_are_not_shut_out(
    base: Path, monkeypatch: pytest.MonkeyPatch, before: str | None, after: str | None
) -> None:
    """Without the variable vLLM loads all of them, those of its platforms among them."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if before is not None:
        monkeypatch.setenv("VLLM_PLUGINS", before)
    assert launch(base).environment.get("VLLM_PLUGINS") == after


def test_it_prints_the_command_tidies_up_and_becomes_vllm(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_rt_vllm import launch as module

    became: list[Any] = []
    left = tmp_path / "exports" / "base" / ".killed"
    left.mkdir(parents=True)
    monkeypatch.setattr(os, "execvpe", lambda *given: became.append(given))
    module.main([str(base), "emotion", "--cache", str(tmp_path / "exports"), "--api-key", "k", "--", "--seed", "3"])
    program, command, environment = became[0]
    assert (program, command[-2:]) == (command[0], ("--seed", "3"))
    assert environment["VLLM_API_KEY"] == "k"
    assert not left.exists()
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("env VLLM_ALLOW_RUNTIME_LORA_UPDATING=true LORA_RT_VLLM_BASE=")
    assert told[-1].endswith("--seed 3")
    assert "VLLM_API_KEY" not in told[-1]


def test_a_refusal_ends_with_one_line_and_code_1(base: Path) -> None:
    from lora_rt_vllm.launch import main

    with pytest.raises(SystemExit) as caught:
        main([str(base), "nowhere"])
    assert str(caught.value.code).startswith("error: vLLM can't serve all of nowhere")


def test_the_default_base_is_handed_to_vllm_as_a_dense_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lora_rt_vllm import launch as module

    asked: list[str] = []
    monkeypatch.setattr(module, "prepare", lambda base, precision: asked.append(precision) or tmp_path / "dense")
    found = launch(Path("default"), registers=("emotion", "logic"), dtype="float32")
    assert found.command[4] == str(tmp_path / "dense")
    assert (asked, value(found, "--max-lora-rank")) == (["float32"], "16")
    assert not home.bases().exists()


def test_serve_hands_base_registers_and_flags_to_the_engine(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from importlib.metadata import EntryPoint

    from typer.testing import CliRunner

    from lora_rt.core.cli import serve
    from lora_rt.core.cli.app import app

    became: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *given: became.append(given))
    point = EntryPoint("vllm", "lora_rt_vllm.launch:engine", "lora_rt.engines")
    monkeypatch.setattr(serve, "points_of", lambda group: ([point] if group == point.group else [], []))
    told = CliRunner().invoke(
        app, ["serve", "--engine", "vllm", "--port", "8123", str(base), "emotion", "--", "--seed", "3"]
    )
    assert told.exit_code == 0, told.output
    command = became[0][1]
    assert (command[4], command[-4:]) == (str(base), ("--port", "8123", "--seed", "3"))
    assert became[0][2]["LORA_RT_VLLM_REGISTERS"] == "emotion"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--engine", "vllm"], "there is no engine 'vllm' here; pip install lora-rt-vllm brings it"),
        (["--engine", "nonsense"], "there is no engine 'nonsense' here"),
        (["someone/base"], "someone/base is for another --engine"),
    ],
)
def test_serve_refuses_engines_that_are_not_here(words: list[str], text: str) -> None:
    from typer.testing import CliRunner

    from lora_rt.core.cli.app import app
    from lora_rt.errors import UsageError

    error = CliRunner().invoke(app, ["serve", *words]).exception
    assert isinstance(error, UsageError)
    assert error.message == text
