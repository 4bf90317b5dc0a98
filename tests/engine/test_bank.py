"""Residents come and go without a trace, unused ones cost nothing, and a pass belongs to one plan, model and thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lora_rt.core.engine import shared
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.layout import PassError
from lora_rt.core.engine.plan import Plan, base_alone, running_pass
from lora_rt.core.engine.resident import BankError
from lora_rt.core.engine.shared import SharedPlan
from lora_rt.core.engine.stack import Factors
from support.engine import Engine
from support.tiny import LAYERS, Zoo, dense_logits, some_ids

IDS = some_ids(rows=2, tokens=6)
EXACT = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture
def engine(zoo: Zoo) -> Engine:
    made = Engine(zoo.base("llama"))
    made.add(*(adapter(zoo, seed) for seed in (1, 2, 3)))
    return made


def adapter(zoo: Zoo, seed: int) -> Path:
    return zoo.adapter("llama", seed=seed, r=8)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The out-features of every matmul that the engine makes."""
    found: list[int] = []
    own: Callable[..., Tensor] = shared.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append(weight.shape[0])
        return own(x, weight, bias)

    added = Tensor.addmm_

    def summed(y: Tensor, hidden: Tensor, b: Tensor) -> Tensor:
        found.append(b.shape[1])
        return added(y, hidden, b)

    monkeypatch.setattr(shared, "linear", counted)
    monkeypatch.setattr(Tensor, "addmm_", summed)
    return found


def test_without_a_composition_the_engine_makes_no_matmul(engine: Engine, widths: list[int], zoo: Zoo) -> None:
    assert engine.plan([{}, {adapter(zoo, 1).name: 0.0}]) is None
    engine.logits(IDS, None)
    assert widths == []


def test_adapters_that_no_row_uses_take_part_in_no_matmul(engine: Engine, widths: list[int], zoo: Zoo) -> None:
    engine.logits(IDS, engine.plan([{adapter(zoo, 1).name: 1.0}, {adapter(zoo, 2).name: 0.0}]))
    # Per block one A for q, k and v and one for o, of this adapter's rank alone; and a B each.
    assert widths == [3 * 8, 64, 32, 32, 8, 64] * LAYERS


def test_two_matmuls_a_layer_however_many_adapters_act(engine: Engine, widths: list[int], zoo: Zoo) -> None:
    engine.logits(IDS, engine.plan({adapter(zoo, seed).name: 1.0 for seed in (1, 2, 3)}))
    assert widths == [3 * 3 * 8, 64, 32, 32, 3 * 8, 64] * LAYERS


def test_changing_weights_copies_no_factor(engine: Engine, zoo: Zoo) -> None:
    names = [adapter(zoo, 1).name, adapter(zoo, 2).name]
    first = engine.plan(dict.fromkeys(names, 1.0))
    again = engine.plan([{names[0]: 0.3, names[1]: -2.0}, {names[0]: 1.0}])
    assert first is not None
    assert again is not None
    assert first.stack is again.stack


def test_an_adapter_added_again_is_replaced_and_plans_made_before_keep_the_old_one(engine: Engine, zoo: Zoo) -> None:
    name = adapter(zoo, 1).name
    before = engine.plan({name: 1.0})
    old = engine.logits(IDS, before)
    other = engine.read(adapter(zoo, 2))
    engine.bank.add(type(other)(name, other.factors, other.mode))
    assert torch.equal(engine.logits(IDS, before), old)
    assert_close(
        engine.logits(IDS, engine.plan({name: 1.0})),
        dense_logits(zoo.base("llama"), [(adapter(zoo, 2), 1.0)], IDS),
        **EXACT,
    )
    engine.bank.remove(name)
    assert torch.equal(engine.logits(IDS, before), old)
    with pytest.raises(BankError, match="is resident"):
        engine.plan({name: 1.0})


def test_the_memory_of_an_adapter_is_given_back(engine: Engine, zoo: Zoo) -> None:
    import gc
    import weakref

    name = adapter(zoo, 1).name
    factors = weakref.ref(next(iter(engine.bank.residents[name].factors.values())).a)
    engine.logits(IDS, engine.plan({name: 1.0, adapter(zoo, 2).name: 1.0}))
    engine.bank.remove(name)
    gc.collect()
    assert factors() is None


def test_a_stack_that_is_made_while_its_adapter_is_unloaded_is_not_kept(engine: Engine, zoo: Zoo) -> None:
    name = adapter(zoo, 1).name
    residents = engine.bank.residents
    engine.bank.remove(name)
    assert engine.bank.plan([{name: 1.0}], residents=residents) is not None
    assert not len(engine.bank._laid_out)


def test_the_order_of_the_terms_makes_no_difference(engine: Engine, zoo: Zoo) -> None:
    one, other = (adapter(zoo, seed).name for seed in (1, 2))
    first, again = engine.plan({one: 0.3, other: 0.9}), engine.plan({other: 0.9, one: 0.3})
    assert isinstance(first, SharedPlan)
    assert isinstance(again, SharedPlan)
    assert first.stack is again.stack
    assert torch.equal(engine.logits(IDS, first), engine.logits(IDS, again))


