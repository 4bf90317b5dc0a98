"""However a step is portioned, it computes the same; and what is picked is what fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.base.load import LoadedBase, load_base
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.memory import portions as portions_module
from lora_rt.core.memory.live import LiveMemory
from lora_rt.core.memory.skeleton import resident
from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.core.training.fit import make_trainer
from lora_rt.core.training.prepare import examples_of, objective_of, prepare
from lora_rt.core.training.run import train
from lora_rt.core.training.trainer import Collator, split
from lora_rt.plugins.contract import IGNORE, Encoded, Objective
from lora_rt.plugins.manager import load_modes
from lora_rt.registry import home

pytestmark = pytest.mark.slow

Make = Callable[..., TrainSettings]
LENGTHS = (40, 1, 2, 30, 3, 17, 1, 5)


@pytest.fixture
def uneven(settings: Make, tmp_path: Path) -> Make:
    """Settings over texts of very different lengths: the mean of the parts' means is not the mean of all tokens."""
    data = tmp_path / "uneven.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz" * 2
    lines = [json.dumps({"scene": f"scene {n}", "text": letters[n : n + size]}) for n, size in enumerate(LENGTHS)]
    data.write_text("\n".join(lines))

    def make(**changes: Any) -> TrainSettings:
        plain = {"data": data, "held_out": data, "batch_size": len(LENGTHS), "dropout": 0.0, "epochs": 1}
        return settings(**{**plain, "target_modules": ("all-linear",), **changes})

    return make


def run_of(settings: TrainSettings) -> Any:
    """A run before its first step, its factors not zero."""
    run = prepare(settings, load_modes())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return run


def first_batch(run: Any) -> tuple[Any, dict[str, Any]]:
    """The trainer, and all its sequences as one batch."""
    trainer, *_, live = make_trainer(run, home.checkpoints() / "run")
    live.stop()
    return trainer, Collator(0)([trainer.train_dataset[index] for index in range(len(trainer.train_dataset))])


def one_step(settings: TrainSettings) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the first batch."""
    run = run_of(settings)
    trainer, batch = first_batch(run)
    torch.manual_seed(2)
    loss = float(trainer.training_step(run.model, batch))
    return loss, {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    assert max(float(gradient.abs().max()) for gradient in a.values()) > 1e-4
    for name, gradient in a.items():
        assert torch.allclose(gradient, b[name], rtol=1e-3, atol=tolerance), name


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(uneven: Make, parts: int) -> None:
    whole, gradients = one_step(uneven(accumulation=1))
    loss, in_parts = one_step(uneven(accumulation=parts))
    assert loss == pytest.approx(whole, rel=1e-6)
    assert_same(gradients, in_parts, 1e-6)


def test_the_mean_of_the_parts_means_would_be_another_loss(uneven: Make) -> None:
    """So the test above can fail: on this data the two differ by far more than it allows."""
    settings = uneven(accumulation=1)
    halves = []
    lines = settings.data.read_text().splitlines()
    for number, half in enumerate((lines[:4], lines[4:])):
        file = settings.data.with_name(f"half-{number}.jsonl")
        file.write_text("\n".join(half))
        halves.append(one_step(uneven(accumulation=1, data=file, batch_size=4))[0])
    assert abs(sum(halves) / 2 / one_step(settings)[0] - 1) > 5e-4


@pytest.mark.parametrize("precision", ["float32", "int4", "int8"])
def test_checkpointing_gives_the_same_gradients(uneven: Make, precision: str) -> None:
    chosen = {"precision": precision, "dropout": 0.2, "accumulation": 2}
    loss, gradients = one_step(uneven(gradient_checkpointing=False, **chosen))
    again, recomputed = one_step(uneven(gradient_checkpointing=True, **chosen))
    assert again == loss
    assert_same(gradients, recomputed, 1e-7)


def test_checkpointing_runs_again_under_the_gates_of_the_ranks(uneven: Make) -> None:
    chosen = {"mode": "bridge", "options": {"reserve": "0.25"}, "accumulation": 1}
    loss, gradients = one_step(uneven(gradient_checkpointing=False, **chosen))
    again, recomputed = one_step(uneven(gradient_checkpointing=True, **chosen))
    assert again == loss
    assert_same(gradients, recomputed, 1e-7)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_no_part_holds_on_to_the_memory_of_the_one_before(uneven: Make, tmp_path: Path, precision: str) -> None:
    """Four parts take what one of them takes alone, and the gradients."""
    data = tmp_path / "even.jsonl"
    data.write_text("\n".join(json.dumps({"scene": "scene", "text": "abc" * 10}) for _ in LENGTHS))
    run = run_of(uneven(data=data, held_out=data, precision=precision, accumulation=4))
    trainer, batch = first_batch(run)
    peaks = []
    for rows in (len(LENGTHS) // 4, len(LENGTHS)):
        run.model.zero_grad()
        with LiveMemory(resident(run.model)) as live:
            trainer.training_step(run.model, {key: value[:rows] for key, value in batch.items()})
        peaks.append(live.peak)
    gradients = sum(p.grad.nbytes for p in run.model.parameters() if p.grad is not None)
    assert peaks[1] < 1.1 * peaks[0] + gradients


def test_parts_keep_every_row_and_lose_only_padding() -> None:
    items = [
        {"input_ids": torch.arange(1, n + 1), "labels": torch.arange(n), "extra": {"direction": n}} for n in (5, 4, 2)
    ]
    batch = Collator(0)(items)
    parts = split(batch, 2)
    assert [tuple(part["input_ids"].shape) for part in parts] == [(2, 5), (1, 2)]
    assert [part["extra"]["direction"].tolist() for part in parts] == [[5, 4], [2]]
    labels = torch.cat([part["labels"].flatten() for part in parts])
    assert (labels != IGNORE).sum() == (batch["labels"] != IGNORE).sum()


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the memory that is free."""
    return lambda size: monkeypatch.setattr(portions_module, "free_bytes", lambda _device: size)


