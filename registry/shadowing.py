"""Names of a project that hide something else of the same name: said each time one is used, never silently.

What is said goes to the logger `lora_rt.registry`, once for each fact; the command line prints it on standard error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

LOGGER = logging.getLogger("lora_rt.registry")


@lru_cache(maxsize=1024)
def say_hidden(name: str, meaning: str, hidden: Sequence[str]) -> None:
    """Say that a name means something here which it does not mean elsewhere.

    Args:
        name: as it was typed.
        meaning: what it means in this folder, and which file says so.
        hidden: what it would mean in another folder, a tuple.
    """
    if hidden:
        LOGGER.warning("%r means %s in this folder; that hides %s", name, meaning, " and ".join(hidden))
