"""A gate acts on layers, rows, tokens, ranks and heads as `Gate` says, compared with a model computed by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lora_rt.core.engine import topology
from lora_rt.core.engine.plan import running_pass
from lora_rt.core.engine.resident import BankError
from lora_rt.plugins.contract import Gate
from support.engine import Engine
from support.tiny import HEAD_SIZE, HEADS, LAYERS, MLP, TARGETS, Zoo, peft_model, some_ids

ROWS, TOKENS, RANK = 2, 5, 4
IDS = some_ids(ROWS, TOKENS, seed=3)
FAMILIES = ("llama", "gpt2", "gpt_neox", "opt", "gemma")
QUICK_FIRST = [FAMILIES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])]
EXACT = {"atol": 1e-4, "rtol": 0.0}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2


def everywhere(zoo: Zoo, architecture: str, **options: object) -> Path:
    targets = [*TARGETS[architecture], *MLP[architecture]]
    return zoo.adapter(architecture, **{"targets": targets, "r": RANK, "seed": 31, **options})


def spread(architecture: str, leaf: str, heads: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What one token's head gate (heads,) multiplies a layer's input and output features by, written out by hand."""
    size = 32 if architecture == "gemma" else HEAD_SIZE
    each = torch.cat([heads[head].expand(size) for head in range(HEADS)])
    shared = {"llama": 2, "gemma": 1}.get(architecture, HEADS)
    means = heads.reshape(shared, HEADS // shared).mean(1)
    match leaf:
        case "q_proj":
            return 1.0, each
        case "k_proj" | "v_proj":
            return 1.0, torch.cat([means[head].expand(size) for head in range(shared)])
        case "c_attn":
            return 1.0, torch.cat([each, each, each])
        case "query_key_value":
            return 1.0, torch.cat([heads[head].expand(3 * size) for head in range(HEADS)])
        case "o_proj" | "out_proj" | "dense":
            return each, 1.0
        case "attn.c_proj":
            return each, 1.0
    return 1.0, 1.0


def changed(architecture: str, path: str, module: Any, weight: float, gate: Gate) -> Callable[..., Tensor]:
    """A hook that adds one adapter's change to one layer's output."""
    a, b = module.lora_A["default"].weight, module.lora_B["default"]
    ranks, heads = (torch.ones(1) if part is None else part for part in (gate.ranks, gate.heads))
    layer = next(int(part) for part in path.split(".") if part.isdigit())
    ranks = torch.broadcast_to(ranks, (LAYERS, ROWS, TOKENS, a.shape[0]))[layer]
    heads = torch.broadcast_to(heads, (LAYERS, ROWS, TOKENS, HEADS))[layer]
    leaf = "attn.c_proj" if path.endswith("attn.c_proj") else path.split(".")[-1]

    def hook(_module: Any, given: Any, out: Tensor) -> Tensor:
        x, y = given[0].reshape(ROWS, TOKENS, -1), out.reshape(ROWS, TOKENS, -1).clone()
        for row in range(ROWS):
            for token in range(TOKENS):
                g = ranks[row, token]
                before, after = spread(architecture, leaf, heads[row, token])
                change = b.weight @ (g * (a @ (before * x[row, token])))
                if b.bias is not None:
                    change = change + g.mean() * b.bias
                y[row, token] += weight * module.scaling["default"] * after * change
        return y.reshape(out.shape)

    return hook


def by_hand(base: Path, architecture: str, weights: Mapping[Path, float], gates: Mapping[Path, Gate]) -> Tensor:
    """Logits of a model to whose layers every adapter's change is added, row by row and token by token."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for adapter, weight in weights.items():
        gate = gates.get(adapter, Gate())
        for name, module in peft_model(base, adapter).named_modules():
            if hasattr(module, "lora_A"):
                path = name.removeprefix("base_model.model.")
                model.get_submodule(path).register_forward_hook(changed(architecture, path, module, weight, gate))
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


GATES = {
    "number": Gate(torch.tensor(0.3)),
    "layers": Gate(numbers(LAYERS, 1, 1, 1)),
    "rows": Gate(numbers(ROWS, 1, 1)),
    "tokens": Gate(numbers(TOKENS, 1)),
    "ranks": Gate(numbers(RANK)),
    "all axes": Gate(numbers(LAYERS, ROWS, TOKENS, RANK)),
    "one head number": Gate(heads=torch.tensor([1.7])),
    "heads": Gate(heads=numbers(HEADS)),
    "heads by layer": Gate(heads=numbers(LAYERS, 1, 1, HEADS)),
    "heads by row and token": Gate(heads=numbers(ROWS, TOKENS, HEADS)),
    "everything": Gate(numbers(LAYERS, ROWS, TOKENS, RANK), numbers(LAYERS, ROWS, TOKENS, HEADS, seed=1)),
}


@pytest.mark.parametrize("architecture", QUICK_FIRST)
@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_a_gate_equals_the_hand_made_model(zoo: Zoo, architecture: str, gate: Gate) -> None:
    adapter = everywhere(zoo, architecture)
    base = zoo.base(architecture)
    engine = Engine(base)
    engine.add(adapter)
    wanted = by_hand(base, architecture, {adapter: 0.8}, {adapter: gate})
    plain = engine.logits(IDS, engine.plan({adapter.name: 0.8}))
    assert (wanted - plain).abs().max() > 1e-2, "the gate does too little for this test to tell anything"
    assert_close(engine.logits(IDS, engine.plan({adapter.name: 0.8}, {adapter.name: gate})), wanted, **EXACT)


def test_heads_are_found_once_and_without_what_adapters_add(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate with one number for all heads asks for them first in the middle of a pass."""
    tried: list[bool] = []
    find = topology.find_heads
    monkeypatch.setattr(topology, "find_heads", lambda *given: tried.append(running_pass() is None) or find(*given))
    adapter = everywhere(zoo, "llama")
    engine = Engine(zoo.base("llama"))
    engine.add(adapter)
    engine.logits(IDS, engine.plan({adapter.name: 0.8}, {adapter.name: GATES["one head number"]}))
    assert tried == [True]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_gates_of_adapters_with_other_ranks_modules_and_biases_do_not_mix(zoo: Zoo, architecture: str) -> None:
    attention, mlp = TARGETS[architecture], MLP[architecture]
    weights = {
        everywhere(zoo, architecture): 0.8,
        zoo.adapter(architecture, r=7, targets=[attention[0], mlp[-1]], lora_bias=True, seed=32): -0.5,
        zoo.adapter(architecture, r=2, targets=[attention[-1]], lora_bias=True, seed=33): 1.5,
        zoo.adapter(architecture, r=9, targets=[*attention], seed=34): 0.4,
    }
    one, two, three, _ = weights
    gates = {
        one: Gate(numbers(LAYERS, ROWS, 1, RANK), numbers(TOKENS, HEADS, seed=1)),
        two: Gate(numbers(TOKENS, 7, seed=2)),
        three: Gate(numbers(ROWS, 1, 1, seed=3)),
    }
    engine = Engine(zoo.base(architecture))
    engine.add(*weights)
    plan = engine.plan({a.name: w for a, w in weights.items()}, {a.name: g for a, g in gates.items()})
    assert_close(engine.logits(IDS, plan), by_hand(zoo.base(architecture), architecture, weights, gates), **EXACT)


def test_rows_keep_their_own_weights_under_a_gate(zoo: Zoo) -> None:
    one, other = everywhere(zoo, "opt"), zoo.adapter("opt", seed=35)
    engine = Engine(zoo.base("opt"))
    engine.add(one, other)
    rows = [{one.name: 0.5}, {other.name: -1.0, one.name: 0.25}]
    gates = {one.name: Gate(numbers(TOKENS, RANK))}
    together = engine.logits(IDS, engine.plan(rows, gates))
    for row in range(ROWS):
        alone = engine.logits(IDS[row : row + 1], engine.plan(rows[row], gates))
        assert_close(together[row : row + 1], alone, **EXACT)


@pytest.mark.parametrize("architecture", QUICK_FIRST)
@pytest.mark.parametrize("ones", [Gate(), Gate(torch.ones(LAYERS, 1, 1, 1)), Gate(torch.ones(ROWS, TOKENS, RANK))])
def test_a_gate_of_ones_is_no_gate_bit_for_bit(zoo: Zoo, architecture: str, ones: Gate) -> None:
    adapter = everywhere(zoo, architecture)
    engine = Engine(zoo.base(architecture))
    engine.add(adapter)
    without = engine.logits(IDS, engine.plan({adapter.name: 0.8}))
    assert torch.equal(engine.logits(IDS, engine.plan({adapter.name: 0.8}, {adapter.name: ones})), without)


def test_a_head_gate_of_ones_is_no_gate(zoo: Zoo) -> None:
    adapter = everywhere(zoo, "llama")
    engine = Engine(zoo.base("llama"))
    engine.add(adapter)
    ones = {adapter.name: Gate(heads=torch.ones(HEADS))}
    assert torch.equal(
        engine.logits(IDS, engine.plan({adapter.name: 0.8}, ones)), engine.logits(IDS, engine.plan({adapter.name: 0.8}))
    )


def test_a_gate_of_zeros_is_the_base_bit_for_bit(zoo: Zoo) -> None:
    adapter = everywhere(zoo, "llama", lora_bias=True)
    engine = Engine(zoo.base("llama"))
    engine.add(adapter)
    base = engine.logits(IDS, None)
    for zeros in (Gate(torch.zeros(())), Gate(torch.zeros(RANK)), Gate(torch.zeros(LAYERS, ROWS, TOKENS, RANK))):
        assert torch.equal(engine.logits(IDS, engine.plan({adapter.name: 0.8}, {adapter.name: zeros})), base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "leaf", "output"),
    [
        ("llama", "q_proj", "o_proj"),
        ("llama", "k_proj", "o_proj"),
        ("llama", "v_proj", "o_proj"),
        ("gpt2", "c_attn", "attn.c_proj"),
        ("gpt_neox", "query_key_value", "dense"),
        ("opt", "v_proj", "out_proj"),
    ],
)
@pytest.mark.parametrize("head", range(HEADS))
def test_one_open_head_changes_the_attention_of_that_head_alone(
    zoo: Zoo, architecture: str, leaf: str, output: str, head: int
) -> None:
    """Seen from outside, in what the first block's attention gives to its output projection."""
    adapter = zoo.adapter(architecture, targets=[leaf], r=RANK, seed=36)
    engine = Engine(zoo.base(architecture))
    engine.add(adapter)
    seen: list[Tensor] = []
    module = next(m for name, m in engine.model.named_modules() if name.endswith(output))
    module.register_forward_pre_hook(lambda _m, given: seen.append(given[0].reshape(ROWS, TOKENS, HEADS, HEAD_SIZE)))
    only = Gate(heads=torch.eye(HEADS)[head])
    engine.logits(IDS, engine.plan({adapter.name: 1.0}, {adapter.name: only}))
    engine.logits(IDS, None)
    changed = (seen[0] - seen[1]).abs().amax(dim=(0, 1, 3)) > 1e-6
    # Under grouped-query attention a key or value head serves the two query heads of its group.
    group = {head, head ^ 1} if architecture == "llama" and leaf != "q_proj" else {head}
    assert changed.tolist() == [number in group for number in range(HEADS)]


