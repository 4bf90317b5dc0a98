"""80 columns keep names, paths and digests whole, in a terminal and in a pipe."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_rt.core.cli import console
from lora_rt.registry.home import home
from lora_rt.registry.store import Store
from support.cli import Cli
from support.tiny import Zoo

pytestmark = pytest.mark.slow

NAME = "a-voice-with-a-name-of-a-good-many-letters-" + "x" * 45
SOURCE = "hf:an-organization-of-some-length/a-repository-whose-name-goes-on-and-on-and-on"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def sha256(zoo: Zoo) -> str:
    """The digest of an adapter in the store whose name, source and digest are longer than a line together."""
    store = Store()
    with store.staging() as folder:
        shutil.copytree(zoo.adapter("llama", seed=1), folder, dirs_exist_ok=True)
        return store.publish(folder, NAME, source=SOURCE, revision=REVISION).sha256


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Cli:
    """The command line at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(console.out, "_force_terminal", request.param)
    monkeypatch.setattr(console.out, "_width", 80)
    monkeypatch.setattr(console.out, "no_color", True)
    return cli


def test_list(narrow: Cli, sha256: str) -> None:
    shown = narrow("list").out
    assert all(text in shown for text in (NAME, SOURCE, REVISION, sha256, "HuggingFaceTB/SmolLM2-135M-Instruct"))
    assert "…" not in shown


def test_show(narrow: Cli, sha256: str) -> None:
    shown = narrow("show", NAME).out
    (item,) = (item for item in Store().installed() if item.name == NAME)
    assert all(text in shown for text in (NAME, SOURCE, REVISION, sha256, str(item.folder)))
    assert "…" not in shown


def test_verify(narrow: Cli, sha256: str) -> None:
    shown = narrow("verify", NAME, "--offline").out
    assert all(text in shown for text in (NAME, SOURCE, "ok"))
    assert "…" not in shown


def test_doctor(narrow: Cli, sha256: str) -> None:
    shown = narrow("doctor").out
    assert str(home()) in shown
    assert NAME in shown
    assert "…" not in shown


def test_eval(narrow: Cli, zoo: Zoo, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"scene": "ab", "text": "cd"}\n' * 3, encoding="utf-8")
    adapters = [str(zoo.adapter("llama", seed=seed)) for seed in (1, 2)]
    tiny = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    done = narrow("eval", *adapters, "--data", f"{NAME}={tmp_path / 'data.jsonl'}", *tiny)
    assert done.code == 0, done.err
    assert all(text in done.out for text in (NAME, *adapters))
    assert "…" not in done.out


def test_plan(narrow: Cli, zoo: Zoo) -> None:
    small = ["--precision", "bfloat16", "--batch", "2", "--seq", "16"]
    shown = narrow("plan", str(zoo.base("llama")), "--device", "cpu", *small).out
    assert all(text in shown for text in ("precision", "KV cache", "process", "optimizer", "peak*", "bfloat16"))
    assert "…" not in shown
