"""What hooks may return besides None: every check gives the value that core works with, or raises ResultError.

Here is what needs no torch; what holds tensors is in `tensors.py`.
"""

from __future__ import annotations

import math

from lora_rt.plugins.contract import ComposeContext


class ResultError(Exception):
    """A hook returned what its contract does not allow."""


def checked_weights(value: object, context: ComposeContext) -> list[float]:
    """One finite number per index in `context.mine`."""
    try:
        weights = [float(item) for item in value]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ResultError(f"it returned a {type(value).__name__} that is not a list of numbers") from error
    if len(weights) != len(context.mine) or not all(math.isfinite(weight) for weight in weights):
        raise ResultError(f"it returned {weights} for {len(context.mine)} terms")
    return weights


def checked_static(value: object) -> str:
    """A reason, or an empty one."""
    if not isinstance(value, str):
        raise ResultError(f"it returned a {type(value).__name__}, not a text")
    return value
