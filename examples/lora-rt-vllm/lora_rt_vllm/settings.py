"""What the launcher tells the plugin through the environment, which vLLM hands on to all of its processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (vllm/config/lora.py)."""

_USUAL_RANK = 16
_USUAL_BYTES = 50 * 10**9
_PREFIX = "LORA_RT_VLLM_"


@dataclass(frozen=True, slots=True)
class Settings:
    """How compositions are answered.

    base: what `--base` is to lora-rt; "" for the model that vLLM names.
    max_rank: the largest rank that the server takes.
    registers: the names that clients may use; empty for every name that resolves.
    cache: the folder of the exports, which every worker has to see under this path.
    cache_bytes: how much they may take in all.
    dtype: of what is exported: float32, bfloat16 or float16.
    names: what the base itself is called as a `model`.
    """

    base: str
    max_rank: int
    registers: tuple[str, ...]
    cache: Path
    cache_bytes: int
    dtype: str
    names: tuple[str, ...]

    def environment(self) -> dict[str, str]:
        """The variables that `read` reads."""
        return {
            f"{_PREFIX}BASE": self.base,
            f"{_PREFIX}MAX_RANK": str(self.max_rank),
            f"{_PREFIX}REGISTERS": " ".join(self.registers),
            f"{_PREFIX}CACHE": str(self.cache),
            f"{_PREFIX}CACHE_BYTES": str(self.cache_bytes),
            f"{_PREFIX}DTYPE": self.dtype,
            f"{_PREFIX}NAMES": " ".join(self.names),
        }


def read(environment: Mapping[str, str] | None = None, arguments: Sequence[str] | None = None) -> Settings:
    """The settings of this process.

    Args:
        environment: `os.environ` if left out.
        arguments: the command line, where vLLM's own --max-lora-rank stands when nobody used the launcher.
    """
    given = os.environ if environment is None else environment

    def told(name: str, usual: str) -> str:
        return given.get(f"{_PREFIX}{name}") or usual

    return Settings(
        base=told("BASE", ""),
        max_rank=int(told("MAX_RANK", str(_rank_of(sys.argv if arguments is None else arguments)))),
        registers=tuple(told("REGISTERS", "").split()),
        cache=Path(told("CACHE", str(default_cache()))),
        cache_bytes=int(told("CACHE_BYTES", str(_USUAL_BYTES))),
        dtype=told("DTYPE", "float32"),
        names=tuple(told("NAMES", "base").split()),
    )


def default_cache() -> Path:
    """Beside what lora-rt itself keeps."""
    import lora_rt

    return Path(lora_rt.Registry().store.root).parent / "vllm"


def _rank_of(arguments: Sequence[str]) -> int:
    """vLLM's --max-lora-rank on a command line, or its default."""
    words = [word.replace("_", "-") for word in arguments]
    for flag, value in zip(words, [*words, ""][1:], strict=True):
        name, _, own = flag.partition("=")
        if name == "--max-lora-rank" and (own or value).isdecimal():
            return int(own or value)
    return _USUAL_RANK
