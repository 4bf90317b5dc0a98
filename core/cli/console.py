"""Where output goes: results to standard output, everything else (progress, notes, errors) to standard error."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

out = Console(soft_wrap=False, highlight=False)
err = Console(stderr=True, highlight=False)


def compose_hint(spec: Path | str, base: str) -> str:
    """The command that tries an adapter out, as a shell takes it, over the base that it is for."""
    given = str(spec) if isinstance(spec, str) or spec.is_absolute() else f"./{spec}"
    over = "" if base == "default" else f" --base {shlex.quote(base)}"
    return f'try it: lora-rt compose {shlex.quote(given)}{over} -p "..."'


def print_json(document: Any) -> None:
    """One JSON document and nothing else, UTF-8, not wrapped and not coloured."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


class Notes(logging.Handler):
    """Says what the registry and a base log on standard error, in one line: a name that hides another, for instance."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        from rich.markup import escape

        err.print(f"[yellow]note:[/] {escape(record.getMessage())}", soft_wrap=not err.is_terminal)


def hear_notes() -> None:
    """Print the notes of registry and requests from now on; each is said once for a command."""
    from lora_rt.registry import shadowing

    shadowing.say_hidden.cache_clear()
    for logger in (shadowing.LOGGER, *map(logging.getLogger, ("lora_rt.base", "lora_rt.requests"))):
        if not any(isinstance(handler, Notes) for handler in logger.handlers):
            logger.addHandler(Notes())
