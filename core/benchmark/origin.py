"""Where a run's base comes from, as plain data that another process can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_rt.core.benchmark.workloads import refuse_unknown

if TYPE_CHECKING:
    from lora_rt.core.base.load import LoadedBase

SIZES = ("tiny", "7b", "13b")


def check_size(size: str) -> None:
    """Raises WorkloadError where there is no random base of such a size."""
    refuse_unknown("random base", [] if size in SIZES else [size], SIZES)


@dataclass(frozen=True, slots=True)
class Origin:
    """The options --base, --precision and --device, or the size of a random base."""

    base: str = "default"
    precision: str = "int4"
    device: str = "auto"
    random: str | None = None

    def load(self) -> LoadedBase:
        """The base in memory.

        Raises:
            LoraRtError: with what to do next.
        """
        if self.random is not None:
            from lora_rt.core.benchmark.random_base import random_base

            return random_base(self.random, self.precision, self.device)
        from lora_rt.core.base.load import load_base

        return load_base(self.base, self.precision, self.device)
