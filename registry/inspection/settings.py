"""What `adapter_config.json` says, after it was believed: plain values and two questions about a module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_rt.registry.inspection.patterns import TamePattern

Pattern = tuple[TamePattern, float]
_EDGE = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|lm_head|embed_out|output)$")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A LoRA configuration that may be used.

    `selects(module)` says whether PEFT would adapt a module of that path; None where that can't be told safely, and the
    tensors alone decide. `parameters` are the bare parameters that it adapts, by their paths or ends of
    them. `all_linear` says that it names no modules but every linear layer. `biases` that biases
    of the base were trained, where it has any. `saves` are the ends of names of modules that were trained as a whole,
    `tokens` the ids of trained rows by the end of their embedding's name, `invocation` the tokens that wake an aLoRA
    up. `ties` says that embedding and head are tied by force. The patterns are in the file's order, the
    first match wins, as in PEFT.
    """

    rank: int
    alpha: float
    rslora: bool
    lora_bias: bool
    all_linear: bool
    selects: Callable[[str], bool] | None
    parameters: tuple[str, ...]
    rank_pattern: Sequence[Pattern]
    alpha_pattern: Sequence[Pattern]
    biases: bool
    base_name: str
    dora: bool = False
    saves: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()
    ties: bool = False

    def adapts(self, *paths: str) -> bool:
        """Whether a module of one of these paths may have tensors."""
        return self.selects is None or any(self.selects(path) for path in paths)

    def adapts_parameter(self, path: str) -> bool:
        """Whether it adapts the parameter of this path."""
        return any(path == name or path.endswith(f".{name}") for name in self.parameters)

    def adapts_parameters_of(self, module: str) -> bool:
        """Whether it adapts some parameter of a module, which PEFT wraps once for each of them."""
        owner = module.replace(".base_layer", "")
        return any(f".{owner}".endswith(f".{name}".rpartition(".")[0]) for name in self.parameters)

    def keeps(self, module: str) -> bool:
        """Whether a module, or one that it lies in, was trained as a whole.

        PEFT asks for the end of a module's name, wherever that begins; and trains embedding and head together where
        they are tied by force.
        """
        if self.ties and any(_EDGE.search(name) for name in self.saves) and _EDGE.search(module):
            return True
        return any(f"{name}." in f"{module}." for name in self.saves)

    def is_tied(self, module: str) -> bool:
        """Whether it is adapted since the other one of embedding and head is, and both are tied by force."""
        return self.ties and _EDGE.search(module) is not None

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The ids of a module's trained rows; "" names the embedding whatever it is called."""
        named = (ids for name, ids in self.tokens.items() if name and (module == name or module.endswith(f".{name}")))
        return next(named, self.tokens.get(""))

    def rank_of(self, *paths: str) -> int:
        """The rank that the configuration gives a module, by its path here or the one in the file."""
        return int(_first(self.rank_pattern, paths, self.rank))

    def scaling_of(self, *paths: str) -> float:
        """alpha / r with the module's own r and alpha; alpha / sqrt(r) if rank-stabilised (arXiv:2312.03732)."""
        rank = self.rank_of(*paths)
        return _first(self.alpha_pattern, paths, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _first(patterns: Sequence[Pattern], paths: Sequence[str], default: float) -> float:
    return next((value for pattern, value in patterns if any(pattern.fullmatch(path) for path in paths)), default)
