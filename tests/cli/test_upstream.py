"""Facts about typer that the command line stands on. A failure here names what an upgrade changed."""

from __future__ import annotations

import importlib
import inspect
from typing import Annotated, Any

import pytest
import typer

from lora_rt.core.cli.upstream import MISUSE, plain

_FACES = Annotated[list[str], typer.Argument(help="Faces.")]


def greet(names: _FACES, often: int = 1, size: float = 1.0, loud: bool = False) -> None:
    """Greet."""


def app() -> Any:
    made = typer.Typer(add_completion=False)
    made.command()(greet)
    made.command("other")(lambda: None)
    return made


@pytest.mark.parametrize(
    "line", [["nothing"], ["greet"], ["greet", "a", "--x"], ["greet", "a", "--often", "b"], ["other", "a"]]
)
def test_typer_raises_one_kind_of_error_for_whatever_is_typed_wrong(line: list[str]) -> None:
    with pytest.raises(MISUSE) as error:
        app()(line, standalone_mode=False)
    assert isinstance(error.value.message, str)
    assert MISUSE.__name__ == "UsageError"


def test_typer_asks_a_command_for_its_usage_and_its_parameters_for_their_types(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is put in the place of `collect_usage_pieces`, `display_type_rich` and `metavar` is what the help shows."""
    shown = []
    for change in (lambda command: command, plain):
        command = change(typer.main.get_command(app()).commands["greet"])  # type: ignore[attr-defined]
        command(["--help"], prog_name="greet", standalone_mode=False)
        shown.append(capsys.readouterr().out)
    before, after = shown
    for theirs, ours in (("{names}...", "names..."), ("<int>", "INTEGER"), ("<float>", "NUMBER"), ("<list", "")):
        assert theirs in before
        assert theirs not in after
        assert ours in after


@pytest.mark.parametrize(
    ("module", "variable"),
    [
        ("typer.rich_utils", "_TYPER_FORCE_DISABLE_TERMINAL"),
        ("typer._completion_shared", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"),
    ],
)
def test_typer_reads_the_variables_that_are_set_for_it(module: str, variable: str) -> None:
    assert f'getenv("{variable}")' in inspect.getsource(importlib.import_module(module))
