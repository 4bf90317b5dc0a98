"""chrF (Popović 2015), as sacrebleu computes it."""

from __future__ import annotations

from collections.abc import Sequence

from lora_rt.errors import LoraRtError


class ChrfError(LoraRtError):
    """sacrebleu is not installed."""


def chrf(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """The score of each text against its reference, 0 to 100.

    Raises:
        ChrfError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ChrfError("chrF needs sacrebleu", next_step="Install it with: pip install 'lora-rt[chrf]'") from error
    metric = CHRF()
    return [float(metric.sentence_score(t, [r]).score) for t, r in zip(texts, references, strict=True)]
