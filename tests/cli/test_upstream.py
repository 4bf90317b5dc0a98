"""Facts about other libraries that the command line stands on. A failure here names what an upgrade changed."""

from __future__ import annotations

import importlib
import inspect
from typing import Annotated, Any

import pytest
import typer

from lora_rt.core.cli import lean
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


@pytest.mark.slow  # it imports the compiler
def test_transformers_takes_one_class_of_torch_s_compiler_for_masks() -> None:
    """For which `lean` has a stand-in: another module or name, and the compiler is imported before the first token."""
    source = inspect.getsource(importlib.import_module("transformers.masking_utils"))
    taken = [
        line.split() for line in source.splitlines() if line.lstrip().startswith(("import torch._", "from torch._"))
    ]
    assert [(words[1], words[3:]) for words in taken] == [(lean._MASKS, ["TransformGetItemToIndex"])]
    assert callable(importlib.import_module(lean._MASKS).TransformGetItemToIndex)


def test_transformers_asks_once_whether_torch_can_distribute() -> None:
    """What it was told while it was imported is what it goes on believing."""
    asked = importlib.import_module("transformers.utils.import_utils").is_torch_distributed_available
    assert asked.cache_info().currsize <= 1


@pytest.mark.slow  # it imports the compiler
def test_torch_s_compiler_has_the_marks_that_functions_are_given() -> None:
    compiler = importlib.import_module("torch._dynamo")
    assert [name for name in lean._MARKS if not callable(getattr(compiler, name, None))] == []


def test_bitsandbytes_hands_functions_to_torch_compile_while_it_is_imported() -> None:
    source = inspect.getsource(importlib.import_module("bitsandbytes.backends.default.ops"))
    assert "torch.compile(" in source
