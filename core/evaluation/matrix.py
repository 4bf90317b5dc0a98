"""The register x adapter matrix: mean negative log-likelihood per response token, over data sets and compositions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_rt.core.requests.composition import Composition, CompositionLike
from lora_rt.core.runtime import Runtime
from lora_rt.core.training.data import check_fit
from lora_rt.core.training.sources import DataError
from lora_rt.errors import LoraRtError
from lora_rt.registry.reference import BASE as BASE

Interval = tuple[float, float]
_BATCH = 16
_RESAMPLES = 2000


def ratio_interval(
    sums: NDArray[np.float64], counts: NDArray[np.int64], *, seed: int = 0, share: float = 0.95
) -> Interval:
    """The percentile bootstrap interval (Efron 1979) of sum(sums) / sum(counts), for instance nats per token.

    Whole examples are resampled; both arrays are (examples,).
    """
    rows = np.random.default_rng(seed).integers(0, len(sums), size=(_RESAMPLES, len(sums)))
    ratios = sums[rows].sum(1) / counts[rows].sum(1)
    tail = (1 - share) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class TextLosses:
    """Per example: the summed negative log-likelihood of its text in nats, and its tokens; both (examples,)."""

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Nats per response token over all examples."""
        return float(self.sums.sum() / self.tokens.sum())


@dataclass(frozen=True, slots=True)
class Matrix:
    """`losses[data][spec]`, where spec is "base" or the text of a composition."""

    losses: Mapping[str, Mapping[str, TextLosses]]

    def intervals(self) -> dict[str, dict[str, Interval]]:
        """95% bootstrap intervals of each mean, over examples."""
        return {
            data: {spec: ratio_interval(x.sums, x.tokens) for spec, x in row.items()}
            for data, row in self.losses.items()
        }

    def document(self) -> dict[str, Any]:
        """The JSON form (see the public contract)."""
        return {
            "nll": {data: {spec: x.mean for spec, x in row.items()} for data, row in self.losses.items()},
            "ci": {data: {spec: list(ci) for spec, ci in row.items()} for data, row in self.intervals().items()},
            "examples": {data: len(next(iter(row.values())).sums) for data, row in self.losses.items()},
        }


def text_losses(
    runtime: Runtime, examples: Sequence[Mapping[str, Any]], composition: CompositionLike | None
) -> TextLosses:
    """The loss of every example's "text" after its "scene" as the prompt.

    Rows of like length share a batch, so that little is spent on padding.

    Raises:
        DataError: there are no examples.
    """
    if not examples:
        raise DataError("there are no examples", next_step="Give at least one")
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["text"]))
    sums, tokens = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        losses = runtime.answer_nll(
            [examples[i]["scene"] for i in chosen], [examples[i]["text"] for i in chosen], composition
        )
        for i, loss in zip(chosen, losses, strict=True):
            sums[i], tokens[i] = float(loss.sum()), len(loss)
    return TextLosses(sums, tokens)


def evaluate(
    runtime: Runtime,
    data: Mapping[str, Sequence[Mapping[str, Any]]],
    specs: Sequence[str] | Mapping[str, Composition | None],
    advance: Callable[[str], None] = lambda _what: None,
) -> Matrix:
    """Every data set under the base and under every composition; `advance` hears of each finished cell.

    `specs` are texts of compositions, or compositions by the name of their column.

    Raises:
        DataError: examples are longer than the base's context, before any of them is read.
        LoraRtError: a loss is not a number.
    """
    text, limit = runtime.text, runtime.parts.lm.capacity
    for name, examples in data.items():
        lengths = [len(text.prompt_ids(e["scene"])) + len(text.answer_ids(e["text"])) for e in examples]
        check_fit(examples, lengths, limit, name)
    given = specs if isinstance(specs, Mapping) else {spec: spec for spec in specs}
    columns: dict[str, Composition | str | None] = {BASE: None, **given}
    losses: dict[str, dict[str, TextLosses]] = {name: {} for name in data}
    for name, examples in data.items():
        for spec, composition in columns.items():
            losses[name][spec] = text_losses(runtime, examples, composition)
            advance(f"{name} x {spec}")
    broken = [f"{spec} on {name}" for name, row in losses.items() for spec, x in row.items() if not np.isfinite(x.mean)]
    if broken:
        next_step = "Use smaller weights, or a precision with more range"
        raise LoraRtError("losses are not numbers any more", problems=broken, next_step=next_step)
    return Matrix(losses)
