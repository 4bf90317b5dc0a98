"""Caches with room: what transformers' own layers show, without copying what was there."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.forward.growing_cache import GrowingLayer, GrowingWindow, let_grow
from lora_rt.core.runtime import Runtime
from support.tiny import Zoo, config_of, random_model

WINDOW = 6


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """As in every pass that keeps a cache."""
    with torch.no_grad():
        yield


def states(columns: int, size: int = 4, rows: int = 2) -> Tensor:
    return torch.rand(rows, 3, columns, size)


def pairs() -> list[tuple[Any, Any]]:
    return [(GrowingLayer(), DynamicLayer()), (GrowingWindow(WINDOW), DynamicSlidingWindowLayer(WINDOW))]


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_with_room_shows_what_transformers_own_shows(seed: int) -> None:
    """Steps, pieces of several tokens, long ones, rows that change; keys and values of different sizes."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for mine, own in pairs():
        held: list[tuple[Tensor, Tensor]] = []  # what somebody has kept of it, and what it was
        for _ in range(60):
            columns = rng.choice([1, 1, 1, 1, 2, 5, 40])
            rows = len(own.keys) if own.is_initialized else 2
            keys, values = states(columns, rows=rows), states(columns, size=6, rows=rows)
            for one, other in zip(mine.update(keys, values), own.update(keys, values), strict=True):
                assert torch.equal(one, other)
                held.append((one, one.clone()))
            assert torch.equal(mine.keys, own.keys)
            assert torch.equal(mine.values, own.values)
            assert mine.get_seq_length() == own.get_seq_length()
            assert mine.get_mask_sizes(1) == own.get_mask_sizes(1)
            if rng.random() < 0.1:  # as rows leave and join
                chosen = torch.tensor(rng.choices(range(rows), k=rng.randint(1, 3)))
                for layer in (mine, own):
                    layer.batch_select_indices(chosen)
        assert all(torch.equal(one, then) for one, then in held)


def test_a_step_writes_its_own_columns_alone() -> None:
    for layer, _ in pairs():
        layer.update(states(3), states(3))
        shown = [layer.update(states(1), states(1))[0] for _ in range(100)]  # held, so that no place is used again
        places = [one.untyped_storage().data_ptr() for one in shown]
        assert 3 <= len(set(places)) <= 5  # new ones every 32 columns


def test_what_was_made_in_inference_mode_is_not_written_to_outside_of_it() -> None:
    for mine, own in pairs():
        with torch.inference_mode():
            first = states(3), states(3)
            mine.update(*first), own.update(*first)
        step = states(1), states(1)
        assert torch.equal(mine.update(*step)[0], own.update(*step)[0])


def test_a_layer_that_was_copied_shows_its_own_tokens() -> None:
    for layer, _ in pairs():
        layer.update(states(3), states(3))
        layer.update(states(1), states(1))
        other = copy.copy(layer)
        one, two = states(1), states(1)
        mine, its = layer.update(one, one)[0], other.update(two, two)[0]
        assert torch.equal(mine[:, :, -1:], one)
        assert torch.equal(its[:, :, -1:], two)


@torch.enable_grad()
def test_gradients_go_the_way_of_transformers_own() -> None:
    """Also where only the values, or what looks at the keys, want one."""
    for layer, _ in pairs():
        values = states(2).requires_grad_()
        total = torch.zeros(())
        looked, said = layer.update(states(2), values)
        for _ in range(3):
            total = total + (states(1).requires_grad_() * looked[:, :, -1:]).exp().sum() + said.exp().sum()
            looked, said = layer.update(states(1), states(1))
        total.backward()
        assert values.grad is not None


def test_an_update_that_fails_changes_nothing() -> None:
    for mine, own in pairs():
        first = states(3), states(3)
        mine.update(*first), own.update(*first)
        for layer in (mine, own):
            with pytest.raises(RuntimeError):
                layer.update(states(1), states(1, size=5))
        own.keys = own.keys[:, :, :3]  # transformers' own has taken the keys
        step = states(1), states(1)
        if type(own) is DynamicLayer:
            assert all(torch.equal(a, b) for a, b in zip(mine.update(*step), own.update(*step), strict=True))
        with pytest.raises(RuntimeError):
            mine.update(states(1, rows=1), states(1, rows=1))


