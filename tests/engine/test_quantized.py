"""Over int4 and int8 bases: exact to the precision of that base's own matmul, and the base keeps every byte."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lora_rt.core.engine import tiled_factors
from lora_rt.core.engine.lanes import LanePlan
from lora_rt.core.multiply import fastest, many, tiled
from lora_rt.core.multiply.measured import layer_name
from lora_rt.core.multiply.product import Product
from lora_rt.core.multiply.ways import SIZES, Way, ways_of
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.contract import Gate
from lora_rt.registry.registry import Registry
from support.features import lacks
from support.tiny import MLP, TARGETS, Zoo, deltas, some_ids, spec

pytestmark = pytest.mark.slow

IDS = some_ids(rows=2, tokens=7)
QUANTIZED = ("int4", "int8")


def terms(zoo: Zoo) -> list[tuple[Path, float]]:
    targets = [*TARGETS["llama"], *MLP["llama"]]
    return [
        (zoo.adapter("llama", seed=1, targets=targets), 0.7),
        (zoo.adapter("llama", seed=2, r=3, use_rslora=True, targets=targets), -0.4),
    ]


@pytest.fixture(params=QUANTIZED)
def runtime(zoo: Zoo, request: pytest.FixtureRequest) -> Runtime:
    made = zoo.runtime("llama", request.param)
    for adapter, _ in terms(zoo):
        zoo.load(made, adapter)
    return made


def reference(runtime: Runtime, base: Path, composition: list[tuple[Path, float]]) -> Tensor:
    """The same quantized base, to whose layers' outputs the dense change is added in float32 and rounded once."""
    model = copy.copy(runtime.model)
    changes: dict[str, Tensor] = {}
    for adapter, weight in composition:
        for name, (change, _) in deltas(base, adapter).items():
            changes[name] = changes.get(name, torch.zeros_like(change)) + weight * change

    def added(change: Tensor) -> Callable[..., Tensor]:
        return lambda _m, given, out: (out.float() + given[0].float() @ change.T).to(out.dtype)

    handles = [model.get_submodule(name).register_forward_hook(added(change)) for name, change in changes.items()]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    return logits.float()


def test_the_change_is_exact_to_the_base_s_own_precision(runtime: Runtime, zoo: Zoo) -> None:
    wanted = reference(runtime, zoo.base("llama"), terms(zoo))
    base = runtime.logits(IDS).float()
    found = runtime.logits(IDS, compositions=spec(terms(zoo))).float()
    assert (wanted - base).abs().max() > 0.5
    assert (found - wanted).abs().max() < 0.05 * (wanted - base).abs().max()
    assert (found - wanted).abs().mean() < 0.01


