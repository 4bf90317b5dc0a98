"""The table of commands: its lines of help are true, and nothing is imported before it is called."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lora_rt.core.cli.table import COMMANDS, PLACES, load
from support.cli import Cli


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_help_is_the_first_sentence_of_the_command(name: str) -> None:
    assert load(name).help.partition("\n\n")[0].replace("\n", " ") == COMMANDS[name]


@pytest.mark.slow
def test_a_command_imports_no_other_command() -> None:
    code = (
        "import sys; sys.argv = ['lora-rt', 'list', '--json']\n"
        "from lora_rt.core.cli.app import run\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    imported = set(ended.stderr.split())
    places = {f"lora_rt.core.cli.{PLACES.get(name, name).partition(':')[0]}" for name in COMMANDS}
    assert places & imported == {"lora_rt.core.cli.list"}
    assert "torch" not in imported


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_short_help_without_types_of_python(name: str, cli: Cli) -> None:
    done = cli(name, "-h")
    assert done.code == 0
    assert f"Usage: lora-rt {name} " in done.out
    assert not any(riddle in done.out for riddle in ("<bool>", "<str>", "<list[", "{SPEC", "......"))


def test_a_mistyped_command_is_a_usage_error_that_names_the_right_one(cli: Cli) -> None:
    done = cli("compos")
    assert (done.code, "did you mean 'compose'?" in done.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_the_names_of_commands_and_options(shell: str) -> None:
    def completed(line: str) -> str:
        environment = {
            **os.environ,
            "_LORA_RT_COMPLETE": f"complete_{shell}",
            "_TYPER_COMPLETE_ARGS": line,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        program = [sys.executable, "-m", "lora_rt"]
        return subprocess.run(program, capture_output=True, text=True, env=environment, check=False).stdout

    commands = completed("lora-rt comp")
    assert "compose" in commands
    assert "doctor" not in commands
    assert "--precision" in completed("lora-rt compose --prec")


@pytest.mark.slow
@pytest.mark.parametrize(("shell", "begins"), [("fish", "complete --command lora-rt"), ("zsh", "#compdef lora-rt")])
def test_the_completion_is_for_the_shell_that_is_named(shell: str, begins: str) -> None:
    command = [sys.executable, "-m", "lora_rt", "--show-completion", shell]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert ended.stdout.startswith(begins)
