"""One training run, from settings to a finished adapter."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from rich.console import Console

from lora_rt.core.base.load import LoadedBase, load_base
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import DEFAULT
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.memory.portions import pick_portions
from lora_rt.core.step.adapter import checkpointed, described_state, fresh_adapter, write_adapter
from lora_rt.core.step.loss import label_nll
from lora_rt.core.step.settings import Optimizer, SettingsError, TrainSettings
from lora_rt.core.training.checkpoints import Checkpoints, forget, newest_whole, restore_state
from lora_rt.core.training.data import Line, bad_lines, digest_of, read_lines
from lora_rt.core.training.live import LiveLine
from lora_rt.core.training.ranks import RankGates
from lora_rt.core.training.trainer import Collator, ModeTrainer, Sequences
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import IGNORE, Encoded, Objective, ObjectiveContext
from lora_rt.plugins.manager import ModeHost
from lora_rt.registry import home
from lora_rt.registry.card import AdapterCard, write_card
from lora_rt.version import __version__

_Example = tuple[Line, list[Encoded]]
_HELD_OUT_SHARE = 0.1
_OPTIMIZERS: Mapping[Optimizer, str] = {"adamw": "adamw_torch_fused", "paged-adamw-8bit": "paged_adamw_8bit"}
_CHECKPOINT_STEPS = 20  # what a power cut costs at most; writing one takes a fraction of a second


class InterruptedRunError(LoraRtError):
    """The run was stopped by the user; its checkpoint is kept."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves: the adapter's folder, its card, and held-out losses in nats per labelled token."""

    folder: Path
    card: AdapterCard
    loss_before: float
    loss_after: float
    steps: int
    tokens_per_second: float


def train(settings: TrainSettings, modes: ModeHost, folder: Path, *, resume: bool = False) -> TrainResult:
    """Train one adapter into `folder` (empty); nothing is written there before the run has ended well.

    Args:
        settings: what to train.
        modes: the loaded mode plugins; `settings.mode` must be among them.
        folder: where the finished adapter goes.
        resume: go on from the newest whole checkpoint of a run with the same settings and data.

    Raises:
        LoraRtError: settings, data, base or mode do not work out, the loss diverged, or the user interrupted.
    """
    settings.check()
    modes.require(settings.mode)
    base = load_base(settings.base, settings.precision, settings.device, for_training=True)
    text = TextFormat.of_base(base, settings.template_variables, special_tokens=settings.special_tokens)
    objective = _objective(settings, modes, base, text)
    training, held_out = _examples(settings, objective, base)
    run = _Run(settings, base, text, objective, training, held_out)
    return run.execute(folder, resume=resume)


def _objective(settings: TrainSettings, modes: ModeHost, base: LoadedBase, text: TextFormat) -> Objective:
    context = ObjectiveContext(
        register=settings.register,
        base=base.facts,
        seed=settings.seed,
        options=settings.options,
        prompt_ids=text.prompt_ids,
        answer_ids=text.answer_ids,
        turn_end=tuple(text.turn_end),
        scene_types=settings.scene_types,
    )
    objective = modes.objective(settings.mode, context)
    if objective is None:
        raise SettingsError(
            f"the mode {settings.mode!r} trains nothing",
            next_step="Use a mode with an objective; see: lora-rt plugins",
        )
    return objective


def _examples(settings: TrainSettings, objective: Objective, base: LoadedBase) -> tuple[list[_Example], list[_Example]]:
    """Training and held-out examples; without a held-out file, a tenth is drawn by the run's seed."""
    examples = _encoded(settings.data, objective, base)
    if settings.held_out is not None:
        return examples, _encoded(settings.held_out, objective, base)
    if len(examples) < 2:
        raise SettingsError(
            "one example is too few to train and to hold out", next_step="Give more, or name a --held-out file"
        )
    order = random.Random(settings.seed).sample(range(len(examples)), len(examples))
    count = max(1, round(len(examples) * _HELD_OUT_SHARE))
    aside = set(order[:count])
    return [e for i, e in enumerate(examples) if i not in aside], [examples[i] for i in sorted(aside)]


def _encoded(path: Path, objective: Objective, base: LoadedBase) -> list[_Example]:
    """The examples of a file with their sequences.

    Raises:
        DataError: lines that can't be trained on, by their numbers in the file.
    """
    limit = int(getattr(base.model.config, "max_position_embeddings", 1 << 30))
    examples, problems = [], []
    for line in read_lines(path, objective.fields, objective.check, chats=objective.chats):
        sequences = objective.encode(line.example)
        examples.append((line, sequences))
        problems += [f"line {line.number}: {problem}" for item in sequences for problem in _unfit(item, limit)]
    if problems:
        raise bad_lines(path, problems, "Shorten or remove these lines")
    return examples


def _unfit(item: Encoded, limit: int) -> list[str]:
    problems = []
    if len(item.input_ids) > limit:
        problems.append(f"{len(item.input_ids)} tokens, and the base reads {limit}")
    if all(label == IGNORE for label in item.labels):
        problems.append("no token carries loss")
    return problems


