"""A prepared run: fitted, then published. What was interrupted goes on; what failed at the end is published later."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_rt.core.base.progress import console
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.step.settings import SettingsError
from lora_rt.core.training.destination import Destination
from lora_rt.core.training.fit import Fitted, fit
from lora_rt.core.training.prepare import Prepared
from lora_rt.core.training.processes import joined
from lora_rt.core.training.publish import check_publication, draw_losses, write_finished
from lora_rt.core.training.runs import forget, newest_whole
from lora_rt.errors import LoraRtError
from lora_rt.registry.card import AdapterCard
from lora_rt.registry.durable import storage_errors
from lora_rt.registry.errors import StoreError
from lora_rt.registry.files import CARD

_FINISHED = "adapter"
"""The folder of an adapter beside its checkpoint, until it is published."""
_PUBLISH = "The same command with --resume publishes it, with --resume --out DIR into that folder"


@libraries_silenced()
def execute(
    prepared: Prepared, destination: Destination, run: Path, *, resume: bool
) -> tuple[AdapterCard, Path, str, Fitted]:
    """Fit, publish, and tell of it in all processes: the card, the folder, how the user calls it, what was measured.

    Args:
        run: the folder of its checkpoints.
        resume: as for `train`.

    Raises:
        LoraRtError: see `train`.
    """
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
    published = _publish(prepared, fitted, destination, run)
    forget(run)
    return processes.shared((*published, fitted))


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
