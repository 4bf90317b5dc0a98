"""`--scene` is held against the scene types of the adapters in use, before a base is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_rt.registry.card import AdapterCard, BaseIdentity, write_card
from support.cli import Cli
from support.tiny import Zoo

Made = Callable[..., Path]
COMMANDS = (["compose", "-p", "ab", "--max-new-tokens", "2", "--json"], ["explain", "-p", "ab", "--json"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("scene", ["nonsense", "logic nonsense[So:]"])
def test_a_scene_type_that_no_adapter_knows_is_refused_with_those_that_are_known(
    cli: Cli, made: Made, zoo: Zoo, command: list[str], scene: str
) -> None:
    tiny = ["--base", str(zoo.base("llama")), "--precision", "float32"]
    done = cli(*command, str(made("mine")), "--scene", scene, *tiny)
    assert done.code == 1
    assert done.err == "error: there is no scene type 'nonsense'. The scene types here are: logic, body\n"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_scene_that_nobody_reads_is_said_to_change_nothing(cli: Cli, zoo: Zoo, command: list[str]) -> None:
    tiny = ["--base", str(zoo.base("llama")), "--precision", "float32"]
    done = cli(*command, str(zoo.adapter("llama")), "--scene", "body", *tiny)
    assert done.code == 0
    assert "warning: no adapter in use tells scenes apart, so --scene body may change nothing" in done.err


@pytest.mark.parametrize("scene", ["body", "neutral", "logic body[So:]"])
def test_a_scene_type_that_is_known_is_taken_without_a_word(cli: Cli, made: Made, zoo: Zoo, scene: str) -> None:
    tiny = ["--base", str(zoo.base("llama")), "--precision", "float32"]
    done = cli(*COMMANDS[0], str(made("mine")), "--scene", scene, *tiny)
    assert (done.code, done.err) == (0, "")


def test_what_is_not_a_scene_is_a_usage_error(cli: Cli, made: Made) -> None:
    assert cli(*COMMANDS[0], str(made("mine")), "--scene", "body[", "--allow-base-mismatch").code == 2


def test_the_field_of_an_adapter_that_tells_no_scenes_apart_binds_nobody(cli: Cli, zoo: Zoo, tmp_path: Path) -> None:
    """The registers that ship name their own field in their cards, and act in every scene."""
    adapter = Path(shutil.copytree(zoo.adapter("llama"), tmp_path / "mood"))
    base = BaseIdentity(id=zoo.base("llama").name, revision=None, digest="")
    write_card(adapter, AdapterCard(register="mood", mode="output-only", base=base, scene_types=("mood",)))
    tiny = ["--base", str(zoo.base("llama")), "--precision", "float32"]
    done = cli(*COMMANDS[0], str(adapter), "--scene", "body", *tiny)
    assert done.code == 0
    assert "may change nothing" in done.err
