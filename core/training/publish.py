"""The finished adapter: its files and its card, and the same of the fresh one, inspected before the first step."""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_rt.core.base.progress import console
from lora_rt.core.engine.topology import shapes_of
from lora_rt.core.step.adapter import described_state, write_adapter
from lora_rt.core.step.settings import SettingsError
from lora_rt.core.training.destination import Destination
from lora_rt.core.training.fit import Fitted
from lora_rt.core.training.prepare import Prepared, nearest_folder, room_needed
from lora_rt.registry.card import AdapterCard, write_card
from lora_rt.registry.durable import storage_errors
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.version import __version__

PICTURE = "loss.png"


def check_publication(prepared: Prepared, destination: Destination, run: Path) -> None:
    """Write the fresh adapter as the finished one will be, and let it pass all that the finished one has to pass.

    Raises:
        LoraRtError: it would be refused, or there is no room for the checkpoints and for it.
    """
    needed = room_needed(prepared)
    for place in (run, destination.place):
        free = shutil.disk_usage(nearest_folder(place)).free
        if needed > free:
            text = f"this run writes up to {needed / 1e6:,.1f} MB, and {place} has {free / 1e6:,.1f} MB left"
            raise SettingsError(text, next_step="Free some space, or use a smaller --r")
    with storage_errors("the adapter"), tempfile.TemporaryDirectory(prefix=".fresh-", dir=run.parent) as folder:
        write_finished(prepared, Fitted(0.0, 0.0, 0, 0.0), Path(folder))


def write_finished(prepared: Prepared, fitted: Fitted, folder: Path) -> AdapterCard:
    """Write the adapter with its card into a folder, and inspect it as everything that is loaded is inspected.

    Raises:
        RejectedAdapterError: nobody could load it.
    """
    write_adapter(prepared.model, prepared.base.identity, prepared.objective.state, folder)
    card = AdapterCard.model_validate(_facts(prepared, fitted) | {"state": described_state(folder)})
    write_card(folder, card)
    linears = shapes_of(prepared.model.get_base_model())
    inspect_adapter(folder, name=card.register, linears=linears, base=prepared.base.identity)
    return card


def draw_losses(fitted: Fitted, folder: Path) -> None:
    """Draw the losses of the run beside the card, or say once what that needs."""
    if find_spec("matplotlib") is None:
        console(stderr=True).print(f"no {PICTURE} beside the card: pip install 'lora-rt[plot]'", markup=False)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*fitted.losses, strict=True), linewidth=0.8, label="training, each step")
    axes.plot(*zip(*fitted.held_out, strict=True), marker="o", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.legend()
    figure.savefig(folder / PICTURE, dpi=120)


def _facts(prepared: Prepared, fitted: Fitted) -> dict[str, Any]:
    losses = {"held_out_nll_before": fitted.loss_before, "held_out_nll_after": fitted.loss_after}
    portions = prepared.portions
    facts = prepared.settings.card_facts()
    facts["training"] |= {
        "optimizer": portions.optimizer,
        "accumulation": portions.accumulation,
        "gradient_checkpointing": portions.checkpointing,
        "examples": prepared.examples,
        **prepared.text.record,
    }
    return facts | {
        "base": prepared.base.identity,
        "hidden_layers": prepared.objective.hidden_layers,
        "data_sha256": prepared.data_digest,
        "metrics": {name: round(loss, 4) for name, loss in losses.items()},
        "lora_rt": __version__,
    }