class _Run:
    def __init__(
        self,
        settings: TrainSettings,
        base: LoadedBase,
        text: TextFormat,
        objective: Objective,
        training: list[_Example],
        held_out: list[_Example],
    ) -> None:
        self.settings = settings
        self.base = base
        self.text = text
        self.objective = objective
        self.data_digest = digest_of([line.example for line, _ in training])
        self.examples = len(training)
        self.training = [item for _, sequences in training for item in sequences]
        self.held_out = [item for _, sequences in held_out for item in sequences]
        self.portions = pick_portions(settings, base, objective, [*self.training, *self.held_out])
        self.model = fresh_adapter(base, settings)
        if self.portions.checkpointing:
            checkpointed(self.model)
        self.gates = RankGates(self.model, objective, settings.r)
        if objective.state is not None:
            self.model.add_module("lora_rt_mode_state", objective.state.to(base.device))
        digest = "" if settings.base == DEFAULT else base.identity.digest
        fingerprint = settings.fingerprint(self.data_digest, self.portions.optimizer, base_digest=digest)
        self.checkpoint_folder = home.checkpoints() / f"{settings.register}-{fingerprint}"

    @libraries_silenced()
    def execute(self, folder: Path, *, resume: bool) -> TrainResult:
        if self.portions.why:
            Console(stderr=True, highlight=False).print(self.portions.why, markup=False, soft_wrap=True)
        before = self.held_out_loss()
        checkpoint = self._checkpoint(resume)
        trainer, checkpoints, live = self._trainer()
        try:
            with checkpoints.listening():
                output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            live.stop()
        if checkpoints.interrupted and trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedRunError(
                f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the checkpoint is kept",
                next_step="Go on with the same command and --resume",
            )
        after = self.held_out_loss()
        tokens = sum(len(item.input_ids) for item in self.training) * self.settings.epochs
        speed = tokens / output.metrics["train_runtime"]
        write_adapter(self.model, self.base.identity, self.objective.state, folder)
        card = self._card(before, after, folder)
        write_card(folder, card)
        forget(self.checkpoint_folder)
        return TrainResult(folder, card, before, after, trainer.state.global_step, speed)

    def _checkpoint(self, resume: bool) -> Path | None:
        found = newest_whole(self.checkpoint_folder)
        if not resume:
            forget(self.checkpoint_folder)
            return None
        if found is None:
            raise SettingsError(
                "there is no checkpoint of a run with these settings and this data",
                next_step="Start it without --resume",
            )
        restore_state(found, self.objective.state)
        return found

    def _trainer(self) -> tuple[ModeTrainer, Checkpoints, LiveLine]:
        from transformers import TrainingArguments
        from transformers.trainer_callback import PrinterCallback

        steps = -(-len(self.training) // self.settings.batch_size) * self.settings.epochs
        arguments = TrainingArguments(
            output_dir=str(self.checkpoint_folder),
            per_device_train_batch_size=self.settings.batch_size,
            optim=_OPTIMIZERS[self.portions.optimizer],
            num_train_epochs=self.settings.epochs,
            learning_rate=self.settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(0.05 * steps)),
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=self.settings.seed,
            data_seed=self.settings.seed,
            remove_unused_columns=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=_CHECKPOINT_STEPS,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=self.base.device.type == "cpu",
        )
        checkpoints = Checkpoints(self.checkpoint_folder, self.objective.state)
        live = LiveLine(sum(len(item.input_ids) for item in self.training) * self.settings.epochs / max(steps, 1))
        trainer = ModeTrainer(
            model=self.model,
            args=arguments,
            train_dataset=Sequences(self.training),
            data_collator=Collator(self.text.pad_id),
            callbacks=[checkpoints, live],
            objective=self.objective,
            gates=self.gates,
            accumulation=self.portions.accumulation,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer, checkpoints, live

    def held_out_loss(self) -> float:
        """Mean negative log-likelihood per labelled token of the held-out examples, in nats.

        As many at once as in a part of a training step: without gradients they take less than that.
        """
        collate = Collator(self.text.pad_id)
        ordered = sorted(self.held_out, key=lambda item: len(item.input_ids))
        rows = Sequences(ordered)
        size = -(-self.settings.batch_size // self.portions.accumulation)
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(rows), size):
                batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
                moved = send_to_device(batch, self.base.device)
                with self.gates.over(moved):
                    sums, counts = label_nll(self.model, moved)
                total, count = total + float(sums.sum()), count + int(counts.sum())
        self.model.train(training)
        return total / count

    def _card(self, before: float, after: float, folder: Path) -> AdapterCard:
        settings = self.settings
        return AdapterCard(
            register=settings.register,
            mode=settings.mode,
            base=self.base.identity,
            scene_types=settings.scene_types,
            hidden_layers=self.objective.hidden_layers,
            data_sha256=self.data_digest,
            seed=settings.seed,
            metrics={"held_out_nll_before": round(before, 4), "held_out_nll_after": round(after, 4)},
            licence=settings.licence,
            state=described_state(folder),
            training={
                "r": settings.r,
                "alpha": settings.alpha,
                "target_modules": ",".join(settings.target_modules),
                "dropout": settings.dropout,
                "learning_rate": settings.learning_rate,
                "epochs": settings.epochs,
                "batch_size": settings.batch_size,
                "optimizer": self.portions.optimizer,
                "accumulation": self.portions.accumulation,
                "gradient_checkpointing": self.portions.checkpointing,
                "precision": settings.precision,
                "examples": self.examples,
                **self.text.record,
                **{f"option {key}": value for key, value in settings.options.items()},
            },
            lora_rt=__version__,
        )
