"""What a training run is told, and which of a model's layers its adapter acts on."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_rt.errors import LoraRtError

ALL_LINEAR = "all-linear"


class SettingsError(LoraRtError):
    """A setting of a run that makes no sense, or does not fit the model."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """One run. The defaults are those of the source document (r 16, alpha 32, q_proj and v_proj, dropout 0.05).

    `learning_rate` is the peak of a cosine schedule with 5% warm-up; `batch_size` counts sequences per optimizer step.
    `held_out` is a file of examples that are not trained on; without one, a tenth of the data is set aside.
    """

    register: str
    mode: str
    data: Path
    base: str = "default"
    precision: str = "int4"
    device: str = "auto"
    r: int = 16
    alpha: float = 32
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.05
    learning_rate: float = 1e-3
    epochs: float = 3
    batch_size: int = 8
    seed: int = 0
    held_out: Path | None = None
    licence: str = ""
    scene_types: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raises SettingsError with everything that is out of range."""
        problems = []
        if not 1 <= self.r <= 4096:
            problems.append(f"r is {self.r}; it must be from 1 to 4096")
        if not 0 < self.alpha < 1e6:
            problems.append(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}; it must be from 0 to below 1")
        if not 0 < self.learning_rate <= 1:
            problems.append(f"the learning rate is {self.learning_rate}; it must be above 0 and at most 1")
        if not 0 < self.epochs <= 10_000:
            problems.append(f"epochs is {self.epochs}; it must be above 0")
        if not 1 <= self.batch_size <= 4096:
            problems.append(f"the batch size is {self.batch_size}; it must be at least 1")
        if problems:
            raise SettingsError("these settings can't train", problems=problems, next_step="See: lora-rt train --help")

    def fingerprint(self, data_digest: str) -> str:
        """Twelve hex digits that two runs share exactly if one can resume the other."""
        plain = {
            key: str(value)
            for key, value in asdict(self).items()
            if key not in ("data", "held_out", "device", "licence")
        }
        return hashlib.sha256(json.dumps([plain, data_digest], sort_keys=True).encode()).hexdigest()[:12]


def choose_targets(wanted: Sequence[str], linears: Sequence[str]) -> list[str]:
    """The layer names to adapt, as PEFT takes them.

    Args:
        wanted: last parts of layer names ("q_proj"), or "all-linear" for every linear layer but the output head.
        linears: full names of the model's linear layers.

    Raises:
        SettingsError: a name that the model lacks, with the names it has and the nearest one.
    """
    names = sorted({name.rsplit(".", 1)[-1] for name in linears if "." in name})
    if list(wanted) == [ALL_LINEAR]:
        return names
    problems = []
    for name in wanted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
            problems.append(f"no layer is called {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
    if problems or not wanted:
        raise SettingsError(
            f"the target modules do not fit this base, which has: {', '.join(names)}",
            problems=problems or ["none is given"],
            next_step=f"Use some of these, or {ALL_LINEAR}",
        )
    return list(dict.fromkeys(wanted))
