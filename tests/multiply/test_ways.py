"""Ways to multiply a weight that is kept in few bits: the same numbers in all of them, and which have the same bits."""

from __future__ import annotations

import gc
import json
import warnings
from functools import partial
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_rt.core.base.load import load_base
from lora_rt.core.base.precision import check_wish
from lora_rt.core.base.source import BaseError
from lora_rt.core.memory.estimate import plan_memory, read_config
from lora_rt.core.memory.workload import Workload
from lora_rt.core.multiply import measured
from lora_rt.core.multiply import ways as multiply
from lora_rt.core.multiply.fastest import Products, Ways, choose, fastest, is_left_unpacked, told
from lora_rt.core.multiply.measured import Times, layer_name, measure, remembered, times_of
from lora_rt.core.multiply.product import Product, looking
from lora_rt.core.multiply.ways import SIZES, Way, dense_weight, ways_of, widened_product
from lora_rt.core.runtime import Runtime
from lora_rt.errors import UsageError
from lora_rt.registry import home
from support.cli import Cli, command_line
from support.features import lacks
from support.tiny import Zoo

pytestmark = pytest.mark.slow

OUT, IN = 96, 128
TOKENS = (1, 3, 5, 9, 17, 80)
NARROW: tuple[Way, ...] = ("dequantize", "dense")
WIDE: tuple[Way, ...] = ("dequantize-wide", "dense-widened", "dense-wide", "dense-blocked", "dense-half")


