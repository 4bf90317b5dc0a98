"""How long a plugin may take, and how to give one up that takes longer."""

from __future__ import annotations

import contextvars
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_rt.errors import LoraRtError

SECONDS_VARIABLE = "LORA_RT_PLUGIN_SECONDS"

# Importing torch from a cold disk takes ten seconds; an objective may build tables or read files.
IMPORT = "import"
_SECONDS = {
    IMPORT: 20.0,
    "lora_rt_objective": 60.0,
    "lora_rt_mixture": 60.0,
    "lora_rt_scene": 10.0,
    "lora_rt_compose": 10.0,
    "lora_rt_static": 10.0,
    "lora_rt_commands": 5.0,
    "lora_rt_sources": 10.0,
    # Not a limit: after this long a gate is named as hanging (see watch.py).
    "lora_rt_gate": 10.0,
    "lora_rt_joint_gate": 10.0,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with a value, with an error, or not in time (`late`)."""

    value: Any = None
    error: BaseException | None = None
    late: bool = False


class Limits:
    """The seconds that a plugin has for its import and for each hook.

    Args:
        at_most: a bound on all of them; `$LORA_RT_PLUGIN_SECONDS`, where it is set, replaces all of them first.

    Raises:
        LoraRtError: the variable holds no positive number.
    """

    def __init__(self, at_most: float = math.inf) -> None:
        chosen = _from_environment()
        self._seconds = {what: min(chosen or seconds, at_most) for what, seconds in _SECONDS.items()}

    def __getitem__(self, what: str) -> float:
        return self._seconds[what]


def within(seconds: float, action: Callable[[], Any]) -> Outcome:
    """Run `action` in a thread of its own and give it up after a while.

    Python can not stop a thread: one that hangs is left behind, as a daemon that does not keep the process alive. The
    thread sees the caller's context variables. Whatever the action raises, SystemExit and KeyboardInterrupt included,
    is its outcome; a Ctrl-C of the user reaches the waiting caller.
    """
    ended: list[Outcome] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            ended.append(Outcome(value=context.run(action)))
        except BaseException as error:
            ended.append(Outcome(error=error))

    thread = threading.Thread(target=work, daemon=True, name="lora-rt-plugin")
    thread.start()
    thread.join(seconds)
    return ended[0] if ended else Outcome(late=True)


def _from_environment() -> float | None:
    text = os.environ.get(SECONDS_VARIABLE, "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise LoraRtError(f"{SECONDS_VARIABLE} is {text!r}", next_step="Give a number of seconds above 0, or unset it")
    return seconds