def test_every_mismatch_of_an_adapter_is_named(engine: Engine) -> None:
    site = "model.layers.0.self_attn.q_proj"
    good = Factors(torch.zeros(2, 64), torch.zeros(64, 2))
    wrong = {
        site: Factors(torch.zeros(2, 63), torch.zeros(64, 2)),
        site.replace("q_", "k_"): Factors(torch.zeros(2, 64), torch.zeros(32, 3)),
        site.replace("q_", "v_"): Factors(torch.zeros(2, 64), torch.zeros(32, 2), torch.zeros(64)),
        "model.layers.9.self_attn.q_proj": good,
    }
    resident = next(iter(engine.bank.residents.values()))
    with pytest.raises(BankError) as caught:
        engine.bank.add(type(resident)("wrong", wrong, "output-only"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == list(wrong)
    assert "wrong" not in engine.bank.residents


@pytest.mark.parametrize("weight", [1e39, -1e300])
def test_a_weight_beyond_float32_is_refused(engine: Engine, zoo: Zoo, weight: float) -> None:
    with pytest.raises(BankError, match="too large"):
        engine.plan({adapter(zoo, 1).name: weight})


def test_two_banks_over_one_model_do_not_add_up(engine: Engine, zoo: Zoo) -> None:
    second = AdapterBank(engine.model, torch.float32)
    second.add(engine.read(adapter(zoo, 1)))
    wanted = dense_logits(zoo.base("llama"), [(adapter(zoo, 1), 1.0)], IDS)
    for bank in (engine.bank, second):
        assert_close(engine.logits(IDS, bank.plan([{adapter(zoo, 1).name: 1.0}])), wanted, **EXACT)


def test_a_pass_inside_another_has_its_own_plan_and_leaves_the_outer_one_as_it_was(engine: Engine, zoo: Zoo) -> None:
    outer = engine.plan({adapter(zoo, 1).name: 1.0})
    inner = engine.plan({adapter(zoo, 2).name: -1.0})
    assert outer is not None
    alone = {plan: engine.logits(IDS, plan) for plan in (outer, inner, None)}
    other_model = Engine(zoo.base("llama"))
    with outer.running(*IDS.shape):
        mine = running_pass()
        assert torch.equal(engine.logits(IDS, inner), alone[inner])
        assert torch.equal(other_model.logits(IDS, None), alone[None])
        with base_alone(), torch.inference_mode():
            assert torch.equal(engine.model(input_ids=IDS).logits, alone[None])
        assert running_pass() is mine
        with torch.inference_mode():
            assert_close(engine.model(input_ids=IDS).logits, alone[outer], **EXACT)
    assert running_pass() is None


def test_a_failing_pass_leaves_no_plan_behind(engine: Engine, zoo: Zoo) -> None:
    plan = engine.plan({adapter(zoo, 1).name: 1.0})
    with pytest.raises(IndexError):
        engine.logits(torch.full((1, 2), 10**6), plan)
    assert running_pass() is None


def test_the_base_s_names_parameters_and_state_stay_as_they_were(engine: Engine, zoo: Zoo) -> None:
    fresh = Engine(zoo.base("llama")).model.state_dict()
    found = engine.model.state_dict()
    assert list(found) == list(fresh)
    assert all(torch.equal(found[key], fresh[key]) for key in fresh)


def logits(model: nn.Module, plan: Plan | None) -> Tensor:
    with torch.inference_mode(), plan.running(*IDS.shape) if plan is not None else nullcontext():
        found: Tensor = model(input_ids=IDS).logits
    return found


class Copying(nn.Module):
    """A layer that gets a copy of its input in short passes, as `contiguous()` copies one shape and not another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.clone() if x.shape[1] == 2 else x)
        return out


def test_layers_that_share_an_input_in_some_passes_alone_do_not_share_their_adapters(zoo: Zoo) -> None:
    model = Engine(zoo.base("llama")).model
    for block in model.model.layers:
        block.mlp.up_proj = Copying(block.mlp.up_proj)
    bank = AdapterBank(model, torch.float32)
    sites = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj.inner"]
    factors = {site: Factors(torch.randn(2, 64) * 0.1, torch.randn(96, 2) * 0.1) for site in sites}
    kind = type(Engine(zoo.base("llama")).read(adapter(zoo, 1)))
    bank.add(kind("both", factors, "output-only"))
    found = logits(model, bank.plan([{"both": 0.5}]))
    with torch.no_grad():
        for site in sites:
            model.get_submodule(site).weight += 0.5 * factors[site].b @ factors[site].a
    assert_close(found, logits(model, None), **EXACT)


class Experts(nn.Module):
    """A layer that is shown the tokens of one row alone, as an expert is that the router sends some tokens to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(row) for row in x]).reshape(*x.shape[:2], -1)


def test_a_layer_that_sees_some_of_the_tokens_is_gated_alike_for_all_or_refused(zoo: Zoo) -> None:
    routed = Engine(zoo.base("llama")).model
    for block in routed.model.layers:
        block.mlp.up_proj = Experts(block.mlp.up_proj)
    bank = AdapterBank(routed, torch.float32)
    site = "model.layers.0.mlp.up_proj.inner"
    factors = Factors(torch.randn(2, 64) * 0.1, torch.randn(96, 2) * 0.1)
    kind = type(Engine(zoo.base("llama")).read(adapter(zoo, 1)))
    bank.add(kind("expert", {site: factors}, "output-only"))
    alike = logits(routed, bank.plan([{"expert": 0.5}] * 2))
    with torch.no_grad():
        routed.get_submodule(site).weight += 0.5 * factors.b @ factors.a
    assert_close(alike, logits(routed, None), **EXACT)
    with pytest.raises(PassError, match="6 of 12 tokens"):
        logits(routed, bank.plan([{"expert": 0.5}, {}]))
