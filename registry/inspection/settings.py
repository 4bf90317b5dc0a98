"""What `adapter_config.json` says, after it was believed: plain values and two questions about a module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Pattern = tuple[re.Pattern[str], float]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A LoRA configuration that may be used.

    `selects(module)` says whether PEFT would adapt a module of that path; `all_linear` that it names no modules but
    every linear layer. The patterns are in the file's order, the first match wins, as in PEFT.
    """

    rank: int
    alpha: float
    rslora: bool
    lora_bias: bool
    all_linear: bool
    selects: Callable[[str], bool]
    rank_pattern: Sequence[Pattern]
    alpha_pattern: Sequence[Pattern]
    base_name: str

    def rank_of(self, module: str) -> int:
        """The rank that the configuration gives this module."""
        return int(_first(self.rank_pattern, module, self.rank))

    def scaling_of(self, module: str) -> float:
        """alpha / r with the module's own r and alpha; alpha / sqrt(r) if rank-stabilised (arXiv:2312.03732)."""
        rank = self.rank_of(module)
        return _first(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _first(patterns: Sequence[Pattern], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