def test_an_output_head_takes_the_mean_over_layers_and_the_gates_of_the_tokens_it_gets(zoo: Zoo) -> None:
    adapter = zoo.adapter("llama", targets=["lm_head"], r=RANK, seed=37)
    engine = Engine(zoo.base("llama"))
    engine.add(adapter)
    gate = numbers(LAYERS, ROWS, TOKENS, RANK)
    same = Gate(gate.mean(0, keepdim=True))
    whole = engine.logits(IDS, engine.plan({adapter.name: 1.0}, {adapter.name: Gate(gate)}))
    assert_close(whole, engine.logits(IDS, engine.plan({adapter.name: 1.0}, {adapter.name: same})), **EXACT)
    assert (whole - engine.logits(IDS, engine.plan({adapter.name: 1.0}))).abs().max() > 1e-2
    columns = torch.tensor([1, 3])
    some = engine.logits(IDS, engine.plan({adapter.name: 1.0}, {adapter.name: Gate(gate)}), columns)
    assert_close(some, whole[:, columns], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_a_gate_may_come_in_any_dtype(zoo: Zoo, dtype: torch.dtype) -> None:
    adapter = everywhere(zoo, "llama")
    engine = Engine(zoo.base("llama"))
    engine.add(adapter)
    ranks, heads = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 0, 0, 2])
    wanted = engine.logits(IDS, engine.plan({adapter.name: 1.0}, {adapter.name: Gate(ranks.float(), heads.float())}))
    gate = Gate(ranks.to(dtype), heads.to(dtype))
    assert torch.equal(engine.logits(IDS, engine.plan({adapter.name: 1.0}, {adapter.name: gate})), wanted)


