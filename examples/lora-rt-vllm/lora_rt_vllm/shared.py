"""The compositions of this process, which the resolver and the front share."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_rt_vllm.answers import Answers

_MUTEX = threading.Lock()
_made: list[Answers] = []


def answers() -> Answers:
    """Made when the first composition is asked for: most of vLLM's processes never ask."""
    from lora_rt_vllm import settings
    from lora_rt_vllm.answers import Answers

    with _MUTEX:
        if not _made:
            _made.append(Answers(settings.read()))
        return _made[0]


def forget() -> None:
    """Read the settings anew the next time, and let go of what was in use."""
    with _MUTEX:
        while _made:
            _made.pop().cache.close()
