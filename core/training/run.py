"""One training run, and what can be told of it without torch; `prepare.py` and `execute.py` do the work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training.data import read_pairs
from lora_rt.core.training.destination import Destination
from lora_rt.core.training.processes import joined
from lora_rt.core.training.runs import alone
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry import home
from lora_rt.registry.card import AdapterCard
from lora_rt.registry.durable import check_writable
from lora_rt.registry.registry import Registry

if TYPE_CHECKING:
    from lora_rt.core.training.prepare import Prepared


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves: the adapter's folder, `where` as the user calls it, its card, and what was measured.

    The losses are of the held-out examples, in nats per labelled token.
    """

    folder: Path
    where: str
    card: AdapterCard
    loss_before: float
    loss_after: float
    steps: int
    tokens_per_second: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.card.register,
            "path": str(self.folder),
            "mode": self.card.mode,
            "base": self.card.base.id,
            "nll": [self.loss_before, self.loss_after],
            "steps": self.steps,
            "tokens_per_s": round(self.tokens_per_second, 1),
        }


def train(
    settings: TrainSettings,
    modes: ModeHost | None = None,
    out: Path | None = None,
    *,
    resume: bool = False,
    ready: Callable[[Prepared], None] | None = None,
) -> TrainResult:
    """Train one adapter and publish it: into the store under the register's name, or into a folder.

    Everything that publishing checks is checked before the first step, and what can be told without torch before torch
    is imported. What fails at the end leaves the adapter and its last checkpoint where the error says.

    Args:
        settings: what to train.
        modes: the loaded mode plugins, of which `settings.mode` must be one; the installed ones by default.
        out: a new or empty folder for the adapter, which appears when the run has ended well; the store by default.
        resume: go on from the newest whole checkpoint of a run with the same settings, base and data. Where there is
            one, a run that is not to go on from it is refused.
        ready: called before the first step with what the run came to.

    Raises:
        LoraRtError: settings, data, base or mode do not work out, the loss diverged, or the user interrupted.
    """
    processes = joined()
    destination = Destination(Registry(), settings.register, out)
    modes = modes or load_modes()
    check_run(settings, modes, destination)

    from lora_rt.core.training import execute, prepare

    prepared = prepare.prepare(settings, modes)
    run = home.checkpoints() / f"{settings.register}-{prepared.fingerprint}"
    with alone(run) if processes.first else nullcontext():
        if ready is not None:
            ready(prepared)
        card, folder, where, fitted = execute.execute(prepared, destination, run, resume=resume)
    speed = fitted.tokens_per_second
    return TrainResult(folder, where, card, fitted.loss_before, fitted.loss_after, fitted.steps, speed)


def check_run(settings: TrainSettings, modes: ModeHost, destination: Destination) -> None:
    """Everything that is known without the base, and without torch.

    Raises:
        LoraRtError: settings out of range, a card that nobody could read, a place that can't be written, no such mode,
            lines without the fields that the mode's module states.
    """
    settings.check()
    fields = modes.fields(settings.mode)
    destination.check()
    check_writable(home.checkpoints())
    for file in filter(None, (settings.data, settings.held_out)):
        read_pairs(file, fields, chats=True)
