"""The mode: what a pair becomes, what its options do, and that its gate is the same in training and afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rt.core.runtime import Runtime
from lora_rt.core.training.run import TrainResult
from lora_rt.plugins.contract import (
    IGNORE,
    BaseFacts,
    GateContext,
    Objective,
    ObjectiveContext,
    OptionError,
    direction_of,
    prompt_for,
)
from lora_rt.plugins.manager import load_modes
from lora_rt.plugins.modes.bridge.hyper import HyperBridge
from support.pairs import DOCUMENT, PAIRS

pytestmark = pytest.mark.slow

FACTS = BaseFacts("tiny", None, "", "float32", 2, 64, 4, 2, 16, 1 << 21)


def objective(**options: str) -> Objective:
    """The objective under options, over a base whose tokens are code points; 0 opens an answer and 1 ends it."""
    context = ObjectiveContext(
        register="bridge",
        base=FACTS,
        seed=0,
        options={key.replace("_", "-"): value for key, value in options.items()},
        prompt_ids=lambda text: [*map(ord, text), 0],
        answer_ids=lambda text: [*map(ord, text), 1],
    )
    made = load_modes().objective("bridge", context)
    assert made is not None
    return made


def read(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_a_pair_becomes_both_directions_with_loss_on_the_answers_alone() -> None:
    expand, compress = objective(prior="0").encode(DOCUMENT)
    for item, direction, given, wanted in (
        (expand, "expand", DOCUMENT["scene"], DOCUMENT["text"]),
        (compress, "compress", DOCUMENT["text"], DOCUMENT["scene"]),
    ):
        prompt, answer = prompt_for(direction, given) + "\0", wanted + "\1"  # type: ignore[arg-type]
        assert read(list(item.input_ids)) == prompt + answer
        assert list(item.labels) == [IGNORE] * len(prompt) + [ord(letter) for letter in answer]


def test_the_words_of_a_prompt_tell_its_direction() -> None:
    assert direction_of(prompt_for("compress", DOCUMENT["text"])) == "compress"
    assert direction_of(prompt_for("compress", "")) == "compress"
    assert direction_of(prompt_for("expand", DOCUMENT["scene"])) == "expand"
    assert direction_of(None) == "expand"


def test_a_scene_is_asked_for_as_it_is_so_that_a_bridge_composes_with_the_registers() -> None:
    assert prompt_for("expand", DOCUMENT["scene"]) == DOCUMENT["scene"]


def test_a_weight_of_zero_leaves_a_direction_out() -> None:
    assert [item.extra["direction"] for item in objective(compress_weight="0").encode(DOCUMENT)] == [0]
    assert {item.extra["direction"] for item in objective(expand_weight="0").encode(DOCUMENT)} == {1}


def test_the_prior_is_learned_from_the_share_of_pairs_that_was_asked_for() -> None:
    pairs = [{"scene": "a", "text": f"text {number}"} for number in range(400)]
    for share in (0.0, 0.25, 1.0):
        made = objective(prior=str(share))
        priors = sum(len(made.encode(pair)) - 2 for pair in pairs)
        assert priors == pytest.approx(share * 400, abs=40 if share == 0.25 else 0)
    assert read(list(made.encode(pairs[0])[2].input_ids)) == prompt_for("compress", "") + "\0a\1"


def test_a_line_with_a_direction_is_trained_on_in_that_direction_alone() -> None:
    made = objective(prior="1", cycle_weight="0.5")
    (only,) = made.encode({**DOCUMENT, "direction": "compress"})
    assert (only.extra["direction"], only.extra["weight"]) == (1, 0.5)
    assert made.check({**DOCUMENT, "direction": "sideways"}) == ["\"direction\" is 'sideways', not expand or compress"]
    assert made.check(DOCUMENT) == made.check({**DOCUMENT, "direction": "expand"}) == []


def test_the_loss_is_the_weighted_mean_over_tokens() -> None:
    made = objective(expand_weight="2", prompt_loss="0.5")
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, 4, 5, 6], [1, 2, 3, IGNORE]])
    extra = {"direction": torch.tensor([0, 1]), "start": torch.tensor([2, 2]), "weight": torch.tensor([2.0, 1.0])}
    losses = -logits.log_softmax(-1)
    terms = [(2 * 0.5, 0, 0, 4), (2, 0, 1, 5), (2, 0, 2, 6), (0.5, 1, 0, 2), (1, 1, 1, 3)]
    expected = sum(w * losses[row, place, token] for w, row, place, token in terms) / sum(term[0] for term in terms)
    loss = made.loss(logits, labels, extra)
    assert loss is not None
    torch.testing.assert_close(loss, expected)


def test_where_all_tokens_weigh_the_same_the_runtimes_own_loss_is_used() -> None:
    assert type(objective()).loss is Objective.loss
    assert type(objective(compress_weight="0")).loss is Objective.loss
    assert type(objective(compress_weight="2")).loss is not Objective.loss


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reserve": "0.6"}, "reserve is 0.6"),
        ({"prompt_loss": "-1"}, "prompt-loss is -1"),
        ({"expand_weight": "0", "compress_weight": "0"}, "nothing would be trained"),
        ({"piror": "1"}, "near is 'prior'"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, str], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        objective(**options)
    assert said in str(caught.value)


def gate_of(state: Mapping[str, torch.Tensor], prompts: list[str | None], rank: int = 8) -> Any:
    ids = torch.zeros(len(prompts), 3, dtype=torch.long)
    context = GateContext(
        adapter="bridge",
        card={},
        state=state,
        base=FACTS,
        rank=rank,
        input_ids=ids,
        positions=ids,
        prompt_lengths=torch.full((len(prompts),), 3),
        active=[True] * len(prompts),
        scene_types=[None] * len(prompts),
        hidden=lambda: torch.zeros(len(prompts), 3, 64),
        prompts=prompts,
    )
    return load_modes().gate("bridge", context)


def test_without_reserved_ranks_there_is_no_gate() -> None:
    assert gate_of({}, ["a scene"]) is None


def test_reserved_ranks_are_off_in_the_other_direction_and_the_rest_is_shared() -> None:
    gate = gate_of({"reserve": torch.tensor(0.25)}, ["a scene", prompt_for("compress", "a text"), None])
    expand, compress = [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]
    assert gate.ranks.squeeze().tolist() == [expand, compress, expand]


def test_training_and_inference_gate_alike() -> None:
    made = objective(reserve="0.25")
    masks = made.ranks({"direction": torch.tensor([0, 1])}, 8)
    assert masks is not None
    gate = gate_of({"reserve": torch.tensor(0.25)}, ["a scene", prompt_for("compress", "a text")])
    assert torch.equal(masks, gate.ranks[:, 0])


def test_ranks_reserved_to_a_direction_that_is_not_trained_stay_untouched(
    train_bridge: Callable[..., TrainResult],
) -> None:
    from safetensors.torch import load_file

    folder = train_bridge(options={"reserve": "0.25", "compress-weight": "0"}, epochs=2).folder
    tensors = load_file(folder / "adapter_model.safetensors")
    b = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert all(not tensor[:, -2:].any() for tensor in b)
    assert any(tensor[:, :2].any() for tensor in b)


def test_the_loss_of_training_is_the_loss_of_the_runtime_under_the_gate(learned: tuple[Runtime, Path]) -> None:
    """The held-out loss that training measured (PEFT and hooks) equals that of the engine (plans and gates)."""
    runtime, folder = learned
    bridge = HyperBridge(runtime, str(folder))
    given, answers = [p["scene"] for p in PAIRS], [p["text"] for p in PAIRS]
    nats = -sum(bridge.log_likelihoods("expand", given, answers) + bridge.log_likelihoods("compress", answers, given))
    nats -= sum(bridge.log_likelihoods("compress", [""] * len(given), given))
    tokens = sum(len(text) + 1 for text in answers) + 2 * sum(len(scene) + 1 for scene in given)
    card = runtime.adapters[folder.name].card
    assert card is not None
    assert nats / tokens == pytest.approx(card.metrics["held_out_nll_after"], abs=0.02)
