"""Round trips: the answer of one direction is what the other one is given, and it may be empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def onward(direction: Callable[[Sequence[str]], list[str]], items: Sequence[str]) -> list[str]:
    """What `compress` or `expand` makes of items that were made, too: of an empty one an empty one."""
    kept = [i for i, item in enumerate(items) if item.strip()]
    made = dict(zip(kept, direction([items[i] for i in kept]), strict=True))
    return [made.get(i, "") for i in range(len(items))]
