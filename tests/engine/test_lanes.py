"""Rows that use few of a batch's many adapters get lanes of their own, and the same numbers as ever."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lora_rt.core.engine.lanes import LanePlan, Lanes, Spare, gather, pay_off
from lora_rt.core.engine.lru import LRUCache
from lora_rt.core.engine.shared import SharedPlan
from lora_rt.plugins.contract import Gate
from support.engine import Engine
from support.tiny import MLP, TARGETS, Zoo, dense_logits, some_ids

EXACT = {"atol": 1e-4, "rtol": 0.0}
ROWS = 6
IDS = some_ids(rows=ROWS)
EVERYWHERE = [*TARGETS["llama"], *MLP["llama"]]
KINDS = (
    {"r": 1},
    {"r": 4, "targets": EVERYWHERE},
    {"r": 3, "targets": ["o_proj"], "layers_to_transform": [1]},
    {"r": 2, "use_rslora": True, "targets": ["q_proj", "down_proj"]},
    {"r": 4, "lora_bias": True, "targets": ["q_proj", "k_proj"]},
    {"r": 2, "targets": ["lm_head", "v_proj"]},
)


def adapters(zoo: Zoo) -> list[Path]:
    return [zoo.adapter("llama", seed=40 + n, **KINDS[n % len(KINDS)]) for n in range(18)]


@pytest.fixture(scope="module")
def engine(zoo: Zoo) -> Engine:
    made = Engine(zoo.base("llama"))
    made.add(*adapters(zoo))
    return made


def rows(zoo: Zoo) -> list[dict[str, float]]:
    """Three adapters a row, no two rows alike; one row is the base's alone."""
    names = [adapter.name for adapter in adapters(zoo)]
    chosen = [{names[3 * row + n]: 0.3 * (n + 1) - 0.1 * row for n in range(3)} for row in range(ROWS)]
    chosen[2] = {}
    return chosen


@pytest.mark.slow
def test_rows_with_adapters_of_their_own_equal_the_dense_sum_row_by_row(engine: Engine, zoo: Zoo) -> None:
    plan = engine.plan(rows(zoo))
    assert isinstance(plan, LanePlan)
    found = engine.logits(IDS, plan)
    by_name = {adapter.name: adapter for adapter in adapters(zoo)}
    for number, row in enumerate(rows(zoo)):
        terms = [(by_name[name], weight) for name, weight in row.items()]
        assert_close(
            found[number : number + 1], dense_logits(zoo.base("llama"), terms, IDS[number : number + 1]), **EXACT
        )


def test_a_step_of_one_token_equals_the_whole_pass(engine: Engine, zoo: Zoo) -> None:
    plan = engine.plan(rows(zoo))
    assert plan is not None
    whole = engine.logits(IDS, plan)
    with torch.inference_mode():
        with plan.running(ROWS, IDS.shape[1] - 1):
            cache = engine.model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
        with plan.running(ROWS, 1):
            step = engine.model(input_ids=IDS[:, -1:], past_key_values=cache).logits
    assert_close(step[:, 0], whole[:, -1], **EXACT)


def test_the_row_without_adapters_is_the_base_bit_for_bit(engine: Engine, zoo: Zoo) -> None:
    assert torch.equal(engine.logits(IDS, engine.plan(rows(zoo)))[2], engine.logits(IDS, None)[2])


def test_other_weights_reuse_what_was_gathered(engine: Engine, zoo: Zoo) -> None:
    first = engine.plan(rows(zoo))
    again = engine.plan([{name: weight * 2 for name, weight in row.items()} for row in rows(zoo)])
    assert isinstance(first, LanePlan)
    assert isinstance(again, LanePlan)
    assert first.lanes is again.lanes


def test_lanes_take_the_memory_of_those_that_are_gone_and_of_no_others(engine: Engine, zoo: Zoo) -> None:
    names = [adapter.name for adapter in adapters(zoo)]
    factors = [engine.bank.residents[name].factors for name in names]
    turns = [[[(3 * row + n + turn) % len(names) for n in range(3)] for row in range(ROWS)] for turn in (0, 6, 12)]
    members = [tuple(map(tuple, turn)) for turn in turns]
    spare = Spare()

    def places(lanes: Lanes) -> set[int]:
        return {tensor.data_ptr() for tensor in lanes.tensors()}

    first, second = (gather(engine.bank.topology, factors, rows, spare) for rows in members[:2])
    assert not places(first) & places(second)
    before = places(first)
    del first
    third, fresh = (gather(engine.bank.topology, factors, members[2], kept) for kept in (spare, None))
    assert places(third) == before
    assert all(torch.equal(one, other) for one, other in zip(third.tensors(), fresh.tensors(), strict=True))
    assert not places(third) & places(second)


def test_where_gradients_may_flow_the_memory_of_lanes_is_used_once(engine: Engine, zoo: Zoo) -> None:
    """A graph that waits for its gradient holds what they had."""
    for grads in (True, False):
        engine.bank._spare = Spare()
        engine.bank._laid_out = LRUCache()
        with torch.inference_mode(not grads):
            plan = engine.plan(rows(zoo))
            assert isinstance(plan, LanePlan)
            assert plan.lanes.groups
        del plan
        engine.bank._laid_out = LRUCache()
        assert bool(engine.bank._spare._pieces) is not grads


def test_an_unloaded_adapter_leaves_no_lane_behind(zoo: Zoo) -> None:
    engine = Engine(zoo.base("llama"))
    engine.add(*adapters(zoo))
    plan = engine.plan(rows(zoo))
    assert isinstance(plan, LanePlan)
    lanes = weakref.ref(next(iter(plan.lanes.groups.values())).a)
    del plan
    assert lanes() is not None
    engine.bank.remove(next(iter(rows(zoo)[0])))
    assert lanes() is None


def test_a_gate_keeps_the_rows_on_a_shared_stack(engine: Engine, zoo: Zoo) -> None:
    name = next(iter(rows(zoo)[0]))
    assert isinstance(engine.plan(rows(zoo), {name: Gate(ranks=torch.tensor(0.5))}), SharedPlan)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([(0,)] * 16, False),  # all alike
        ([(0, 1, 2, 3)] * 16, False),  # different weights of the same four
        ([(n, (n + 1) % 4) for n in range(4)] * 4, False),
        ([(2 * n, 2 * n + 1) for n in range(16)], True),
        ([(n,) for n in range(5)], True),
        ([(n,) for n in range(4)], False),
        ([tuple(range(32)), (33,)], False),  # one row that uses most of them
    ],
)
def test_lanes_are_for_rows_that_use_less_than_a_quarter_of_the_ranks(
    rows: list[tuple[int, ...]], wanted: bool
) -> None:
    used = sorted({k for row in rows for k in row})
    numbered = tuple(tuple(used.index(k) for k in row) for row in rows)
    assert pay_off([8] * len(used), numbered) is wanted


@pytest.mark.parametrize("chosen", ["lanes", "stack"])
def test_what_a_pass_without_gradients_has_laid_out_serves_one_with_gradients(zoo: Zoo, chosen: str) -> None:
    engine = Engine(zoo.base("llama"))
    engine.add(*adapters(zoo))
    plan = engine.plan(rows(zoo) if chosen == "lanes" else [{path.name: 0.3 for path in adapters(zoo)[1:4]}])
    assert isinstance(plan, LanePlan) == (chosen == "lanes")
    engine.logits(IDS, plan)
    embedded = engine.model.get_input_embeddings()(IDS).detach().requires_grad_()
    with plan.running(*IDS.shape):
        engine.model(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().max() > 0