@pytest.mark.parametrize("rows", [1, 3])
def test_a_float32_sum_is_rounded_once_with_what_adapters_add_to_it(zoo: Zoo, rows: int) -> None:
    with Runtime.load(str(zoo.base("llama")), precision="bfloat16", device="cpu", multiply="dense") as runtime:
        names = [runtime.load_adapter(str(adapter)) for adapter, _ in terms(zoo)]
        plan = runtime.parts.bank.plan([{names[0]: 0.7, names[1]: -0.4}])
        changes = [deltas(zoo.base("llama"), adapter) for adapter, _ in terms(zoo)]
        layer = "model.layers.0.mlp.up_proj"
        module = runtime.model.get_submodule(layer)
        x = torch.randn(rows, 20, module.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert plan is not None
        with plan.running(rows, 20), torch.inference_mode():
            found = module(x)
        weight = module.weight.double() + 0.7 * changes[0][layer][0] - 0.4 * changes[1][layer][0]
        wanted = (x.double() @ weight.T).to(found.dtype)
        assert (found != wanted).float().mean() < 0.005  # rounded twice, a tenth of them is another number


@pytest.mark.parametrize("weights", [(0.7, -0.4), (30.0, -29.0)])
@pytest.mark.parametrize("by_tiles", [False, True])
def test_many_tokens_get_what_a_float32_sum_gives(
    zoo: Zoo, weights: tuple[float, float], by_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_tiles and not tiled_factors.are_there():
        pytest.skip(lacks("AMX"))
    adapter = zoo.adapter("llama", seed=1, targets=["q_proj", "k_proj", "v_proj"])
    change = deltas(zoo.base("llama"), adapter)["model.layers.0.self_attn.q_proj"][0]
    monkeypatch.setattr(tiled_factors, "are_there", lambda: by_tiles)
    with Runtime.load(str(zoo.base("llama")), precision="bfloat16", device="cpu", multiply="packed") as runtime:
        names = [runtime.load_adapter(str(adapter), name=name) for name in ("one", "twin")]
        plan = runtime.parts.bank.plan([dict(zip(names, weights, strict=True))])
        module = runtime.model.get_submodule("model.layers.0.self_attn.q_proj")
        x = torch.randn(2, 128, module.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert plan is not None
        with torch.inference_mode():
            base = module(x)
            with plan.running(2, 128):
                found = module(x)
    wanted = (base.double() + sum(weights) * (x.double() @ change.double().T)).to(base.dtype)
    assert not torch.equal(base, wanted)
    assert (found != wanted).float().mean() < 0.03  # of one bfloat16 part of each factor, a tenth or more


def test_rows_of_many_tokens_read_their_own_adapters_where_these_lie(zoo: Zoo) -> None:
    if not many.are_there(dense=True):
        pytest.skip(lacks("AMX"))
    found = [zoo.adapter("llama", seed=n, targets=["q_proj", "v_proj"], r=4 + n % 3) for n in range(12)]
    changes = [deltas(zoo.base("llama"), one)["model.layers.0.self_attn.q_proj"][0] for one in found]
    with Runtime.load(str(zoo.base("llama")), precision="bfloat16", device="cpu") as runtime:
        names = [runtime.load_adapter(str(one), name=f"a{n}") for n, one in enumerate(found)]
        rows = [{names[2 * n]: 0.7, names[2 * n + 1]: -0.4} for n in range(5)] + [{names[11]: 1e-50}]
        plan = runtime.parts.bank.plan(rows)
        assert isinstance(plan, LanePlan)
        module = runtime.model.get_submodule("model.layers.0.self_attn.q_proj")
        vars(module)["forward"].own = Product(module, ("tiles",) * len(SIZES))  # whatever is the fastest here
        x = torch.randn(6, 40, module.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.inference_mode():
            base = module(x)
            with plan.running(6, 40):
                y = module(x)
        assert "lanes" not in vars(plan)  # nothing was gathered
    for n in range(5):
        change = 0.7 * changes[2 * n].double() - 0.4 * changes[2 * n + 1].double()
        wanted = (base[n].double() + x[n].double() @ change.T).to(base.dtype)
        assert (y[n] - wanted).abs().max() <= 2**-7 * wanted.abs().max()
        assert not torch.equal(base[n], wanted)
    assert torch.equal(y[5], base[5])


def test_load_generate_and_unload_leave_every_byte_of_the_base(runtime: Runtime, zoo: Zoo) -> None:
    before = runtime.base_digest()
    name = runtime.load_adapter(str(zoo.adapter("llama", seed=3)), name="passing")
    runtime.generate(["one", "a longer prompt"], [f"{name}:1.5", None], max_new_tokens=4)
    runtime.unload_adapter(name)
    assert runtime.base_digest() == before


def test_the_float32_base_keeps_every_byte(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama", fresh=True)
    before = runtime.base_digest()
    name = runtime.load_adapter(str(zoo.adapter("llama", seed=3)))
    runtime.generate(["one", "a longer prompt"], [f"{name}:1.5", None], max_new_tokens=4)
    runtime.unload_adapter(name)
    assert runtime.base_digest() == before


@pytest.mark.parametrize("precision", QUANTIZED)
def test_the_digest_covers_the_scales_of_a_quantized_base(zoo: Zoo, precision: str) -> None:
    runtime = zoo.runtime("llama", precision, fresh=True)
    before = runtime.base_digest()
    module = runtime.model.model.layers[0].mlp.up_proj
    scale = module.weight.quant_state.absmax if precision == "int4" else module.state.SCB
    scale.flatten()[0] += 1
    assert runtime.base_digest() != before


def test_none_rows_are_the_base_bit_for_bit(runtime: Runtime, zoo: Zoo) -> None:
    mixed = runtime.logits(IDS, compositions=[spec(terms(zoo)), None])
    assert torch.equal(mixed[1], runtime.logits(IDS)[1])


def test_a_row_in_a_batch_is_the_row_alone(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama", "int4")
    for adapter, _ in terms(zoo):
        zoo.load(runtime, adapter)
    mixed = runtime.logits(IDS, compositions=[spec(terms(zoo)), spec(terms(zoo)[:1])])
    alone = runtime.logits(IDS[1:], compositions=spec(terms(zoo)[:1]))
    assert_close(mixed[1:].float(), alone.float(), atol=0.06, rtol=0.02)


def test_two_banks_over_one_quantized_model_both_act(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama", "int4", fresh=True)
    name = runtime.load_adapter(str(zoo.adapter("llama", seed=1)))
    wanted = runtime.logits(IDS, compositions=name)
    second = Runtime(runtime.parts.base, runtime.parts.modes, Registry())
    other = second.load_adapter(str(zoo.adapter("llama", seed=2)))
    assert torch.equal(runtime.logits(IDS, compositions=name), wanted)
    assert not torch.equal(second.logits(IDS, compositions=other), second.logits(IDS))


def test_a_long_prompt_under_biases_and_head_gates_is_what_its_beginning_is_alone(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama", "bfloat16")
    name = runtime.load_adapter(str(zoo.adapter("llama", seed=4, r=4, lora_bias=True)), name="biased")
    ids = some_ids(rows=1, tokens=100)
    gate = Gate(heads=torch.tensor([0.2, 0.8, 1.4, 2.0])[None, None, None])
    plan = runtime.parts.bank.plan([{name: 0.7}], {name: gate})
    assert plan is not None
    found = []
    for tokens in (100, 40):
        with plan.running(1, tokens), torch.inference_mode():
            found.append(runtime.model(input_ids=ids[:, :tokens]).logits[:, :40].float())
    assert_close(found[0], found[1], atol=0.06, rtol=0.02)


NOISELESS = """
import sys, warnings
from lora_rt.core.runtime import Runtime
for precision in ("int4", "int8", "bfloat16", "float16"):
    runtime = Runtime.load(sys.argv[1], precision=precision, device="cpu")
    name = runtime.load_adapter(sys.argv[2])
    runtime.generate(["one", "two and more"], [name, None], max_new_tokens=3, temperature=0.5, seed=1)
    "".join(runtime.stream("x", name, max_new_tokens=3))
    runtime.unload_adapter(name)
"""


def test_no_library_speaks_to_the_user(zoo: Zoo) -> None:
    """Quantizing, loading and generating at four precisions, with every warning an error."""
    command = [sys.executable, "-W", "error", "-W", "ignore:.*torch.jit.*:DeprecationWarning", "-c", NOISELESS]
    done = subprocess.run(
        [*command, str(zoo.base("llama")), str(zoo.adapter("llama", seed=1))], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def in_four_bits(layers: Sequence[nn.Linear], *_given: object, **_named: object) -> dict[str, fastest.Ways]:
    """Every layer that can be is multiplied so."""
    best: dict[str, Way] = {}
    for layer in layers:
        there = ways_of(layer)
        best[layer_name(layer)] = "four-bit" if "four-bit" in there else "tiles" if "tiles" in there else "packed"
    return {name: (way,) * len(SIZES) for name, way in best.items()}


@pytest.mark.skipif(not many.are_there(), reason=lacks("AMX"))
@pytest.mark.parametrize("kind", ["one for all", "one each", "gated"])
def test_what_adapters_add_to_many_tokens_is_summed_up_with_the_product(
    zoo: Zoo, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a base in 4 bits, with one rounding; DoRA, gates of heads and the layers of few tokens go the usual way."""
    monkeypatch.setattr(fastest, "_TINY", 0)
    monkeypatch.setattr(fastest, "choose", in_four_bits)
    taken: list[int] = []
    own = Product.with_added
    monkeypatch.setattr(Product, "with_added", lambda *given: taken.append(1) or own(*given))
    rows, tokens, layer = 2, 40, "model.layers.0.self_attn.q_proj"
    with Runtime.load(str(zoo.base("llama")), precision="int4", device="cpu") as runtime:
        names = [runtime.load_adapter(str(adapter)) for adapter, _ in terms(zoo)]
        weights = [{names[0]: 0.7, names[1]: -0.4}, {names[0]: 0.7, names[1]: -0.4}]
        gates: dict[str, Gate] = {}
        factor = torch.ones(2, rows, tokens)  # of each adapter
        if kind == "one each":
            weights[1] = {names[1]: 1.5}
        if kind == "gated":
            factor[0] = torch.rand(rows, tokens)
            gates = {names[0]: Gate(ranks=factor[0][None, :, :, None])}
        plan = runtime.parts.bank.plan(weights if kind == "one each" else weights[:1], gates)
        module = runtime.model.get_submodule(layer)
        x = torch.randn(rows, tokens, module.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert plan is not None
        with plan.running(rows, tokens), torch.inference_mode():
            found = module(x)
        with torch.inference_mode():
            few = module(x[:, :3])
        numbers = vars(module)["forward"].own.made(torch.bfloat16).double()
        changes = [deltas(zoo.base("llama"), adapter)[layer][0].double() for adapter, _ in terms(zoo)]
    assert taken == [1]
    assert few.shape == (rows, 3, module.out_features)
    wanted = x.double() @ numbers.T
    for row in range(rows):
        for adapter, name in enumerate(names):
            weight = weights[row].get(name, 0.0) * factor[adapter, row][:, None]
            wanted[row] += weight * (x[row].double() @ changes[adapter].T)
    assert (found != wanted.to(found.dtype)).float().mean() < 0.005  # rounded twice, a tenth of them is another number


@pytest.mark.skipif(not many.are_there(), reason=lacks("AMX"))
def test_an_output_head_that_is_given_fewer_tokens_has_gates_of_its_own(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All groups of one rank share what multiplies it, and a head that is asked for some tokens has those alone."""
    monkeypatch.setattr(fastest, "_TINY", 0)
    monkeypatch.setattr(fastest, "choose", in_four_bits)
    monkeypatch.setattr(tiled, "_LEAST", 1)
    targets, sizes = ["o_proj", "lm_head"], {"vocab_size": 272}  # whole tiles
    ids = some_ids(rows=5, tokens=20)
    mask, positions = torch.ones_like(ids), torch.arange(20).expand(5, -1)
    adapters = [zoo.adapter("llama", seed=seed, targets=targets, changes=sizes) for seed in (1, 2)]
    with Runtime.load(str(zoo.base("llama", **sizes)), precision="int4", device="cpu") as runtime:
        names = [runtime.load_adapter(str(adapter)) for adapter in adapters]
        plan = runtime.parts.bank.plan([{names[n % 2]: 0.5 + n, names[1 - n % 2]: -0.3} for n in range(5)])
        lm = runtime.parts.lm
        with torch.inference_mode():
            whole, some, few = (lm.forward(ids, mask, positions, plan=plan, keep=keep) for keep in (None, 8, 1))
    assert_close(some, whole[:, -8:], atol=0.1, rtol=0.05)
    assert_close(few, whole[:, -1:], atol=0.1, rtol=0.05)