def read(settings: TrainSettings) -> tuple[LoadedBase, Objective, list[Encoded]]:
    """What a run picks by: its base, its mode's objective, and its examples."""
    modes = load_modes()
    base = load_base(settings.base, settings.precision, "cpu", for_training=True)
    objective = objective_of(settings, modes, base, TextFormat.of_base(base))
    training, held_out = examples_of(settings, objective, base)
    return base, objective, [item for _, items in [*training, *held_out] for item in items]


def test_what_is_picked_is_the_first_that_fits_and_is_said(
    uneven: Make, free: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = uneven(batch_size=4, target_modules=("q_proj",))
    base, objective, sequences = read(chosen)
    need = {
        way: portions_module.bytes_needed(chosen, base, sequences, "adamw", *way)
        for way in ((1, False), (2, False), (4, False), (1, True))
    }
    assert need[1, False] > need[2, False] > need[4, False]
    assert need[1, False] > need[1, True]
    for size, parts, checkpointing, said in (
        (need[1, False] * 2, 1, False, ""),
        (int(need[2, False] / 0.79), 2, False, "picked the batch in 2 parts"),
        (1000, 4, True, "may not fit"),
    ):
        free(size)
        picked = portions_module.pick_portions(chosen, base, objective, sequences)
        assert (picked.accumulation, picked.checkpointing, picked.optimizer) == (parts, checkpointing, "adamw")
        assert said in picked.why
        assert bool(said) == bool(picked.why)
    free(int(need[2, False] / 0.79))
    (tmp_path / "out").mkdir()
    card = train(chosen, load_modes(), tmp_path / "out").card
    assert (card.training["accumulation"], card.training["gradient_checkpointing"]) == (2, False)
    err = capsys.readouterr().err
    assert "memory:" in err
    assert "picked the batch in 2 parts" in err


def test_what_the_user_says_is_not_overruled(uneven: Make, free: Callable[[int], None], tmp_path: Path) -> None:
    free(1000)
    out = tmp_path / "out"
    out.mkdir()
    card = train(uneven(accumulation=2, gradient_checkpointing=False), load_modes(), out).card
    assert (card.training["accumulation"], card.training["gradient_checkpointing"]) == (2, False)


def test_a_mode_with_a_loss_of_its_own_is_never_run_in_parts(uneven: Make, free: Callable[[int], None]) -> None:
    own = {"mode": "bridge", "options": {"prompt-loss": "0.1"}}
    free(1000)
    settings = uneven(**own)
    base, objective, sequences = read(settings)
    picked = portions_module.pick_portions(settings, base, objective, sequences)
    assert (picked.accumulation, picked.checkpointing) == (1, True)
    with pytest.raises(SettingsError, match="loss of its own"):
        portions_module.pick_portions(uneven(**own, accumulation=2), base, objective, sequences)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"accumulation": 3}, "must divide the batch size"),
        ({"optimizer": "sgd"}, "no optimizer 'sgd'"),
        ({"optimizer": "paged-adamw-8bit"}, "cpu has no paged optimizer"),
    ],
)
def test_portions_that_cannot_be_are_refused(uneven: Make, tmp_path: Path, changes: Any, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        train(uneven(**changes), load_modes(), tmp_path / "out")
    assert named in str(caught.value)


def test_portions_and_places_do_not_change_what_a_run_is_and_everything_else_does() -> None:
    def of(base_is: str = "b" * 64, data_is: str = "d" * 64, by: Any = "adamw", **changes: Any) -> str:
        plain: dict[str, Any] = {"register": "letters", "mode": "output-only", "data": Path("x.jsonl")}
        return TrainSettings(**{**plain, **changes}).fingerprint(data_is, by, base_digest=base_is)

    same = [{"accumulation": 2}, {"gradient_checkpointing": True}, {"data": Path("y.jsonl")}, {"base": "./elsewhere"}]
    assert {of(**changes) for changes in same} == {of()}
    differing = [
        of("c" * 64),
        of(data_is="e" * 64),
        of(by="paged-adamw-8bit"),
        of(seed=1),
        of(r=8),
        of(precision="int8"),
    ]
    assert of() not in differing
    assert len(set(differing)) == len(differing)
