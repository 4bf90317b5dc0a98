"""`lora-rt export` as people call it: what it prints, the document, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import Cli
from support.tiny import Zoo


@pytest.fixture
def arguments(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A composition over a tiny base, from a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    first, second = zoo.adapter("llama", seed=1, r=4), zoo.adapter("llama", seed=2, r=6, use_rslora=True)
    return ["export", f"{first}:0.5", f"{second}:-1", "--base", str(zoo.base("llama"))]


def test_it_says_what_was_written_and_how_to_load_it(cli: Cli, arguments: list[str]) -> None:
    done = cli(*arguments, "-o", "mix")
    assert done.code == 0, done.err
    assert "to mix: peft, rank 10 at 8 layers, float32" in done.out
    assert 'PeftModel.from_pretrained(base, "./mix")' in done.out
    assert "--max-lora-rank 16" in done.out
    assert cli("show", "./mix").code == 0


def test_gguf_says_how_llama_cpp_and_ollama_take_it(cli: Cli, arguments: list[str], tmp_path: Path) -> None:
    done = cli(*arguments, "-o", "g", "--format", "gguf", "--dtype", "float16")
    assert done.code == 0, done.err
    assert "llama-cli -m BASE.gguf --lora ./g/adapter.gguf" in done.out
    assert "ADAPTER ./g/adapter.gguf" in done.out
    assert (tmp_path / "g" / "adapter.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("to", ["peft", "gguf", "merged"])
def test_json_is_one_document(cli: Cli, arguments: list[str], to: str) -> None:
    done = cli(*arguments, "-o", "out", "--format", to, "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["format"], document["path"], document["rank"], document["modules"]) == (to, "out", 10, 8)
    assert document["dtype"] == ("bfloat16" if to == "merged" else "float32")
    assert [term["weight"] for term in document["terms"]] == [0.5, -1.0]
    assert all(len(sha256) == 64 for sha256 in (document["sha256"], document["terms"][0]["sha256"]))


def test_refusals_and_usage(cli: Cli, arguments: list[str], tmp_path: Path) -> None:
    assert cli(*arguments).code == 2  # no folder
    assert cli(*arguments, "-o", "x", "--format", "onnx").code == 2
    waiting = cli("export", f"{arguments[1]}[So:]", *arguments[3:], "-o", "x")
    assert waiting.code == 1
    assert "it waits for 'So:'. Use --static" in waiting.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "full is there and not empty" in cli(*arguments, "-o", "full").err
    assert not (tmp_path / "x").exists()
