"""`--scene`, and `/scene` in a chat, are held against the scene types of the adapters in use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.cli.compose.chat import Chat
from lora_rt.core.cli.compose.request import ComposeRequest
from lora_rt.core.requests.composition import Composition
from lora_rt.errors import LoraRtError
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
    assert "warning: no adapter in use tells scenes apart, so the scene type body may change nothing" in done.err


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


def test_a_chat_knows_the_scene_types_of_a_composition_as_the_option_does() -> None:
    """The composition that ships tells scenes apart, its four adapters do not."""
    nothing: Any = None  # a runtime, which is not asked
    talk = Chat(nothing, ComposeRequest(Composition.parse("registers"), None, "default", "int4", "cpu", None, 4, 0, 1))
    talk.scene("logic body[So:]")
    assert talk.request.scene == "logic body[So:]"
    with pytest.raises(LoraRtError, match="there is no scene type 'nonsense'") as caught:
        talk.scene("nonsense")
    assert "archetype" in caught.value.next_step
    talk.scene("")
    assert talk.request.scene is None
