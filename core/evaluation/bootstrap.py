"""Percentile bootstrap intervals (Efron 1979), resampling whole examples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
_RESAMPLES = 2000


def ratio_interval(
    sums: NDArray[np.float64], counts: NDArray[np.int64], *, seed: int = 0, share: float = 0.95
) -> Interval:
    """The interval of sum(sums) / sum(counts), e.g. nats per token; both arrays (examples,)."""
    rows = np.random.default_rng(seed).integers(0, len(sums), size=(_RESAMPLES, len(sums)))
    ratios = sums[rows].sum(1) / counts[rows].sum(1)
    tail = (1 - share) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)