def test_factors_in_bfloat16_as_on_a_gpu_meet_gates_in_float32(zoo: Zoo) -> None:
    adapter = everywhere(zoo, "llama")
    engine = Engine(zoo.base("llama"))
    engine.bank.dtype = torch.bfloat16
    engine.add(adapter)
    gate = Gate(numbers(LAYERS, ROWS, TOKENS, RANK), numbers(HEADS))
    wanted = by_hand(zoo.base("llama"), "llama", {adapter: 0.8}, {adapter: gate})
    found = engine.logits(IDS, engine.plan({adapter.name: 0.8}, {adapter.name: gate}))
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def test_gradients_flow_through_a_plan_to_the_gate(zoo: Zoo) -> None:
    adapter = everywhere(zoo, "llama")
    engine = Engine(zoo.base("llama"))
    engine.model.requires_grad_(False)
    engine.add(adapter)
    ranks, heads = torch.ones(LAYERS, 1, 1, 1, requires_grad=True), torch.ones(HEADS, requires_grad=True)

    def loss() -> Tensor:
        plan = engine.plan({adapter.name: 1.0}, {adapter.name: Gate(ranks, heads)})
        assert plan is not None
        with plan.running(*IDS.shape):
            logits: Tensor = engine.model(input_ids=IDS).logits
        return logits.logsumexp(-1).mean()

    loss().backward()
    for leaf in (ranks, heads):
        assert leaf.grad is not None
        step = torch.zeros_like(leaf).flatten().index_fill(0, torch.tensor([1]), 1e-2).reshape(leaf.shape)
        with torch.no_grad():
            leaf += step
            up = loss()
            leaf -= 2 * step
            down = loss()
            leaf += step
        assert_close(leaf.grad.flatten()[1], (up - down) / 2e-2, atol=1e-3, rtol=0.05)


def test_a_rank_gate_of_another_rank_is_refused(zoo: Zoo) -> None:
    adapter, uneven = everywhere(zoo, "llama"), everywhere(zoo, "llama", rank_pattern={"q_proj": 2})
    engine = Engine(zoo.base("llama"))
    engine.add(adapter, uneven)
    weights = {adapter.name: 1.0, uneven.name: 1.0}
    gates = {adapter.name: Gate(torch.ones(RANK + 1)), uneven.name: Gate(torch.ones(RANK))}
    with pytest.raises(BankError) as caught:
        engine.plan(weights, gates)
    assert {problem.split(":")[0] for problem in caught.value.problems} == {adapter.name, uneven.name}
