"""The curve of a knob: two adapters that share one weight, `A:w B:1-w`, and what becomes of each kind of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_rt.errors import UsageError

if TYPE_CHECKING:
    from lora_rt.core.evaluation.matrix import Matrix

STEPS = 4
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Knob:
    """Two references, of which the first has the weight w and the second 1 - w."""

    first: str
    second: str

    @classmethod
    def parse(cls, text: str) -> Knob:
        """Read `A:B`.

        Raises:
            UsageError: it is not of that form.
        """
        first, _, second = text.partition(":")
        if not first or not second or ":" in second or first == second:
            raise UsageError(f"{text!r} is not a knob", next_step="Name two adapters, as in: --sweep emotion:logic")
        return cls(first, second)

    @property
    def weights(self) -> list[float]:
        """w, from 0 to 1."""
        return [step / STEPS for step in range(STEPS + 1)]

    @property
    def specs(self) -> list[str]:
        """The composition of each w."""
        return [f"{self.first}:{w:g} {self.second}:{1 - w:g}" for w in self.weights]

    def drawn(self, matrix: Matrix) -> str:
        """One line per data set: how well its texts are told at each w, the higher the better, and its best w."""
        width = max(len(name) for name in matrix.losses)
        lines = [f"{'w of ' + self.first:>{width}}  0 to 1; higher is better"]
        for name, row in matrix.losses.items():
            losses = [row[spec].mean for spec in self.specs]
            reach = max(max(losses) - min(losses), 1e-9)
            bars = "".join(_BARS[round((len(_BARS) - 1) * (max(losses) - loss) / reach)] * 2 for loss in losses)
            best = self.weights[losses.index(min(losses))]
            lines.append(f"{name:>{width}}  {bars}  best at {best:g}: {min(losses):.2f}, worst {max(losses):.2f} nats")
        return "\n".join(lines)
