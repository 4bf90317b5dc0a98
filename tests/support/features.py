"""What some tests need of a processor or of a build of torch, in the words by which they skip themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

FEATURES = {
    "AVX2": "or llvmlite and numba",
    "AVX-512": "registers of 512 bits",
    "AVX-512 BF16": "without it bitsandbytes does not pack 4-bit weights",
    "AMX": "tiles of bfloat16",
    "FBGEMM": "torch's products in float16",
    "oneDNN": "torch's products of weights in blocks",
    "CUDA": "a GPU",
}
_WORDS = "this machine lacks "


def lacks(feature: str) -> str:
    """The reason of a test that is left out for want of it."""
    return f"{_WORDS}{feature} ({FEATURES[feature]})"


def left_out(reasons: Iterable[str]) -> str:
    """What is lacking, and how many tests were left out for it: in one line; empty for nothing."""
    counted = Counter(reason.split(_WORDS)[1].split(" (")[0] for reason in reasons if _WORDS in reason)
    told = [f"{name} ({counted[name]})" for name in FEATURES if name in counted]
    return f"tests left out, since {_WORDS.strip()}: {', '.join(told)}" if told else ""
