"""What a process of ours takes beside tensors."""

from __future__ import annotations

import psutil

_TOUCHED = 112 << 20
"""What a run of the default base has beside its tensors and its imports: tokenizer, pages of libraries, kernels."""


def process_bytes() -> int:
    """What a process of ours takes beside tensors: measured on this one, which loads no model, and `_TOUCHED`."""
    from transformers import Trainer  # noqa: F401  # what a run imports counts as well

    return int(psutil.Process().memory_info().rss) + _TOUCHED
