"""What was measured of mixes, by base: beyond, a mix may be no text at all. Weights are never changed for it.

On the default base (`examples/registers/report.py`, `examples/compose/README.md`): sums of |w| up to 1.25 keep what the
registers gain, larger ones hurt every register; a single weight of -1 wrecks the text, one of -0.25 does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

MOST_WEIGHT: Final = 1.25
LEAST_WEIGHT: Final = -0.5
_ROUNDING = 1e-9  # a mix that was brought to the limit may add up to its last bit more
_MEASURED = ("HuggingFaceTB/SmolLM2-135M-Instruct",)


def outside(terms: Sequence[tuple[str, float]], base: str | None = None) -> Mapping[str, str]:
    """What of a mix lies outside of what was measured: kind -> a clause for people; empty where nothing does.

    Args:
        terms: each adapter as it is named, and its weight.
        base: the id of the base in use, where it is known.
    """
    doubled = [name for name, count in Counter(name for name, _ in terms).items() if count > 1]
    sums: dict[str, float] = {}
    for name, weight in terms:
        sums[name] = sums.get(name, 0.0) + weight
    below = {name: weight for name, weight in sums.items() if weight < 0}
    # Each by itself, or several that together do what one does.
    hard = {name: weight for name, weight in below.items() if weight <= LEAST_WEIGHT} or below
    negative = [f"{name}:{weight:g}" for name, weight in hard.items() if sum(hard.values()) <= LEAST_WEIGHT]
    total = sum(map(abs, sums.values()))
    found = {}
    if doubled:
        one = len(doubled) == 1
        text = "is named more than once, and its" if one else "are named more than once, and their"
        found["doubled"] = f"{' and '.join(doubled)} {text} weights add up"
    if total > MOST_WEIGHT * (1 + _ROUNDING):
        found["sum"] = f"the weights add up to {total:g}, and beyond {MOST_WEIGHT:g} texts fall apart"
    if negative:
        text = f"push{'es' * (len(negative) == 1)} hard away from what was learned, which can wreck the text"
        found["negative"] = f"{' and '.join(negative)} {text}"
    if ("sum" in found or "negative" in found) and base is not None and base not in _MEASURED:
        found["base"] = f"that was measured on {_MEASURED[0]}, and nothing was on {base}"
    return found
