"""One place turns exceptions into a line that says what is wrong and what to do next, and into an exit code."""

from __future__ import annotations

import difflib
import errno
import importlib.metadata
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from lora_rt.core.cli.console import drop_output, err
from lora_rt.core.cli.upstream import MISUSE
from lora_rt.errors import LoraRtError, UsageError
from lora_rt.plugins.contract.terminal import harmless
from lora_rt.registry.errors import HubError
from lora_rt.registry.home import home
from lora_rt.registry.packages import unreadable


@contextmanager
def usage() -> Iterator[None]:
    """What is refused inside was typed wrong: the same line, and exit code 2."""
    try:
        yield
    except LoraRtError as error:
        raise UsageError(error.message, next_step=error.next_step, problems=error.problems) from error


def explain(error: BaseException) -> int | None:
    """Print what an expected failure means; the exit code, or None where the error is a defect of ours."""
    if _about_packages(error) or _about_settings(error):
        return 1
    if isinstance(error, LoraRtError):
        _line(error.message, error.next_step, error.problems)
        return 2 if isinstance(error, UsageError) else 1
    if isinstance(error, MISUSE):
        _misused(error)
        return 2
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _line("stopped", "")
        return 130
    if isinstance(error, BrokenPipeError):
        # The reader of our output left (`| head`): no message, and no second failure when Python flushes at exit.
        drop_output()
        return 1
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _line(f"no room on the disk for {error.filename or 'what was being written'}", "Free some space and try again")
        return 1
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        _line(f"{error.filename}: {error.strerror}", _about_path(str(error.filename)))
        return 1
    return None


def _misused(error: Any) -> None:
    """Say what is wrong with the command line, and where its help is; no command at all has been shown the help."""
    kind, context = type(error).__name__, error.ctx
    if kind == "NoArgsIsHelpError":
        return
    message = str(error.format_message()).rstrip(".")
    if kind == "NoSuchOption":
        options = [name for parameter in context.command.get_params(context) for name in parameter.opts]
        near = difflib.get_close_matches(error.option_name, options, 1)
        message = f"there is no option {error.option_name}" + (f"; did you mean {near[0]}?" if near else "")
    elif kind == "MissingParameter" and error.param is not None:
        message = error.param.get_error_hint().replace("'", "") + " is missing"
    elif isinstance(error, typer.BadParameter) and error.param is not None:
        message = f"{error.param.get_error_hint()}: {_what_is_wrong(error)}".rstrip(".").replace("'", "", 2)
    message = message.replace("No such command", "there is no command").replace(". Did you mean", "; did you mean")
    message = re.sub(
        r"(?i)^got unexpected extra arguments?(?:\(s\))? \((.*)\)$", r"this command does not take \1", message
    )
    message = message.replace("requires an argument", "needs a value").replace(
        "does not take a value", "takes no value"
    )
    command = context.command_path if context is not None else " ".join(["lora-rt", *sys.argv[1:2]])
    _line(message if message[:2].isupper() else message[:1].lower() + message[1:], f"See: {command} --help")


def _what_is_wrong(error: Any) -> str:
    """typer reads what was typed with pydantic, whose words are for programmers."""
    cause: Any = error.__cause__
    if type(cause).__name__ != "ValidationError":
        return str(error.message)
    from lora_rt.registry.models import in_words

    found = cause.errors()[0]
    words = in_words(found)
    return f"{str(found['input'])[:80]!r} {words[3:]}" if words.startswith("it ") else words


def _about_packages(error: BaseException) -> bool:
    """Say so where a damaged package is to blame: libraries that ask all packages for entry points fail because of it.

    Also where it became an error of ours on its way, which then blames something else.
    """
    place = str(Path(importlib.metadata.__file__).parent)
    if not any(frame.filename.startswith(place) for frame in _frames(error)):
        return False

    damaged = unreadable()
    if not damaged:
        return False
    names = " and ".join(f"{item.package} in {item.folder}" for item in damaged)
    _line(f"the entry_points.txt of {names} is damaged", damaged[0].todo)
    return True


def _about_settings(error: BaseException) -> bool:
    """Say so where a setting of the Hub's client is to blame, which transformers and others import."""
    if not any(Path(frame.filename).parts[-2:] == ("huggingface_hub", "constants.py") for frame in _frames(error)):
        return False
    from lora_rt.registry.hub.library import check_settings

    try:
        check_settings()
    except HubError as found:
        _line(found.message, found.next_step)
        return True
    return False


def _frames(error: BaseException | None) -> Iterator[traceback.FrameSummary]:
    while error is not None:
        yield from traceback.extract_tb(error.__traceback__)
        error = error.__cause__ or error.__context__


def _about_path(path: str) -> str:
    """What to do about a path that can't be used; where it is ours, the home is to blame."""
    if Path(path).is_relative_to(home()):
        return "Set LORA_RT_HOME to a folder that you can write"
    return "Check the path and its permissions"


def _line(message: str, next_step: str, problems: tuple[str, ...] = ()) -> None:
    text = f"[bold red]error:[/] {_shown(message)}"
    if next_step:
        text += f"{'' if message.endswith(('?', '.', '!')) else '.'} [bold]{_shown(next_step)}[/]"
    # Whole words in a terminal, one line for whoever searches a log.
    err.print(text, soft_wrap=not err.is_terminal)
    for problem in (p for p in problems if p not in message):
        err.print(f"  - {_shown(problem)}", soft_wrap=not err.is_terminal)


def _shown(text: str) -> str:
    """Also the words of strangers: a chat template's complaint, a line of data."""
    return escape(harmless(text))
