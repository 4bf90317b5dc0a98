"""What can be known of adapters is said before torch is imported, and so before any base is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.adapters import BASE, CARD, CONFIG, adapter_files, write_adapter

ASK = """
import sys
from lora_rt.core.cli.app import run
sys.argv = ["lora-rt", *sys.argv[1:]]
try:
    run()
except SystemExit as left:
    print("torch" in sys.modules, left.code)
"""
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
    command: list[str], file: str, content: dict[str, object], says: str, tmp_path: Path
) -> None:
    files = adapter_files(card=file == "register.json")
    write_adapter(tmp_path / "theirs", files | {file: json.dumps(content).encode()})
    (tmp_path / "d.jsonl").write_text('{"scene": "a", "text": "b"}\n' * 8)
    name, *options = command
    asked = [sys.executable, "-c", ASK, name, "./theirs", *options]
    done = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert says in " ".join(done.stderr.split())
    assert done.stdout.split() == ["False", "1"]
