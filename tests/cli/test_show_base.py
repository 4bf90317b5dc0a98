"""`lora-rt show --base` draws what a base has for adapters: role, layers, shapes."""

from __future__ import annotations

import json
from pathlib import Path

from support.architectures.shrink import random_model, tiny_config
from support.cli import Cli
from support.tiny import save_tokenizer


def test_a_base_shows_roles_layers_and_shapes(cli: Cli, tmp_path: Path) -> None:
    random_model(tiny_config("mixtral")).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    drawn = cli("show", "--base", str(tmp_path))
    assert drawn.code == 0
    assert "model.layers.*.self_attn.q_proj" in drawn.out
    rows = json.loads(cli("show", "--base", str(tmp_path), "--json").out)
    by_role = {row["role"]: row for row in rows if row["role"]}
    assert by_role["query"]["modules"] == [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert by_role["query"]["shape"] == [64, 64]
    assert {len(row["shape"]) for row in rows if row["role"] == "experts"} == {3}


def test_show_takes_one_thing(cli: Cli) -> None:
    assert cli("show").code == 2
    assert cli("show", "emotion", "--base", "default").code == 2
