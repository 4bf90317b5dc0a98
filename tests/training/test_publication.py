"""A finished training is never thrown away: what publishing refuses is refused first, and what fails last is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.core.training.run import train
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import IGNORE, Encoded, Example, Objective, ObjectiveContext, hookimpl
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry import home
from lora_rt.registry.card import read_card
from lora_rt.registry.durable import check_new_folder
from lora_rt.registry.errors import RejectedAdapterError, StorageError, StoreError
from lora_rt.registry.store import Store
from support.forks import Forks
from support.tiny import Zoo, mode_host

pytestmark = pytest.mark.slow

Make = Callable[..., TrainSettings]


class During(Objective):
    """Output-only, and something that happens in the first step."""

    happens: ClassVar[Callable[[], object]]

    def __init__(self, context: ObjectiveContext) -> None:
        self.context, self.steps = context, 0

    def encode(self, example: Example) -> list[Encoded]:
        answer = self.context.answer_ids(example["text"])
        return [Encoded([1, *answer], [IGNORE, *answer])]

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, extra: Mapping[str, torch.Tensor]) -> None:
        self.steps += 1
        if self.steps == 1:
            During.happens()


def while_training(happens: Callable[[], object]) -> ModeHost:
    """Modes with one, "during", that lets this happen in the first step of a run."""
    During.happens = staticmethod(happens)

    class Hooks:
        @hookimpl
        def lora_rt_objective(context: ObjectiveContext) -> Objective:
            return During(context)

    return mode_host(during=Hooks)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"r": 1, "alpha": 2000}, "the scaling is 2000"),
        ({"licence": "MIT\nand more"}, "licence: it holds a line break"),
        ({"scene_types": ("a\x1b[31m",)}, "it holds a line break or another character"),
        ({"options": {"x": "a\nb"}}, "it holds a line break"),
        ({"register": "../../x"}, "'../../x' is not a name"),
        ({"seed": -1}, "it must be from 0 to 4294967295"),
        ({"seed": 2**32}, "it must be from 0 to 4294967295"),
        ({"r": -4}, "r is -4"),
        ({"precision": "int3"}, "no precision 'int3'"),
    ],
)
def test_what_no_adapter_can_be_published_with_is_refused_first(settings: Make, changes: Any, named: str) -> None:
    with pytest.raises(LoraRtError) as caught:
        train(settings(**changes), while_training(pytest.fail))
    assert named in str(caught.value)


def test_nothing_heavy_is_imported_for_an_answer_that_needs_no_model(
    settings: Make, tmp_path: Path, light: Forks
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"scene": "a", "text": "b"}\n{\n')
    (tmp_path / "file").write_text("")
    data = str(settings().data)
    cases = [
        ["--data", str(tmp_path / "bad.jsonl")],
        ["--data", data, "--r", "-4"],
        ["--data", data, "--mode", "no-such-mode"],
        ["--data", data, "--out", str(tmp_path / "file" / "adapter")],
        ["--data", data, "--licence", "MIT\nmore"],
        ["--data", data, "--base", str(tmp_path / "nowhere")],
        ["--data", data, "--alpha", "1e5"],
    ]
    done = [light(["train", "letters", "--mode", "output-only", *case]) for case in cases]
    codes = [1, 2, 2, 1, 2, 1, 2]  # what settings alone can tell is usage
    assert [(run.code, run.heavy) for run in done] == [(code, frozenset()) for code in codes]


def test_a_name_that_differs_by_case_is_refused_before_the_first_step(settings: Make) -> None:
    train(settings(epochs=1), load_modes())
    with pytest.raises(StoreError, match="differs only by case"):
        train(settings(register="Letters", mode="during"), while_training(pytest.fail))


def test_a_state_that_no_adapter_may_have_is_refused_before_the_first_step(settings: Make) -> None:
    class Large:
        @hookimpl
        def lora_rt_objective(context: ObjectiveContext) -> Objective:
            objective = During(context)
            objective.state = nn.Linear(1, 1)
            objective.state.weight.data.fill_(1e9)
            return objective

    During.happens = staticmethod(pytest.fail)
    with pytest.raises(RejectedAdapterError) as caught:
        train(settings(mode="large"), mode_host(large=Large))
    assert "mode.safetensors" in caught.value.problems[0]


def test_a_name_that_is_taken_while_it_trains_costs_nothing(settings: Make, tmp_path: Path) -> None:
    def take() -> None:
        train(settings(register="LETTERS", epochs=1), load_modes())

    modes = while_training(take)
    with pytest.raises(StoreError, match="the training is done, but its adapter is not published") as caught:
        train(settings(mode="during"), modes)
    (kept,) = home.checkpoints().glob("letters-*/adapter")
    assert f"the adapter is kept in {kept}" in caught.value.next_step
    assert "--resume publishes it" in caught.value.next_step
    assert read_card(kept) is not None
    During.happens = staticmethod(pytest.fail)
    with pytest.raises(SettingsError, match=f"not published yet: it is kept in {kept}.*--resume --out DIR.*remove"):
        train(settings(mode="during"), modes, tmp_path / "out")
    again = train(settings(mode="during"), modes, tmp_path / "out", resume=True)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).exists()
    assert again.steps == 12
    assert not list(home.checkpoints().iterdir())


def test_a_folder_that_can_no_longer_be_made_costs_nothing(settings: Make, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def spoil() -> None:
        place.rmdir()
        place.write_text("")

    with pytest.raises(StoreError, match="its adapter is not published"):
        train(settings(mode="during"), while_training(spoil), place / "out")
    (kept,) = home.checkpoints().glob("letters-*/adapter")
    assert {file.name for file in kept.iterdir()} >= {"adapter_model.safetensors", "register.json"}


def test_the_same_run_twice_at_once_is_told_in_one_line(settings: Make) -> None:
    said: list[LoraRtError] = []

    def again() -> None:
        with pytest.raises(SettingsError, match="is going on in another process") as caught:
            train(settings(mode="during"), modes)
        said.append(caught.value)

    modes = while_training(again)
    assert train(settings(mode="during"), modes).steps == 12
    assert len(said) == 1
    assert not list(home.checkpoints().iterdir())


@pytest.mark.parametrize(
    ("limit", "said"),  # the fresh adapter's configuration has 1 kB, its weights 0.2 MB, the optimizer's state 0.8
    [
        (500, "the adapter can't be written"),
        (20_000, "the adapter can't be written"),
        (500_000, "the run is stopped: a checkpoint can't be written"),
    ],
)
def test_a_disk_that_is_full_stops_the_run_with_one_line(settings: Make, warm: Forks, limit: int, said: str) -> None:
    chosen = settings()
    command = ["train", "letters", "--mode", "output-only", "--data", str(chosen.data), "--base", chosen.base]
    command += ["--precision", "float32", "--r", "64", "--target-modules", "all-linear", "--epochs", "1"]

    done = warm(command, largest=limit)
    assert done.code == 1
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_run_of_another_base_is_not_resumed(settings: Make, zoo: Zoo, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    link = tmp_path / "base"
    link.symlink_to(zoo.base("llama"))
    with pytest.raises(StoreError):
        train(
            settings(base=str(link), mode="during"), while_training(lambda: place.rmdir() or place.touch()), place / "x"
        )
    link.unlink()
    link.symlink_to(zoo.base("llama", initializer_range=0.2))
    with pytest.raises(SettingsError, match="this base"):
        train(settings(base=str(link), mode="during"), while_training(pytest.fail), tmp_path / "y", resume=True)


def test_the_store_is_left_as_it_was_by_a_run_that_is_refused(settings: Make) -> None:
    with pytest.raises(SettingsError):
        train(settings(r=0), load_modes())
    assert Store().installed() == []


def test_a_home_of_nobody_is_no_place_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="no home of a user called 'nobodyx'"):
        check_new_folder(Path("~nobodyx/x"))
    check_new_folder(Path("./~nobodyx").absolute())
    assert list(tmp_path.iterdir()) == []
