"""What can be known of adapters is said before torch is imported, and so before any base is touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy
from safetensors import safe_open

from lora_rt.registry.files import WEIGHTS
from lora_rt.registry.store import Store
from support.adapters import BASE, CARD, CONFIG, adapter_files, write_adapter
from support.cli import Cli
from support.forks import Forks
from support.hub import LocalHub
from support.opens import opened_from_now_on, opens
from support.tiny import Zoo

COMMANDS = (
    ["compose", "-p", "x"],
    ["explain", "-p", "x"],
    ["eval", "--data", "d=d.jsonl"],
    ["tune", "--data", "d.jsonl"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("register.json", CARD | {"base": BASE}, "it was made for the base 'tests/tiny-base'"),
        ("register.json", CARD | {"base": BASE | {"id": "folder", "digest": ""}, "mode": "nobodys"}, "nobodys"),
        ("adapter_config.json", CONFIG | {"peft_type": "IA3"}, "IA3, not LoRA"),
        ("adapter_config.json", CONFIG | {"use_qalora": True}, "QA-LoRA"),
    ],
)
def test_an_adapter_that_can_not_be_used_is_refused_before_torch_is_imported(
    command: list[str], file: str, content: dict[str, object], says: str, tmp_path: Path, light: Forks
) -> None:
    files = adapter_files(card=file == "register.json")
    write_adapter(tmp_path / "theirs", files | {file: json.dumps(content).encode()})
    (tmp_path / "d.jsonl").write_text('{"scene": "a", "text": "b"}\n' * 8)
    name, *options = command
    done = light(
        [name, str(tmp_path / "theirs"), *(word.replace("d.jsonl", str(tmp_path / "d.jsonl")) for word in options)]
    )
    assert says in " ".join(done.err.split())
    assert (done.code, done.heavy) == (1, frozenset())


@pytest.mark.parametrize(
    "command",
    [
        ["compose", "emotion", "-p", "x"],
        ["explain", "emotion", "-p", "x"],
        ["eval", "emotion", "--data", "d=d.jsonl"],
        ["tune", "emotion", "logic", "--data", "d.jsonl"],
        ["train", "mine", "--mode", "output-only", "--data", "d.jsonl"],
        ["serve"],
        ["bench"],
    ],
    ids=lambda command: command[0],
)
def test_a_base_that_can_not_be_loaded_is_refused_before_torch_is_imported(
    command: list[str], zoo: Zoo, tmp_path: Path, light: Forks
) -> None:
    (tmp_path / "d.jsonl").write_text('{"scene": "a", "text": "b"}\n' * 8)
    words = [word.replace("d.jsonl", str(tmp_path / "d.jsonl")) for word in command]
    anyway = [] if command[0] in ("serve", "bench", "train") else ["--allow-base-mismatch"]
    empty, packed = tmp_path / "empty", tmp_path / "packed"
    for folder in (empty, packed):
        folder.mkdir()
        config = json.loads((zoo.base("llama") / "config.json").read_text())
        how = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        (folder / "config.json").write_text(json.dumps(config | (how if folder == packed else {})))
    shutil.copy(zoo.base("llama") / "model.safetensors", packed)
    for folder, says in ((empty, "holds no weights"), (packed, "packed is already quantized to int8")):
        done = light([*words, "--base", str(folder), *anyway])
        assert says in " ".join(done.err.split())
        assert (done.code, done.heavy) == (1, frozenset())


def test_a_whole_answer_opens_each_weight_file_once_and_modes_and_registry_too(
    zoo: Zoo, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the look at names to the last token: what was checked is what is loaded. One is stored, the other a path."""
    stored, given = (Path(shutil.copytree(zoo.adapter("llama", seed=s), tmp_path / f"a{s}")) for s in (1, 2))
    with Store().staging() as staged:
        kept = Store().publish(
            shutil.copytree(stored, staged, dirs_exist_ok=True), "kept", source="here", revision=None
        )
    made = opened_from_now_on(monkeypatch)
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    with opens() as opened:
        done = cli("compose", "kept:0.7", f"{given}:0.3", "-p", "x", "--max-new-tokens", "2", "--json", *base)
    assert done.code == 0, done.err
    assert [term["name"] for term in json.loads(done.out)["terms"]] == ["kept", "a2"]
    assert [opened.of(folder / WEIGHTS) for folder in (kept.folder, given)] == [1, 1]
    assert opened.named(WEIGHTS) == 2
    assert opened.of(zoo.base("llama") / "model.safetensors") > 0  # it is safetensors that reads a base, in Rust
    assert sorted(made) == ["ModeHost", "Registry"]


READERS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: open(path, "rb").close(),
    "os.open": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "safe_open": lambda path: safe_open(path, framework="np").keys(),
    "load_file": safetensors.numpy.load_file,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_second_look_at_a_weight_file_is_seen_however_it_is_opened(reader: str, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "mine") / WEIGHTS
    (tmp_path / "link").symlink_to(file)
    with opens() as opened:
        file.read_bytes()
        assert opened.of(file) == 1
        READERS[reader](tmp_path / "link")
        assert (opened.of(file), opened.named(WEIGHTS)) == (2, 2)
    READERS[reader](file)
    assert opened.of(file) == 2


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_of_a_base_on_the_hub_nothing_is_fetched_for_an_adapter_of_another_one(
    command: list[str], tmp_path: Path, light: Forks, hub: LocalHub
) -> None:
    hub.commit("org/base", {"config.json": b"{}", "model.safetensors": b"large"})
    files = adapter_files(card=True) | {"register.json": json.dumps(CARD | {"base": BASE}).encode()}
    write_adapter(tmp_path / "theirs", files)
    (tmp_path / "d.jsonl").write_text('{"scene": "a", "text": "b"}\n' * 8)
    name, *options = [word.replace("d.jsonl", str(tmp_path / "d.jsonl")) for word in command]
    done = light([name, str(tmp_path / "theirs"), *options, "--base", "org/base"])
    assert (done.code, done.heavy) == (1, frozenset()), done.err
    assert "it was made for the base 'tests/tiny-base'" in " ".join(done.err.split())
    assert hub.requests == []
