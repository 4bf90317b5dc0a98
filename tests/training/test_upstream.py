"""Facts about transformers' Trainer and PEFT that training stands on. A failure here names what an upgrade changed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback, TrainerControl, TrainerState
from transformers.trainer_pt_utils import get_length_grouped_indices

from support.architectures.shrink import random_model, tiny_config

pytestmark = pytest.mark.slow


def test_the_trainer_asks_its_own_method_for_the_order_of_the_rows(tmp_path: Path) -> None:
    class Backwards(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> list[int]:
            return [2, 1, 0]

    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, use_cpu=True, remove_unused_columns=False
    )
    rows = [{"x": torch.tensor(number)} for number in range(3)]
    trainer = Backwards(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=rows)
    assert [int(batch["x"]) for batch in trainer.get_train_dataloader()] == [2, 1, 0]


def test_rows_are_grouped_by_length_from_a_generator_of_ours() -> None:
    lengths = [3, 9, 1, 7, 5, 2, 8, 4]
    first, again = (
        get_length_grouped_indices(lengths, 2, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert first == again
    assert sorted(first) == list(range(8))
    assert first[0] == 1  # the longest, so that memory runs out in the first step or never


def test_a_run_saves_after_its_last_step(tmp_path: Path) -> None:
    """What is published later stands in a checkpoint: nothing that fails after the last step can cost the run."""
    arguments = TrainingArguments(output_dir=str(tmp_path), save_strategy="steps", save_steps=20, use_cpu=True)
    state = TrainerState(global_step=7, max_steps=7, save_steps=20)
    control = DefaultFlowCallback().on_step_end(arguments, state, TrainerControl())
    assert control.should_save


def test_the_trainer_hands_a_step_to_a_method_of_this_form() -> None:
    assert list(inspect.signature(Trainer.training_step).parameters)[:3] == ["self", "model", "inputs"]


@pytest.mark.parametrize(
    ("kind", "names", "parameters"), [("mixtral", ["w1", "w3"], True), ("llama", ["q_proj"], False)]
)
def test_peft_turns_the_names_of_old_experts_into_parameters_of_the_fused_ones(
    kind: str, names: list[str], parameters: bool
) -> None:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=names, task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = random_model(tiny_config(kind))
    convert_peft_config_for_transformers(config, model=model, conversions=None)
    assert bool(config.target_parameters) == parameters
