"""What the command line takes of typer beyond its documented face; `tests/cli/test_upstream.py` holds each fact.

MISUSE                 what typer raises for a command line that it can't read; the class has no public name
collect_usage_pieces   of a command: the words of its usage line
display_type_rich      of an argument: what the help shows as its type
type_descriptor        of an option: its `annotation` is its Python type
_TYPER_...             two variables of the environment
"""

from __future__ import annotations

import os
from typing import Any

import typer

MISUSE: Any = typer.BadParameter.__mro__[1]
_TYPES = {str: "TEXT", int: "INTEGER", float: "NUMBER"}


def plain(command: Any) -> Any:
    """The command, its help in a newcomer's words: no `<bool>` behind a flag, no `{NAME...}...` in the usage."""
    params, usage = command.get_params, command.collect_usage_pieces
    command.get_params = lambda ctx: [_plain_parameter(parameter) for parameter in params(ctx)]
    command.collect_usage_pieces = lambda ctx: [piece.replace("{", "").replace("}", "") for piece in usage(ctx)]
    for inner in getattr(command, "commands", {}).values():
        plain(inner)
    return command


def _plain_parameter(parameter: Any) -> Any:
    if parameter.param_type_name == "argument":
        parameter.display_type_rich = lambda ctx: ""
    elif parameter.is_flag:
        parameter.metavar = ""
    elif parameter.metavar is None:
        parameter.metavar = _TYPES.get(parameter.type_descriptor.annotation)
    return parameter


def believe_the_named_shell() -> None:
    """For completions: typer takes the shell that it finds itself in, unless it is told not to look."""
    os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"


def plain_help() -> None:
    """Without colours and cursor moves: the help has a console of its own, which is made when it is first imported."""
    os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