def test_layers_of_other_kinds_stay_as_they_are() -> None:
    class Other(DynamicLayer):  # type: ignore[misc]
        pass

    class Cache:
        def __init__(self) -> None:
            self.layers: list[Any] = [DynamicLayer(), Other(), DynamicSlidingWindowLayer(WINDOW)]

    made = let_grow(Cache())
    assert [type(layer) for layer in made.layers] == [GrowingLayer, Other, GrowingWindow]
    assert made.layers[2].sliding_window == WINDOW


@pytest.mark.parametrize(("architecture", "grouped"), [("llama", True), ("gemma", True), ("gpt2", False)])
def test_a_step_says_what_a_pass_over_all_tokens_says(zoo: Zoo, architecture: str, grouped: bool) -> None:
    """Alone, among rows of its length, where no mask would be needed, and among longer ones."""
    runtime = Runtime.load(str(zoo.base(architecture)), precision="float32")
    lm = runtime.parts.lm
    assert lm.groups_heads is grouped
    for prompts in (["a b c"], ["a b c", "d e f"], ["a b c", "d e f g h i", "j"]):
        said = runtime.generate(prompts, None, max_new_tokens=6, min_new_tokens=6)
        assert said == [runtime.generate(prompt, None, max_new_tokens=6, min_new_tokens=6) for prompt in prompts]
    ids = torch.arange(2 * 9).view(2, 9) + 5
    mask, positions = torch.ones_like(ids), torch.arange(9).expand(2, 9)
    with torch.inference_mode():
        whole = lm.forward(ids, mask, positions, padded=False)
        cache = lm.new_cache()
        lm.forward(ids[:, :4], mask[:, :4], positions[:, :4], cache=cache, padded=False)
        for end in range(5, 10):
            now = slice(end - 1, end)
            step = lm.forward(ids[:, now], mask[:, :end], positions[:, now], cache=cache, padded=False)
            torch.testing.assert_close(step, whole[:, now], rtol=1e-4, atol=1e-4)
    runtime.close()


def refuses(given: Any) -> Any:
    raise ValueError("attention_mask should have two dimensions")


def adds(given: Any) -> Any:
    return given.float()  # 1 where a row looks, 0 where it does not


@pytest.mark.parametrize("does", [refuses, adds])
def test_a_model_that_takes_no_such_mask_is_given_none(does: Any) -> None:
    """It is tried before it is trusted, on a row with padding: without any, a mask that is added hides nothing."""
    model = random_model(config_of("llama"))
    own = model.forward

    def forward(*args: Any, **named: Any) -> Any:
        mask = named.get("attention_mask")
        return own(*args, **named | ({"attention_mask": does(mask)} if mask is not None and mask.dim() == 4 else {}))

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    model.forward = forward
    lm = CausalLM(model)
    assert lm.keeping == "shared"
    assert not lm.groups_heads
    with torch.inference_mode():
        ids = torch.arange(5)[None] + 5
        cache = lm.new_cache()
        for number in range(5):  # the rows of a batch are read by such a model all the same
            now = slice(number, number + 1)
            lm.forward(ids[:, now], torch.ones(1, number + 1), ids[:, now] - 5, cache=cache, padded=False)


def test_a_mixture_that_takes_no_mask_in_a_step_speaks_as_before() -> None:
    """Its forward fails under a mask of more columns than tokens, for which it weighs what its router says."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=config_of("llama").vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
    )
    lm = CausalLM(random_model(config))
    assert not lm.groups_heads
    ids = torch.arange(5)[None] + 5
    with torch.inference_mode():
        cache = lm.new_cache()
        for number in range(5):
            now = slice(number, number + 1)
            lm.forward(ids[:, now], torch.ones(1, number + 1), ids[:, now] - 5, cache=cache, padded=False)
