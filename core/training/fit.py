"""The loop of a run: held-out loss, steps with checkpoints, held-out loss. Publishes nothing and reads no data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lora_rt.core.step.loss import label_nll
from lora_rt.core.step.settings import Optimizer
from lora_rt.core.training.checkpoints import Checkpoints
from lora_rt.core.training.evaluations import Evaluations
from lora_rt.core.training.live import LiveLine, logging_callbacks
from lora_rt.core.training.prepare import Prepared
from lora_rt.core.training.processes import joined
from lora_rt.core.training.trainer import Collator, ModeTrainer, Sequences, TrainingDivergedError
from lora_rt.errors import LoraRtError
from lora_rt.registry import home
from lora_rt.registry.files import STATE

_OPTIMIZERS: Mapping[Optimizer, str] = {"adamw": "adamw_torch_fused", "paged-adamw-8bit": "paged_adamw_8bit"}
_CHECKPOINT_STEPS = 20  # what a power cut costs at most; writing one takes a fraction of a second


class InterruptedRunError(LoraRtError):
    """The run was stopped by the user; its checkpoint is kept."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """Held-out losses in nats per labelled token before and after, the steps of the run, and its speed.

    `losses` are those of the steps, each with its number; `held_out` those of the held-out examples, after so many.
    """

    loss_before: float
    loss_after: float
    steps: int
    tokens_per_second: float
    losses: Sequence[tuple[int, float]] = ()
    held_out: Sequence[tuple[int, float]] = ()


def fit(prepared: Prepared, folder: Path, checkpoint: Path | None) -> Fitted:
    """Run every step, or those after a checkpoint.

    Args:
        prepared: what is trained; its model is changed in place.
        folder: where checkpoints go.
        checkpoint: a whole one to go on from.

    Raises:
        LoraRtError: the loss diverged, the user interrupted, a checkpoint could not be written, or the mode failed.
    """
    processes = joined()
    before = held_out_loss(prepared)
    if checkpoint is not None and (own := prepared.objective.state) is not None:
        own.load_state_dict(load_file(checkpoint / STATE))  # the Trainer restores the adapter alone
    trainer, checkpoints, evaluations, live = make_trainer(prepared, folder)
    for callback in logging_callbacks(prepared.settings.log_to if processes.first else (), home.logs() / folder.name):
        trainer.add_callback(callback)
    try:
        with checkpoints.listening(), checkpoints.explained():
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        live.stop()
    processes.wait()  # a launcher stops all when one has ended, and the first may still be writing
    state = trainer.state
    if checkpoints.interrupted and state.global_step < state.max_steps:
        raise InterruptedRunError(
            f"stopped at step {state.global_step} of {state.max_steps}; the checkpoint is kept",
            next_step="Go on with the same command and --resume",
        )
    last = held_out_loss(prepared)
    after = evaluations.bring_back_best(last)
    if not math.isfinite(after):
        text = f"the held-out loss is {after} after the last step; nothing is published"
        raise TrainingDivergedError(text, next_step="Try a smaller --lr, or another --precision")
    share = (state.global_step - checkpoints.first_step) / max(state.max_steps, 1)
    tokens = sum(len(item.input_ids) for item in prepared.training) * prepared.settings.epochs * share
    speed = tokens / max(output.metrics["train_runtime"], 1e-9)
    losses = [(int(entry["step"]), float(entry["loss"])) for entry in state.log_history if "loss" in entry]
    held_out = [(0, before), *evaluations.losses, (state.global_step, last)]
    return Fitted(before, after, state.global_step, speed, losses, held_out)


def make_trainer(prepared: Prepared, folder: Path) -> tuple[ModeTrainer, Checkpoints, Evaluations, LiveLine]:
    """The Trainer of a run, and what listens to its steps."""
    settings, processes = prepared.settings, joined()
    epoch = -(-len(prepared.training) // settings.batch_size)
    steps = epoch * settings.epochs
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        optim=_OPTIMIZERS[prepared.portions.optimizer],
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * steps),  # of ten steps or fewer none: the first one of a warm-up changes nothing
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if processes.first else "no",
        save_steps=_CHECKPOINT_STEPS,
        report_to="none",
        run_name=settings.register,
        project="lora-rt",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=prepared.base.device.type == "cpu",
    )
    checkpoints = Checkpoints(folder, prepared.objective.state, writes=processes.first)
    kept = folder if processes.first else None
    evaluations = Evaluations(prepared.model, lambda: held_out_loss(prepared), epoch, settings.early_stop, kept)
    live = LiveLine(sum(len(item.input_ids) for item in prepared.training) * settings.epochs / max(steps, 1))
    trainer = ModeTrainer(
        model=prepared.model,
        args=arguments,
        train_dataset=Sequences(prepared.training),
        data_collator=Collator(prepared.text.pad_id),
        callbacks=[checkpoints, evaluations, live],
        objective=prepared.objective,
        mode=settings.mode,
        gates=prepared.gates,
        accumulation=prepared.portions.accumulation,
        packed=prepared.packed,
        checkpoints=checkpoints,
    )
    evaluations.log_by(trainer.log)
    trainer.remove_callback(PrinterCallback)
    return trainer, checkpoints, evaluations, live


def held_out_loss(prepared: Prepared) -> float:
    """Mean negative log-likelihood per labelled token of the held-out examples, in nats.

    As many at once as in a part of a training step: without gradients they take less than that.
    """
    collate = Collator(prepared.text.pad_id)
    rows = Sequences(sorted(prepared.held_out, key=lambda item: len(item.input_ids)))
    processes = joined()
    size = -(-prepared.settings.batch_size // (prepared.portions.accumulation * processes.count))
    model = prepared.model
    training = model.training
    model.eval()
    found = torch.zeros(2, dtype=torch.float64)  # the sum of the losses, and of the labels
    with torch.no_grad():
        for start, weight in processes.mine([(start, 1) for start in range(0, len(rows), size)], (0, 0)):
            batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            moved = send_to_device(batch, prepared.base.device)
            with prepared.gates.over(moved):
                sums, counts = label_nll(model, moved, packed=prepared.packed and not prepared.gates.acting())
            found += weight * torch.stack([sums.double().sum(), counts.double().sum()]).cpu()
    model.train(training)
    total, count = processes.summed(found).tolist()
    return float(total / count)
