"""Medians, spreads and ratios of repeated measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed repeat: `tokens` is how many it computed, 0 where the time, or the peak memory, is what counts."""

    seconds: float
    tokens: int = 0
    megabytes: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second; where no tokens are counted, repeats per second."""
        return (self.tokens or 1) / self.seconds


def spread(values: Sequence[float]) -> float:
    """The interquartile range as a part of the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def ratio(samples: Sequence[Sample], reference: Sequence[Sample]) -> float | None:
    """The median of the ratios of speeds, each of two repeats that followed on one another; None without a pair.

    A ratio within one repeat is free of what slows the machine down for some seconds.
    """
    pairs = [own.speed / other.speed for own, other in zip(samples, reference, strict=False)]
    return statistics.median(pairs) if pairs else None
