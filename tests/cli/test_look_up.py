"""What can be known of adapters is said before torch is imported, and so before any base is touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.adapters import BASE, CARD, CONFIG, adapter_files, write_adapter
from support.forks import Forks

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