def layer(
    *, bias: bool = False, dtype: torch.dtype = torch.bfloat16, out: int = OUT, nested: bool = True
) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(IN, out, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4")
    if bias:
        made.bias.data = torch.randn(out)
    made = made.to("cpu").eval().requires_grad_(False)
    made.support_avx512bf16_for_cpu = False  # as in training; what is packed has a test of its own
    return made


def always(way: Way) -> Ways:
    return (way,) * len(SIZES)


def given(tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(1, tokens, IN, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def nf4_by_hand(module: bnb.nn.Linear4bit) -> Tensor:
    """The numbers of the format: code book times the scale of each block, in the dtype that is computed in."""
    state = module.weight.quant_state
    data = module.weight.data.reshape(-1).long()
    codes = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)
    scales = state.absmax
    if state.nested:
        second = state.state2
        steps = second.code[scales.long()].view(-1)
        scales = steps * second.absmax.repeat_interleave(second.blocksize)[: len(steps)] + state.offset
    numbers = state.code[codes].view(-1, state.blocksize) * scales[:, None]
    return numbers.reshape(module.out_features, module.in_features).to(module.compute_dtype)


@pytest.mark.parametrize("nested", [True, False])
def test_a_dense_copy_has_exactly_the_numbers_of_nf4(nested: bool) -> None:
    module = layer(nested=nested)
    assert torch.equal(dense_weight(module), nf4_by_hand(module))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("way", NARROW)
def test_products_in_the_compute_dtype_have_the_bits_of_bitsandbytes_own(way: Way, tokens: int) -> None:
    module = layer()
    with torch.no_grad():
        assert torch.equal(Product(module, always(way))(given(tokens)), module(given(tokens)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_products_in_float32_have_the_bits_of_each_other_and_are_the_exact_product_rounded_once(
    tokens: int, bias: bool
) -> None:
    module, x = layer(bias=bias), given(tokens)
    found = [Product(module, always(way))(x) for way in WIDE]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    exact = x.double() @ nf4_by_hand(module).double().T
    if bias:
        exact += module.bias.double()
    for one in (found[0], *found[3:]):  # in blocks, and in float16, it is summed in another order
        assert ((one.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    with torch.no_grad():
        own = module(x).double()
    assert (found[0].double() - own).abs().max() < 0.02 * exact.std()


@pytest.mark.parametrize("way", [*NARROW, *WIDE])
def test_gradients_go_through_every_way(way: Way) -> None:
    module = layer(bias=True)
    x = given(5).requires_grad_()
    Product(module, always(way))(x).float().pow(2).sum().backward()
    weight = nf4_by_hand(module).double()
    plain = x.detach().double().requires_grad_()
    (plain @ weight.T + module.bias.double()).pow(2).sum().backward()
    assert x.grad is not None
    assert plain.grad is not None
    assert (x.grad.double() - plain.grad).abs().max() < 0.02 * plain.grad.abs().max()


@pytest.mark.parametrize("way", [*NARROW, *WIDE])
def test_what_adapters_add_in_place_lets_gradients_through_in_every_way(way: Way) -> None:
    module = layer()
    found = []
    for added in (0.0, 1.0):
        x = given(6).view(2, 3, -1).requires_grad_()
        y = Product(module, always(way)).unrounded(x, Tensor.to).add_(added)
        (y.float() - added).pow(2).sum().backward()
        found.append(x.grad)
    assert torch.allclose(found[0], found[1], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("way", ["dequantize-wide", "dense-blocked", "dense-half"])
def test_a_gradient_keeps_no_dense_weight_where_none_is_to_be_kept(way: Way) -> None:
    module, kept = layer(), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        Product(module, always(way))(given(5).requires_grad_())
    assert (OUT, IN) not in kept


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_dense_layer_of_16_bits_is_multiplied_in_float32_with_the_same_numbers(precision: str) -> None:
    dtype = getattr(torch, precision)
    module = nn.Linear(IN, OUT, bias=False).to(dtype).requires_grad_(False)
    x = given(9, dtype)
    exact = (x.double() @ module.weight.double().T).to(dtype)
    found = [Product(module, always(way))(x) for way in ways_of(module) if way != "packed"]
    assert len(found) == 4
    assert torch.equal(found[0], found[1])
    for one in found:
        assert (one.float() - exact.float()).abs().max() <= 0.01


def test_what_a_product_does_not_take_goes_the_layer_s_own_way() -> None:
    module = layer()
    product = Product(module, always("dense-wide"))
    with torch.no_grad():
        for x in (given(3).float(), given(3)[:, :0], given(3).half()):
            assert torch.equal(product(x), module(x))


@pytest.mark.parametrize("way", ["dense-wide", "dense-blocked", "dense-half"])
def test_a_weight_that_is_replaced_or_changed_in_place_is_the_one_that_counts(way: Way) -> None:
    module, plain = layer(), nn.Linear(IN, OUT, bias=False).bfloat16().requires_grad_(False)
    products = [Product(module, always(way)), Product(plain, always(way))]
    with torch.no_grad():
        before = [product(given(4)) for product in products]
        torch.manual_seed(9)
        other = bnb.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
        module.weight = other.weight
        plain.weight.mul_(2)
        after = [product(given(4)) for product in products]
        assert (after[0].float() - other(given(4)).float()).abs().max() < 0.05
    assert torch.equal(after[1], before[1] * 2)


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason=lacks("AVX-512 BF16"))
def test_where_bitsandbytes_packs_a_weight_its_copies_are_made_before() -> None:
    module = layer()
    wanted = Product(layer(), always("dense"))(given(70))
    module.support_avx512bf16_for_cpu = True
    product = Product(module, ("packed", *always("dense")[1:]))
    with torch.no_grad():
        assert (product(given(1)).float() - module(given(1)).float()).abs().max() == 0
        assert torch.equal(product(given(70)), wanted)
        module.state_dict()
        assert torch.equal(product(given(70)), wanted)


TIMES: dict[str, list[float | None]] = {
    "packed": [10.0, 20.0, 40.0, 80.0, 160.0, None],
    "dequantize": [100.0] * 6,
    "dequantize-wide": [150.0, 150.0, 150.0, 150.0, 150.0, 120.0],
    "dense": [30.0, 30.0, 30.0, 40.0, 50.0, 90.0],
    "dense-widened": [60.0] * 6,
    "dense-wide": [36.0, 36.0, 36.0, 36.0, 36.0, 300.0],
    "dense-blocked": [36.0, 15.0, 15.0, 15.0, 15.0, 15.0],
    "dense-half": [40.0, 40.0, 40.0, 50.0, 60.0, 90.0],
}


def test_each_class_of_tokens_gets_its_fastest_way_and_the_own_one_where_nothing_is_clearly_faster() -> None:
    assert fastest(TIMES, list(TIMES)[:3]) == ("packed", "packed", "packed", "packed", "dequantize", "dequantize")  # type: ignore[arg-type]
    assert fastest(TIMES, ["packed", "dense"]) == ("packed", "packed", "dense", "dense", "dense", "dense")
    slow = {way: [9.5] * 6 if way != "packed" else [10.0] * 6 for way in TIMES}
    assert fastest(slow, ["packed", "dense", "dense-wide"]) == always("packed")


def test_a_copy_that_takes_long_to_make_is_made_where_it_gains_enough() -> None:
    def found(half: float, number: int) -> Way:
        times = {"packed": [100.0, *[900.0] * 5], "four-bit": [300.0, *[100.0] * 5], "dense-half": [half] * 6}
        return fastest(times, ["packed", "four-bit", "dense-half"])[number]

    assert (found(80.0, 0), found(70.0, 0)) == ("packed", "dense-half")  # single tokens
    assert (found(95.0, 4), found(85.0, 4)) == ("four-bit", "dense-half")
    assert fastest({"packed": [100.0] * 6, "four-bit": [85.0] * 6}, ["packed", "four-bit"])[0] == "four-bit"
    times = {"packed": [100.0] * 6, "four-bit": [82.0] * 6, "dense-half": [80.0] * 6}
    assert fastest(times, ["packed", "four-bit", "dense-half"]) == always("four-bit")


def plan(monkeypatch: pytest.MonkeyPatch, wish: str, room: int) -> Ways:
    module = layer()
    monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: dict.fromkeys(layers, TIMES))
    return choose([module, module], check_wish(wish), room)[layer_name(module)]


def test_dense_copies_are_kept_as_far_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = 2 * OUT * IN
    none = plan(monkeypatch, "auto", 2 * numbers - 1)
    assert set(none) == {"packed", "dequantize"}
    assert set(plan(monkeypatch, "auto", 2 * numbers)) == {"packed", "dense", "dense-widened"}
    assert set(plan(monkeypatch, "auto", 4 * numbers)) == {"packed", "dense-blocked"}
    assert set(plan(monkeypatch, "dense", 4 * numbers)) == {"dense-blocked"}
    assert set(plan(monkeypatch, "dense", 6 * numbers)) == {"dense", "dense-blocked"}
    assert set(plan(monkeypatch, "dequantize", 0)) == {"dequantize"}
    with pytest.raises(BaseError, match="dense copies"):
        plan(monkeypatch, "dense", 100)


def test_a_second_copy_is_kept_where_one_number_of_tokens_gains_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = 2 * OUT * IN

    def kept(sixteen: float) -> set[str]:
        times = {
            **{way: [100.0] * 6 for way in TIMES},
            "dense": [10.0, 10.0, 20.0, 40.0, 80.0, None],
            "dense-widened": [20.0, 20.0, 20.0, 40.0, 40.0, 50.0],
            "dense-blocked": [30.0, 30.0, 30.0, 40.0, sixteen, 60.0],
            "dense-half": [30.0, 30.0, 30.0, 40.0, 90.0, 100.0],
        }
        monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: dict.fromkeys(layers, times))
        return set(choose([module], "auto", 3 * numbers)[layer_name(module)])

    module = layer()
    assert kept(30.0) == {"dense", "dense-widened", "dense-blocked"}
    assert kept(38.0) == {"dense", "dense-widened"}


def test_a_copy_in_float16_is_taken_where_it_is_as_fast_as_two_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = 2 * OUT * IN

    def kept(half: list[float | None]) -> set[str]:
        times = {**TIMES, "packed": [100.0] * 6, "dense-half": half}
        monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: dict.fromkeys(layers, times))
        return set(choose([layer()], "auto", 6 * numbers)[layer_name(layer())])

    assert kept([15.0] * 6) == {"dense-half"}
    assert kept([30.0, 14.0, 14.0, 14.0, 14.0, 16.0]) == {"dense-half"}
    assert kept([90.0, 60.0, 60.0, 60.0, 60.0, 60.0]) == {"dense", "dense-blocked"}


@pytest.mark.skipif("four-bit" not in ways_of(layer()), reason=lacks("AVX2"))
def test_steps_in_one_call_are_counted_as_a_whole_and_nothing_is_packed_then(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = layer(), layer(out=4 * OUT)
    for module in (small, large):
        module.support_avx512bf16_for_cpu = True  # as on a processor for which bitsandbytes has a kernel
    ways = [way for way in ways_of(small) if way not in ("packed", "four-bit", "dense")]
    slow: dict[str, list[float | None]] = {way: [900.0] * 6 for way in ways}

    def found(wish: str, of_large: float, *, in_one_call: bool = True) -> list[Ways]:
        times = {
            layer_name(small): {**slow, "packed": [10.0] * 6, "dense": [50.0] * 6, "four-bit": [24.0] * 6},
            layer_name(large): {**slow, "packed": [50.0] * 6, "dense": [60.0] * 6, "four-bit": [of_large] * 6},
        }
        monkeypatch.setattr(
            "lora_rt.core.multiply.fastest.times_of", lambda layers: {name: times[name] for name in layers}
        )
        chosen = choose([small, large], check_wish(wish), 1 << 30, in_one_call=in_one_call)
        return [chosen[layer_name(module)] for module in (small, large)]

    one, other = found("auto", 45.0)
    assert one[:5] == other[:5] == ("four-bit",) * 5
    assert "packed" not in {*one, *other}
    assert {*found("auto", 45.0, in_one_call=False)[0]} == {"packed"}
    assert {*found("auto", 150.0)[0]} == {"packed"}  # three times as long as all that is planned
    assert {*found("dense", 45.0)[0]} == {"dense"}


def test_a_base_is_left_unpacked_where_its_steps_are_made_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_rt.core.multiply.four_bit.could_be", lambda: True)
    model = nn.Sequential(layer(), layer())
    assert not is_left_unpacked(model, in_one_call=True)  # it is tiny
    monkeypatch.setattr("lora_rt.core.multiply.fastest._TINY", 1)
    assert is_left_unpacked(model, in_one_call=True)
    assert not is_left_unpacked(model, in_one_call=False)
    model.append(layer(out=OUT + 2))
    assert not is_left_unpacked(model, in_one_call=True)


@pytest.mark.parametrize(("tiles", "growing", "kept"), [(False, 1, True), (False, 2, False), (True, 2, True)])
def test_a_way_that_falls_behind_is_tried_on_where_it_may_catch_up(
    tiles: bool, growing: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units for bfloat16 take their time to lay a weight out, and are the fastest with many tokens."""
    turn = iter(range(12))

    def race(tried: dict[str, dict[str, object]]) -> dict[str, dict[str, float]]:
        number = next(turn) % 6
        return {
            name: {way: 100.0 * growing**number if way == "dense" else 10.0 for way in tried if name in tried[way]}
            for name in {name for runs in tried.values() for name in runs}
        }

    monkeypatch.setattr(measured, "_race", race)
    monkeypatch.setattr("lora_rt.core.multiply.four_bit.could_be_tiles", lambda: tiles)
    module = layer()
    times = measure({layer_name(module): module}, torch.full((OUT * IN * 3,), 0.5))[layer_name(module)]
    assert (None not in times["dense"]) is kept


def test_where_gradients_are_to_flow_no_copy_is_kept_that_knows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: dict.fromkeys(layers, TIMES))
    monkeypatch.setattr("lora_rt.core.multiply.fastest._TINY", 1)

    def kept(*, for_training: bool) -> set[str]:
        products = Products(nn.Sequential(layer(), layer()), for_training=for_training)
        products.keep()
        return {kind for item in products.layers for kind in item.forward._kept}

    assert kept(for_training=False) == {"blocked"}
    assert kept(for_training=True) == {"narrow"}


class Stacked(nn.Module):
    """Three blocks, a tower beside them, experts, and an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.tower = nn.ModuleList([layer(), layer(), layer()]), nn.ModuleList([layer()])
        self.blocks.append(nn.ModuleList([layer()]))  # blocks.3.0: an expert
        self.head = layer(out=2 * OUT)


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> Stacked:
    """All of its products are made by copies in float16."""
    if not multiply.half.are_there():
        pytest.skip(lacks("FBGEMM"))
    times = {way: [1.0 if way == "dense-half" else 9.0] * 6 for way in (*TIMES, "four-bit")}
    monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: dict.fromkeys(layers, times))
    monkeypatch.setattr("lora_rt.core.multiply.fastest._TINY", 1)
    return Stacked()


def test_copies_of_a_stack_of_blocks_are_made_when_the_first_of_them_needs_its_own(halved: Stacked) -> None:
    wanted, filters = layer()(given(70)), list(warnings.filters)
    products = Products(halved)
    found = halved.blocks[1](given(70))
    assert warnings.filters == filters
    made = {name: set(module.forward._kept) for name, module in halved.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kinds in made.items() if kinds} == {"blocks.0", "blocks.1", "blocks.2"}
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    products.close()
    assert not [one for one in gc.get_objects() if type(one) is Product and one.module in halved.modules()]  # at once


def test_a_layer_that_became_another_does_not_hold_up_those_beside_it(halved: Stacked) -> None:
    Products(halved)
    halved.blocks[2].weight = nn.Parameter(torch.ones(OUT, IN, device="meta"), requires_grad=False)
    torch.testing.assert_close(halved.blocks[0](given(70)), layer()(given(70)), rtol=1e-2, atol=1e-2)


def test_what_was_measured_is_remembered_and_a_damaged_file_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, module, asked = tmp_path / "home/multiply.json", layer(), []
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(measured, "measure", lambda layers, pool: asked.append(1) or dict.fromkeys(layers, TIMES))
    name = layer_name(module)
    assert times_of({name: module}) == {name: TIMES}
    assert remembered() == {measured.machine_name(): {name: TIMES}}
    measured._known.clear()
    times_of({name: module})
    assert len(asked) == 1
    for damage in ("", "[]", "{", json.dumps({measured.machine_name(): {name: {"packed": [1, 2]}}}), "\x00\xff"):
        file.write_text(damage)
        measured._known.clear()
        assert times_of({name: module}) == {name: TIMES}
    assert len(asked) == 6


def test_one_process_stays_with_what_it_measured_whatever_becomes_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "_known", {})
    module = layer()
    first = times_of({layer_name(module): module})
    (tmp_path / "home/multiply.json").unlink()
    assert times_of({layer_name(module): module}) == first


def test_what_is_remembered_of_no_layer_is_not_told() -> None:
    """Another version kept such figures, and a file may be damaged."""
    module = layer()
    times_of({layer_name(module): module})
    file = home.home() / "multiply.json"
    document = json.loads(file.read_text())
    document[measured.machine_name()] |= {name: {"packed": [1.0] * len(SIZES)} for name in ("adapters", "a b c d")}
    file.write_text(json.dumps(document))
    assert set(remembered()[measured.machine_name()]) == {layer_name(module)}


def test_the_plan_that_is_told_of_a_dense_base_is_the_one_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step in one call saves a base in 4 bits is nothing to it."""
    module = nn.Linear(IN, OUT).bfloat16().requires_grad_(False)
    times: Times = {"packed": [100.0] * 6, "dense-blocked": [90.0, *[80.0] * 5]}
    monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: dict.fromkeys(layers, times))
    monkeypatch.setattr("lora_rt.core.multiply.fastest.ways_of", lambda layer: list(times))
    (chosen,) = choose([module], "auto", 1 << 30).values()
    (words,) = told({layer_name(module): times}).values()
    assert chosen[5] == "dense-blocked"
    assert "64 or more: a copy in float32, laid out in blocks" in words


def test_measuring_gives_every_way_of_every_kind_of_layer_a_time() -> None:
    modules = [layer(), layer(dtype=torch.float32), nn.Linear(IN, OUT).bfloat16().requires_grad_(False)]
    layers = {layer_name(module): module for module in modules}
    found = measure(layers, torch.full((OUT * IN * 3,), 0.5))
    for name, times in found.items():
        assert set(times) == set(ways_of(layers[name]))
        assert all(len(row) == len(SIZES) and row[0] for row in times.values())
    assert set(found) == set(layers)


def test_a_layer_of_four_features_is_measured_with_few_copies_of_its_weight() -> None:
    pool = measured._Pool(torch.full((1 << 16,), 0.5), 4, 4, "blocked", torch.float32)
    assert len(pool._weights) <= 256


def test_layers_go_one_way_one_after_another_as_in_a_pass() -> None:
    ran: list[str] = []
    runs = {way: {what: partial(ran.append, f"{what} {way}") for what in "qk"} for way in ("dense", "packed")}
    found = measured._race(runs)
    assert ran[:6] == ["q dense", "k dense"] * 3
    assert ran[6:12] == ["q packed", "k packed"] * 3
    assert {what: set(ways) for what, ways in found.items()} == {what: {"dense", "packed"} for what in "qk"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_large_weight_is_cast_some_outputs_at_a_time_and_its_product_is_the_same(
    tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = torch.randn(200, IN).bfloat16(), torch.randn(1, tokens, IN)
    added = torch.randn(200) if bias else None
    whole = linear(x, weight.float(), added)
    cast: list[int] = []

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast.append(len(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(multiply, "_SLICE", 64 * IN)
    monkeypatch.setattr(multiply, "linear", noted)
    torch.testing.assert_close(widened_product(x, weight, added), whole, rtol=1e-5, atol=1e-5)
    assert cast == [64, 64, 64, 8]


@pytest.mark.parametrize("wish", ["dequantize", "dense"])
@pytest.mark.parametrize("precision", ["int4", "bfloat16"])
def test_a_base_says_the_same_in_every_way_and_keeps_its_bytes(zoo: Zoo, precision: str, wish: str) -> None:
    folder, ids = str(zoo.base("llama")), [[5, 9, 3, 7, 11, 2], [1, 2, 3, 4, 5, 6]]
    with (
        Runtime.load(folder, precision=precision, device="cpu", multiply="packed") as plain,
        Runtime.load(folder, precision=precision, device="cpu", multiply=wish) as other,
    ):
        assert other.parts.products.layers
        assert not plain.parts.products.layers
        wanted, found = plain.logits(ids), other.logits(ids)
        assert (wanted - found).abs().max() < 0.05 * wanted.std()
        assert torch.equal(found, other.logits(ids))
        if not bnb.functional.has_avx512bf16():
            assert plain.base_digest() == other.base_digest()


def test_a_closed_runtime_leaves_the_model_its_own_forwards(zoo: Zoo) -> None:
    runtime = Runtime.load(str(zoo.base("llama")), precision="int4", device="cpu", multiply="dense")
    model = runtime.model
    runtime.close()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_a_wish_that_is_none_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="quickly"):
        Runtime.load("default", multiply="quickly")
    monkeypatch.setenv("LORA_RT_MULTIPLY", "slowly")
    with pytest.raises(UsageError, match="slowly"):
        check_wish(None)
    assert check_wish("dense") == "dense"


def test_a_tiny_base_stays_as_it_is(zoo: Zoo) -> None:
    assert not Products(load_base(str(zoo.base("llama")), "int4", "cpu").model).layers


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(monkeypatch, capsys)


def test_doctor_says_how_layers_are_multiplied_here(zoo: Zoo, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_known", {})
    assert "not measured yet" in cli("doctor").out
    Runtime.load(str(zoo.base("llama")), precision="int4", device="cpu", multiply="dense").close()
    found = next(check for check in json.loads(cli("doctor", "--json").out) if "multiplying" in check["name"])
    assert found["status"] == "ok"
    assert "one token" in found["detail"]
    assert "MiB in float32" in found["detail"]


def test_the_command_line_refuses_a_way_that_is_none_before_anything_is_loaded(cli: Cli) -> None:
    refused = cli("compose", "logic", "-p", "rain", "--multiply", "quickly")
    assert refused.code == 2
    assert "packed, dequantize, dense" in refused.err


def test_a_plan_knows_the_most_that_dense_copies_take(zoo: Zoo) -> None:
    folder = str(zoo.base("llama"))
    wanted = sum(
        module.in_features * module.out_features * (6 if "lm_head" not in name else 4)
        for name, module in load_base(folder, "int4", "cpu").model.named_modules()
        if isinstance(module, nn.Linear)
    )
    workload = Workload("cpu", r=2, target_modules=("q_proj",), batch=1, seq=8, adapters=1, labels=4)
    (item,) = plan_memory(read_config(folder), ["int4"], workload).precisions
    assert item.inference.copies == wanted


def test_a_step_in_one_call_reads_four_bits_where_they_are_hardly_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    times: dict[str, list[float | None]] = {
        "packed": [90.0] * 6,
        "dense-half": [20.0, 20.0, 20.0, 20.0, 20.0, 20.0],
        "four-bit": [9.0, 10.0, 15.0, 22.0, 25.0, 60.0],
    }
    monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: dict.fromkeys(layers, times))
    monkeypatch.setattr("lora_rt.core.multiply.fastest._TINY", 0)
    model = nn.Sequential(layer())
    products = Products(model)
    if "four-bit" not in ways_of(layer()):
        pytest.skip(lacks("AVX2"))
    forward = model[0].forward
    assert isinstance(forward, Product)
    assert [forward.is_near(rows) for rows in (1, 2, 4, 8, 16, 63, 64)] == [True] * 6 + [False]
    assert forward.four_bit() is forward.four_bit() is not None
    alone = Product(layer(), ["four-bit", *["packed"] * 5])
    assert [alone.is_near(rows) for rows in (1, 2)] == [True, False]
    products.close()


def test_who_only_looks_at_shapes_makes_no_copies() -> None:
    product = Product(layer(), always("dense-wide"))
    with looking():
        found = product(given(3))
    assert not product._kept
    assert torch.equal(found, product.own(given(3)))
    made = product(given(3))
    assert product._kept
    with looking():
        assert torch.equal(product(given(3)), made)


def test_copies_are_not_kept_beside_kernels_of_our_own_that_are_nearly_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make those of a base takes a second or two, for which a first token would wait."""

    def kept(*half: float) -> set[str]:
        times = {
            **{way: [9000.0] * 6 for way in ways_of(layer())},
            "four-bit": [100.0, 100.0, 100.0, 100.0, 100.0, 1000.0],
            "dense-half": list(half),
        }
        monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: dict.fromkeys(layers, times))
        return set(choose([layer()], "auto", 1 << 30)[layer_name(layer())])

    if not {"four-bit", "dense-half"} <= set(ways_of(layer())):
        pytest.skip(lacks("FBGEMM"))
    assert kept(100.0, 80.0, 50.0, 80.0, 80.0, 950.0) == {"four-bit"}  # one class may have been disturbed
    assert "dense-half" in kept(100.0, 100.0, 100.0, 100.0, 100.0, 700.0)
    assert "dense-half" in kept(60.0, 60.0, 60.0, 60.0, 60.0, 950.0)


def test_they_are_kept_as_ever_where_a_layer_has_no_kernel_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What copies of an output head gain is weighed as without kernels of our own, whatever other layers have."""
    module, head = layer(), nn.Linear(IN, OUT, bias=False).bfloat16().requires_grad_(False)
    if "four-bit" not in ways_of(module):
        pytest.skip("no kernel for 4-bit weights here")
    slow: dict[str, list[float | None]] = {way: [9000.0] * 6 for way in (*ways_of(module), *ways_of(head))}
    times = {
        layer_name(module): {**slow, "four-bit": [100.0] * 6},
        layer_name(head): {**slow, "packed": [100.0] * 6, "dense-wide": [60.0] * 6},  # of both layers 0.77
    }
    monkeypatch.setattr("lora_rt.core.multiply.fastest.times_of", lambda layers: times)
    found = choose([module, head], "auto", 1 << 30)
    assert {name: set(ways) for name, ways in found.items()} == {
        layer_name(module): {"four-bit"},
        layer_name(head): {"dense-wide"},
    }
