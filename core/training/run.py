"""One training run: checked, prepared, fitted, published. What failed at the end can be published later."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_rt.core.base.progress import console
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.core.training.data import read_pairs
from lora_rt.core.training.destination import Destination
from lora_rt.core.training.processes import joined
from lora_rt.core.training.runs import alone, forget, newest_whole
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry import home
from lora_rt.registry.card import AdapterCard
from lora_rt.registry.durable import check_writable, storage_errors
from lora_rt.registry.errors import StoreError
from lora_rt.registry.files import CARD
from lora_rt.registry.store import Store

if TYPE_CHECKING:
    from lora_rt.core.training.fit import Fitted
    from lora_rt.core.training.prepare import Prepared

_FINISHED = "adapter"
"""The folder of an adapter beside its checkpoint, until it is published."""
_PUBLISH = "The same command with --resume publishes it, with --resume --out DIR into that folder"


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
    destination = Destination(Store(), settings.register, out)
    modes = modes or load_modes()
    check_run(settings, modes, destination)

    from lora_rt.core.training.prepare import prepare

    prepared = prepare(settings, modes)
    run = home.checkpoints() / f"{settings.register}-{prepared.fingerprint}"
    with alone(run) if processes.first else nullcontext():
        if ready is not None:
            ready(prepared)
        return _execute(prepared, destination, run, resume=resume)


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


@libraries_silenced()
def _execute(prepared: Prepared, destination: Destination, run: Path, *, resume: bool) -> TrainResult:
    from lora_rt.core.training.fit import fit
    from lora_rt.core.training.publish import check_publication

    processes = joined()
    checkpoint = processes.shared((_checkpoint(run, resume),) if processes.first else None)[0]
    if processes.first:
        check_publication(prepared, destination, run)
    if prepared.portions.why:
        console(stderr=True).print(prepared.portions.why, markup=False, soft_wrap=True)
    if processes.sharded:
        text = f"FSDP: each of {processes.count} processes keeps its part of the base's blocks"
        console(stderr=True).print(text, markup=False, soft_wrap=True)
    fitted = fit(prepared, run, checkpoint)
    if not processes.first:
        return processes.shared(None)
    card, folder, where = _publish(prepared, fitted, destination, run)
    forget(run)
    speed = fitted.tokens_per_second
    result = TrainResult(folder, where, card, fitted.loss_before, fitted.loss_after, fitted.steps, speed)
    return processes.shared(result)


def _checkpoint(run: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from. Without `resume` there is to be none: what cost hours is not removed unasked.

    Raises:
        SettingsError: there is none, or one that nobody asked for.
    """
    found = newest_whole(run)
    if found is None and not resume:
        forget(run)
    elif found is None:
        raise SettingsError(
            "there is no checkpoint of a run with these settings, this base and this data",
            next_step="Start it without --resume",
        )
    elif not resume:
        anew = f"to train it anew, remove the folder {run}"
        if (run / _FINISHED / CARD).exists():
            text = f"this run has ended before, and its adapter is not published yet: it is kept in {run / _FINISHED}"
            raise SettingsError(text, next_step=f"{_PUBLISH}; {anew}")
        text = f"this run has begun before: its checkpoint at step {found.name.rpartition('-')[2]} is there"
        raise SettingsError(text, next_step=f"The same command with --resume goes on from it; {anew}")
    return found


def _publish(prepared: Prepared, fitted: Fitted, destination: Destination, run: Path) -> tuple[AdapterCard, Path, str]:
    """Write the adapter beside its checkpoint, then bring it to its place.

    Raises:
        StoreError: it can't be written or published; it is kept, or at least its checkpoint is.
    """
    from lora_rt.core.training.publish import draw_losses, write_finished

    finished = run / _FINISHED
    shutil.rmtree(finished, ignore_errors=True)
    written = False
    try:
        with storage_errors("the adapter"):
            finished.mkdir(parents=True)
            card = write_finished(prepared, fitted, finished)
            draw_losses(fitted, finished)
            written = True
            return card, *destination.publish(finished)
    except (LoraRtError, OSError) as error:
        kept = f"the adapter is kept in {finished}" if written else f"its checkpoint is kept in {run}"
        why = error.message if isinstance(error, LoraRtError) else str(error)
        raise StoreError(
            f"the training is done, but its adapter is not published: {why}",
            next_step=f"Nothing is lost: {kept}. {_PUBLISH}",
            problems=error.problems if isinstance(error, LoraRtError) else (),
        ) from error
