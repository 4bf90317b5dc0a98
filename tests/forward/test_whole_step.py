"""A step over 4-bit weights in one call is the model's own step, whoever the threads are and whatever is added."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_rt.core.base.load import load_base
from lora_rt.core.engine.lanes import LanePlan
from lora_rt.core.engine.lru import LRUCache
from lora_rt.core.engine.pieces import OwnFactors
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.multiply import four_bit
from lora_rt.core.multiply.product import Product
from lora_rt.core.multiply.ways import SIZES, dense_weight
from lora_rt.core.native import compiled, openmp
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.contract import Gate
from lora_rt.plugins.manager import load_modes
from lora_rt.registry import home
from lora_rt.registry.registry import Registry
from support.decoders import rows_of_text
from support.features import lacks
from support.tiny import MLP, TARGETS, Zoo, config_of, random_model, save_adapter

if not (compiled.is_there() and four_bit.are_there()):
    pytest.skip(lacks("AVX2"), allow_module_level=True)

from lora_rt.core.forward import whole_kernel as k
from lora_rt.core.forward.whole_step import WholeStep

pytestmark = pytest.mark.slow
KINDS = ("llama", "mistral", "qwen2", "qwen3")
SIZED: dict[str, Any] = {"intermediate_size": 192}
CHANGES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 32}}


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of rows of all steps that were made in one call."""
    monkeypatch.setenv("LORA_RT_BLOCKS", "1")
    found: list[int] = []
    own = WholeStep.__call__

    def step(self: WholeStep, embedded: Tensor, *given: Any) -> Tensor:
        found.append(len(embedded))
        return own(self, embedded, *given)

    monkeypatch.setattr(WholeStep, "__call__", step)
    with torch.inference_mode():
        yield found


def in_4_bits(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The same model, all of its linear layers but the output head in 4 bits, multiplied by the kernel for these."""
    with torch.inference_mode(False):
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and module is not model.get_output_embeddings():
                biased = module.bias is not None
                made = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, biased, compute_dtype=dtype, quant_type="nf4"
                )
                made.load_state_dict({"weight": module.weight} | ({"bias": module.bias} if biased else {}))
                made = made.to("cpu").to(dtype).eval().requires_grad_(False)
                made.support_avx512bf16_for_cpu = False
                made.forward = Product(made, ["four-bit"] * len(SIZES))
                model.set_submodule(name, made)
    return model


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    with torch.inference_mode(False):
        model = random_model(config_of(kind, **{**SIZED, **CHANGES.get(kind, {}), **changes}))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
            if "bias" in name:
                parameter.data += torch.randn_like(parameter) * 0.3
    return in_4_bits(model.to(dtype), dtype)


def steps(lm: CausalLM, by_blocks: bool = True, rows: int = 5, plan: Any = None, first: int = 9) -> Tensor:
    """The logits of all steps behind the first tokens, (rows, steps, vocab)."""
    ids, mask, positions = rows_of_text(rows, 40)
    cache = lm.new_cache()
    lm.forward(ids[:, :first], mask[:, :first], positions[:, :first], plan=plan, cache=cache, keep=1)
    found = []
    for n in range(first + 1, ids.shape[1] + 1):
        now = ids[:, n - 1 : n], mask[:, :n], positions[:, n - 1 : n]
        found.append(lm.forward(*now, plan=plan, cache=cache, keep=1, by_blocks=by_blocks))
    return torch.cat(found, dim=1)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"attention_bias": True}, {"rms_norm_eps": 0.1}],
    ids=["grouped", "ungrouped", "one", "biased", "eps"],
)
def test_a_step_in_float32_is_the_model_s_own(kind: str, changes: dict[str, Any], taken: list[int]) -> None:
    lm = CausalLM(model_of(kind, **changes))
    for rows in (1, 5):
        assert lm.blocks is not None  # with its trial
        taken.clear()
        close(steps(lm, rows=rows), steps(lm, False, rows=rows))
        assert taken == [rows] * 31


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bfloat16_differs_from_the_model_s_own_by_rounding_alone(kind: str, taken: list[int]) -> None:
    lm = CausalLM(model_of(kind, torch.bfloat16))
    with torch.inference_mode(False):
        exact = random_model(config_of(kind, **{**SIZED, **CHANGES.get(kind, {})}))
        for name, parameter in exact.named_parameters():
            layer = lm.model.get_submodule(name.rpartition(".")[0])
            four = hasattr(layer, "compute_dtype") and name.endswith("weight")
            parameter.data = (dense_weight(layer) if four else lm.model.get_parameter(name)).detach().float()
    wanted = steps(CausalLM(exact), False)
    mine, own = ((steps(lm, by_blocks).float() - wanted).abs() for by_blocks in (True, False))
    assert len(taken) >= 31
    assert mine.mean() <= 1.1 * own.mean()
    assert (mine.mean(-1) <= 4 * own.mean(-1) + 0.05 * wanted.std()).all()  # of each row and step


def test_any_number_of_threads_makes_the_same_and_of_fewer_than_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, taken: list[int]
) -> None:
    lm = CausalLM(model_of("llama"))
    wanted = {rows: steps(lm, False, rows=rows) for rows in (1, 2, 5)}
    team = openmp.team()
    alone = None if team is None else team._replace(run=lambda *given: team.run(*given[:2], 1, 0))
    for threads, there in ((1, team), (2, team), (3, team), (7, team), (5, alone), (2, None)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(openmp, "team", lambda there=there: there)
        for rows, usual in wanted.items():
            close(steps(lm, rows=rows), usual)
    assert len(taken) >= 6 * 3 * 31


def test_threads_that_step_at_once_do_not_disturb_each_other(zoo: Zoo, tmp_path: Path, taken: list[int]) -> None:
    path = adapter(tmp_path / "all", "llama", seed=1, targets=[*TARGETS["llama"], *MLP["llama"]])
    with runtime_of(zoo, "llama") as runtime:
        runtime.load_adapter(str(path), "all")
        lm, bank = runtime.parts.lm, runtime.parts.bank
        plans = [bank.plan([{"all": weight}] * 3) if weight else None for weight in (0.0, 0.4, 0.9, -0.3)]
        wanted = [steps(lm, False, rows=3, plan=plan) for plan in plans]
        found: list[list[Tensor]] = [[] for _ in plans]

        def go(number: int) -> None:
            with torch.inference_mode():
                found[number] = [steps(lm, rows=3, plan=plans[number]) for _ in range(4)]

        threads = [threading.Thread(target=go, args=(number,)) for number in range(len(plans))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert taken.count(3) == 4 * 4 * 31
    for mine, usual in zip(found, wanted, strict=True):
        assert len(mine) == 4
        for one in mine:
            close(one, usual)


def test_what_a_step_reads_lives_as_long_as_it_whatever_others_do_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may look again, and find other weights, while the kernel runs."""
    lm = CausalLM(model_of("llama", num_hidden_layers=30))
    assert lm.blocks is not None
    own, done = openmp.run, []

    def run(together: Any, address: int, arguments: int, threads: int) -> None:
        places = [(ctypes.c_int64 * k.STEP).from_address(arguments)[at] for at in (k.LAYERS, k.NUMBERS, k.ADAPTERS)]
        before = [bytes((ctypes.c_char * 800).from_address(place)) for place in places]
        with torch.inference_mode(False):
            for block in lm.model.model.layers:
                block.input_layernorm.weight = nn.Parameter(block.input_layernorm.weight.clone(), requires_grad=False)
        assert lm.blocks is not None
        other = lm.blocks.whole.ready(5, None, None)
        assert other is not None
        kept = [np.full_like(other.numbers, 7.0) for _ in range(50)]  # what was freed would be filled again
        assert before == [bytes((ctypes.c_char * 800).from_address(place)) for place in places]
        done.append(len(kept))
        own(together, address, arguments, threads)

    wanted = steps(lm, False)
    monkeypatch.setattr(openmp, "run", run)
    close(steps(lm), wanted)
    assert len(done) == 31


def adapter(folder: Path, kind: str, **options: Any) -> Path:
    with torch.inference_mode(False), torch.enable_grad():
        return save_adapter(folder, config_of(kind, **SIZED, **CHANGES.get(kind, {})), **options)


def round_weights(path: Path) -> None:
    """Let an adapter have numbers that bfloat16 holds."""
    file = path / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)


def added_by(runtime: Runtime, mixes: Sequence[dict[str, float]]) -> Tensor:
    """The logits of one step of rows under these mixes, behind the same tokens of the base."""
    lm, plan = runtime.parts.lm, runtime.parts.bank.plan(mixes)
    ids, mask, positions = (one[1:2, :9] for one in rows_of_text(tokens=40))
    cache = lm.new_cache()
    lm.forward(ids[:, :8], mask[:, :8], positions[:, :8], cache=cache, keep=1)
    cache.batch_repeat_interleave(len(mixes))
    last = [one.expand(len(mixes), -1) for one in (ids[:, 8:], mask, positions[:, 8:])]
    return lm.forward(*last, plan=plan, cache=cache, keep=1)


def runtime_of(zoo: Zoo, kind: str) -> Runtime:
    with torch.inference_mode(False):
        base = load_base(str(zoo.base(kind, **SIZED, **CHANGES.get(kind, {}))), "float32", "cpu")
        in_4_bits(base.model)
        return Runtime(base, load_modes(), Registry(project=zoo.folder))


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_add_what_they_add_in_the_model_s_own_step(
    zoo: Zoo, kind: str, taken: list[int], tmp_path: Path
) -> None:
    everywhere = [*TARGETS[kind], *MLP[kind]]
    adapters = {
        "all": adapter(tmp_path / "all", kind, seed=1, targets=everywhere),
        "some": adapter(tmp_path / "some", kind, seed=2, targets=["q_proj", "down_proj"], r=3, use_rslora=True),
        "wide": adapter(tmp_path / "wide", kind, seed=3, targets=everywhere, r=20),
        "v": adapter(tmp_path / "v", kind, seed=4, targets=["v_proj"], r=1),
    }
    with runtime_of(zoo, kind) as runtime:
        for name, path in adapters.items():
            runtime.load_adapter(str(path), name)
        many = [{"all": 0.7, "some": -0.4}, {"wide": 1.3}, {}, {"v": 0.8}, {"all": 0.2, "wide": 0.1, "v": -1.0}]
        lm, bank = runtime.parts.lm, runtime.parts.bank
        for weights in (many, [{"all": 1.0}], [{"some": 0.5}], [{"v": 2.0}], [{"all": 0.5, "some": 0.2}], many[:2]):
            rows, plan = len(weights), bank.plan(weights)
            taken.clear()
            with torch.inference_mode():
                found, usual = steps(lm, rows=rows, plan=plan), steps(lm, False, rows=rows, plan=plan)
                assert (usual - steps(lm, False, rows=rows)).abs().max() > 0.01
            close(found, usual)
            assert taken.count(rows) >= 31


def test_adapters_in_bfloat16_are_as_far_from_float32_as_in_the_model_s_own_step(
    tmp_path: Path, zoo: Zoo, taken: list[int]
) -> None:
    path = adapter(tmp_path / "all", "llama", seed=1, targets=[*TARGETS["llama"], *MLP["llama"]])
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        with torch.inference_mode(False):
            base = load_base(str(zoo.base("llama", **SIZED)), "float32", "cpu")
            in_4_bits(base.model.to(dtype), dtype)
            runtime = Runtime(base, load_modes(), Registry(project=zoo.folder))
        with runtime:
            runtime.load_adapter(str(path), "all")
            plan = runtime.parts.bank.plan([{"all": 0.5}] * 5)
            lm = runtime.parts.lm
            found[dtype] = [steps(lm, by_blocks, plan=plan).float() for by_blocks in (True, False)]
    exact = found[torch.float32][1]
    mine, own = ((one - exact).abs().mean() for one in found[torch.bfloat16])
    assert len(taken) >= 62
    assert mine <= 1.1 * own


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_few_ranks_are_shared_by_many_threads(
    zoo: Zoo, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {
        "one": adapter(tmp_path / "one", "llama", seed=1, targets=["q_proj", "v_proj", "down_proj"], r=1),
        "two": adapter(tmp_path / "two", "llama", seed=2, targets=[*TARGETS["llama"], *MLP["llama"]], r=9),
    }
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with runtime_of(zoo, "llama") as runtime:
        for name, path in paths.items():
            runtime.load_adapter(str(path), name)
        lm, bank = runtime.parts.lm, runtime.parts.bank
        for weights in ([{"one": 0.5, "two": 0.4}], [{"one": 0.5}], [{"one": 0.5}, {"two": 0.4}], [{"two": 0.4}] * 5):
            plan = bank.plan(weights)
            close(steps(lm, rows=len(weights), plan=plan), steps(lm, False, rows=len(weights), plan=plan))


def test_a_bank_that_is_closed_adds_nothing_though_another_one_is_over_the_model(zoo: Zoo, tmp_path: Path) -> None:
    path = adapter(tmp_path / "all", "llama", seed=1, targets=TARGETS["llama"])
    with runtime_of(zoo, "llama") as first:
        first.load_adapter(str(path), "all")
        lm, plan = first.parts.lm, first.parts.bank.plan([{"all": 0.9}] * 5)
        with Runtime(first.parts.base, load_modes(), Registry(project=zoo.folder)) as second:
            second.load_adapter(str(path), "all")
            other = second.parts.bank.plan([{"all": -0.5}] * 5)
            for one in (plan, other, None, plan):
                close(steps(lm, plan=one), steps(lm, False, plan=one))
            alone = first.parts.bank.plan([{"all": 0.9}])
            first.parts.bank.close()
            close(steps(lm, rows=1, plan=alone), steps(lm, rows=1))
            close(steps(lm, plan=plan), steps(lm))
            close(steps(lm, plan=other), steps(lm, False, plan=other))


@pytest.mark.parametrize("narrow", [False, True])
def test_rows_on_lanes_of_their_own_are_taken(zoo: Zoo, tmp_path: Path, taken: list[int], narrow: bool) -> None:
    targets = [*TARGETS["llama"], *MLP["llama"]]
    with runtime_of(zoo, "llama") as runtime:
        for number in range(12):
            part = targets[: 1 + number % len(targets)]
            path = adapter(tmp_path / f"a{number}", "llama", seed=number, targets=part, r=2 + number % 3)
            if narrow:
                round_weights(path)
            runtime.load_adapter(str(path), f"a{number}")
        runtime.load_adapter(str(adapter(tmp_path / "b", "llama", seed=77, targets=targets, lora_bias=True)), "b")
        lm, bank = runtime.parts.lm, runtime.parts.bank
        assert lm.blocks is not None
        many: list[dict[str, float]] = [{f"a{number}": 0.7, f"a{number + 1}": -0.2} for number in range(0, 12, 2)]
        for weights, wanted in ((many, True), ([*many, {}, {"a3": 1.0}], True), ([*many, {"b": 1.0}], False)):
            plan, rows = bank.plan(weights), len(weights)
            assert isinstance(plan, LanePlan)
            usual = steps(lm, False, rows=rows, plan=plan)
            for threads in (1, 2, 40):
                taken.clear()
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                    close(steps(lm, rows=rows, plan=plan), usual)
                assert bool(taken) == wanted
        narrows = {one.narrow for one in bank._own._known.values()}
        assert narrows == {narrow, False}  # the one with biases is in float32


def test_what_is_no_number_in_a_row_s_adapter_is_none_of_the_others(zoo: Zoo, tmp_path: Path, taken: list[int]) -> None:
    targets = [*TARGETS["llama"], *MLP["llama"]]
    with runtime_of(zoo, "llama") as runtime:
        for number in range(3):
            path = adapter(tmp_path / f"a{number}", "llama", seed=number, targets=targets, r=5)
            runtime.load_adapter(str(path), f"a{number}")
        bank = runtime.parts.bank
        rows: list[dict[str, float]] = [{"a0": 0.7}, {"a1": 0.5}, {"a2": 0.4}]
        usual = added_by(runtime, rows)
        for factors in bank.residents["a1"].factors.values():
            factors.b[:] = torch.nan
        bank._laid_out, bank._own = LRUCache(), OwnFactors(bank.topology)
        found = added_by(runtime, rows)
        assert taken
        assert torch.equal(found[[0, 2]], usual[[0, 2]])
        assert found[1].isnan().all()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_that_act_on_none_of_the_layers_are_taken(
    zoo: Zoo, tmp_path: Path, taken: list[int], target: str
) -> None:
    with runtime_of(zoo, "llama") as runtime:
        for number in range(8):
            path = adapter(tmp_path / f"a{number}", "llama", seed=number, targets=[target], r=2)
            runtime.load_adapter(str(path), f"a{number}")
        lm, bank = runtime.parts.lm, runtime.parts.bank
        for weights in ([{"a0": 0.7}], [{"a0": 0.7}, {"a1": 0.2}], [{f"a{n}": 0.5} for n in range(8)]):
            plan, rows = bank.plan(weights), len(weights)
            assert isinstance(plan, LanePlan) == (rows == 8 and target == "lm_head")
            taken.clear()
            close(steps(lm, rows=rows, plan=plan), steps(lm, False, rows=rows, plan=plan))
            assert taken


def test_gates_of_ranks_are_taken_and_what_is_not_known_is_stepped_by_blocks(
    zoo: Zoo, taken: list[int], tmp_path: Path
) -> None:
    targets = [*TARGETS["llama"], *MLP["llama"]]
    plain = adapter(tmp_path / "plain", "llama", seed=1, targets=targets)
    others = [
        adapter(tmp_path / "dora", "llama", seed=2, targets=["v_proj", "up_proj"], use_dora=True),
        adapter(tmp_path / "biased", "llama", seed=3, targets=targets, r=4, lora_bias=True),
    ]
    with runtime_of(zoo, "llama") as runtime:
        runtime.load_adapter(str(plain), "plain")
        lm, bank = runtime.parts.lm, runtime.parts.bank
        cases: list[tuple[Any, bool]] = [
            (bank.plan([{"plain": 0.9}] * 2, {"plain": Gate(ranks=torch.rand(2, 1, 1, 8))}), True),
            (bank.plan([{"plain": 0.9}], {"plain": Gate(ranks=torch.tensor(0.3))}), True),
            (bank.plan([{"plain": 0.9}] * 2, {"plain": Gate(heads=torch.rand(2, 1, 1, 4))}), False),
        ]
        for number, other in enumerate(others):
            runtime.load_adapter(str(other), f"other{number}")
            cases.append((bank.plan([{f"other{number}": 0.8, "plain": 0.3}] * 2), False))
        for plan, wanted in cases:
            rows = 1 if plan is cases[1][0] else 2
            steps(lm, rows=rows)  # with its trial
            taken.clear()
            with torch.inference_mode():
                close(steps(lm, rows=rows, plan=plan), steps(lm, False, rows=rows, plan=plan))
            assert bool(taken) == wanted


Change = Callable[[Any], Any]


def _hook(model: Any) -> Any:
    return model.model.layers[1].mlp.up_proj.register_forward_hook(lambda _layer, _given, output: output * 2)


def _bias(model: Any) -> None:
    model.model.layers[0].self_attn.k_proj.bias.add_(1.0)


def _other_bias(model: Any) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer.bias = nn.Parameter(layer.bias * 3, requires_grad=False)


def _moved_bias(model: Any) -> None:
    layer = model.model.layers[0].self_attn.v_proj
    layer.bias.data = layer.bias * -2


def _norm(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.weight = nn.Parameter(norm.weight * 0.5, requires_grad=False)


def _strided_norm(model: Any) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    norm.weight = nn.Parameter(torch.stack([norm.weight, norm.weight * 2], dim=1)[:, 1], requires_grad=False)


def _eps(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5


def _scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def _weight(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight, attention.o_proj.weight = attention.o_proj.weight, attention.q_proj.weight


def _forward(model: Any) -> None:
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = lambda x, own=layer.forward: own(x) * 2


def _dense_layer(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj = nn.Linear(64, 192, bias=False).requires_grad_(False)


def _other_layer(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def _one_bias(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.tensor([0.7]), requires_grad=False)


def _shorter_bias(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.bias.data = torch.tensor([0.7])


def _short_norm(model: Any) -> None:
    model.model.norm.weight = nn.Parameter(torch.tensor([1.5]), requires_grad=False)


def _of_inference(model: Any) -> None:
    with torch.inference_mode():  # torch does not count changes of what is made in it
        _dense_layer(model)


CHANGED = [_short_norm, _hook, _bias, _other_bias, _moved_bias, _norm, _strided_norm, _eps, _scaling, _weight, _forward]
CHANGED += [_dense_layer, _of_inference, _other_layer, _one_bias, _shorter_bias]


@pytest.mark.parametrize("change", CHANGED)
def test_what_is_changed_after_the_first_step_counts(change: Change, taken: list[int]) -> None:
    lm = CausalLM(model_of("llama", attention_bias=True))
    before = steps(lm)
    assert taken.count(5) == 31
    with torch.inference_mode(False), torch.no_grad():
        change(lm.model)
    after = steps(lm)
    close(after, steps(lm, False))
    assert (after - before).abs().max() > 1e-3


def test_a_trial_is_one_of_the_step_that_is_meant(taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is faster for its two rows; and what fails it is stepped by blocks."""
    model = model_of("llama")
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.forward = Product(module, ["four-bit", *["dense-wide"] * 5])
    lm = CausalLM(model)
    assert lm.blocks is not None
    assert taken == [2, 2]
    taken.clear()
    steps(lm, rows=1)
    steps(lm, rows=2)
    assert set(taken) == {1}
    lm = CausalLM(model_of("llama"))
    monkeypatch.setattr(WholeStep, "__call__", lambda *_: torch.zeros(2, 1, 264))
    assert lm.blocks is not None
    assert lm.blocks.whole is None


def test_numbers_of_rows_for_which_others_are_faster_are_stepped_by_blocks(taken: list[int]) -> None:
    model = model_of("llama")
    for name, module in model.named_modules():
        if hasattr(module, "compute_dtype"):
            ways = ["dense-wide"] * len(SIZES) if "v_proj" in name else ["four-bit"] * len(SIZES)
            module.forward = Product(module, ["four-bit", *ways[1:]], near=[2])  # of 4 to 7 tokens
    lm = CausalLM(model)
    assert lm.blocks is not None
    for rows, wanted in ((1, True), (3, False), (5, True), (1, True), (8, False), (3, False)):
        taken.clear()
        close(steps(lm, rows=rows), steps(lm, False, rows=rows))
        assert bool(taken) == wanted


def test_layers_of_another_size_are_not_taken() -> None:
    lm, wider = CausalLM(model_of("llama")), model_of("llama", intermediate_size=256)
    steps(lm)
    lm.model.model.layers[1].mlp.gate_proj = wider.model.layers[1].mlp.gate_proj
    assert lm.blocks is not None
    with pytest.raises((RuntimeError, ValueError)):  # gate and up do not go together; nothing is written
        steps(lm)


def test_steps_outside_of_inference_mode_are_the_same(taken: list[int]) -> None:
    lm = CausalLM(model_of("llama"))
    wanted = steps(lm, rows=2)
    with torch.inference_mode(False), torch.no_grad():
        assert torch.equal(steps(lm, rows=2), wanted)
    assert torch.equal(steps(lm, rows=2), wanted)
    assert len(taken) >= 3 * 31


def test_a_cache_of_fewer_rows_is_refused_and_stays_as_it_was() -> None:
    lm = CausalLM(model_of("llama"))
    steps(lm)
    assert lm.blocks is not None
    cache = lm.new_cache()
    with torch.inference_mode():
        one, two = torch.ones(1, 1, dtype=torch.long), torch.ones(2, 1, dtype=torch.long)
        lm.blocks(one, one, torch.ones(1, 1), cache)
        with pytest.raises((ValueError, RuntimeError)):
            lm.blocks(two, two, torch.ones(2, 2), cache)
        assert cache.get_seq_length() == 1
        lm.blocks(one, one, torch.ones(1, 2), cache)


def test_a_cache_in_another_dtype_is_left_to_others(taken: list[int]) -> None:
    lm = CausalLM(model_of("llama"))
    ids, mask, positions = rows_of_text(tokens=40)
    cache = lm.new_cache()
    lm.forward(ids[:, :9], mask[:, :9], positions[:, :9], cache=cache, keep=1)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    assert lm.blocks is not None
    assert not lm.blocks.can(cache)
    for change in (lambda kept: kept[:, :, :4], lambda kept: kept[:2], lambda kept: kept[..., :8].contiguous()):
        cache = lm.new_cache()
        lm.forward(ids[:, :9], mask[:, :9], positions[:, :9], cache=cache, keep=1)
        assert lm.blocks.can(cache)
        cache.layers[1].keys = change(cache.layers[1].keys)
        assert not lm.blocks.can(cache)


def test_long_texts_and_scaled_ropes(taken: list[int]) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    lm = CausalLM(model_of("llama", rope_parameters=rope, tie_word_embeddings=True))
    ids = torch.randint(8, 260, (3, 150), generator=torch.Generator().manual_seed(1))
    mask, positions = torch.ones_like(ids), torch.arange(150).expand(3, 150)
    found = []
    for by_blocks in (True, False):
        cache, said = lm.new_cache(), []
        lm.forward(ids[:, :5], mask[:, :5], positions[:, :5], cache=cache, keep=1)
        for n in range(6, 151):
            now = ids[:, n - 1 : n], mask[:, :n], positions[:, n - 1 : n]
            said.append(lm.forward(*now, cache=cache, keep=1, by_blocks=by_blocks))
        found.append(torch.cat(said, dim=1))
    close(*found)
    assert len(taken) >= 145


def test_a_row_without_a_number_does_not_touch_the_others() -> None:
    lm = CausalLM(model_of("llama"))
    ids, mask, positions = rows_of_text(tokens=40)
    caches = [lm.new_cache() for _ in range(2)]
    for cache in caches:
        lm.forward(ids[:, :9], mask[:, :9], positions[:, :9], cache=cache, keep=1)
    caches[1].layers[0].keys[2, 0, 4] = float("nan")
    clean, found = (lm.forward(ids[:, 9:10], mask[:, :10], positions[:, 9:10], cache=cache, keep=1) for cache in caches)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], clean[others])


def test_what_a_cache_lends_is_never_written(taken: list[int]) -> None:
    """Prompts that are kept share memory with those who go on from them."""
    lm = CausalLM(model_of("llama"))
    ids, mask, positions = rows_of_text(1, 40)
    cache = lm.new_cache()
    lm.forward(ids[:, :9], mask[:, :9], positions[:, :9], cache=cache, keep=1)
    lm.forward(ids[:, 9:10], mask[:, :10], positions[:, 9:10], cache=cache, keep=1)
    shown = [(layer.keys, layer.keys.clone(), layer.values, layer.values.clone()) for layer in cache.layers]
    for n in range(11, 41):
        lm.forward(ids[:, n - 1 : n], mask[:, :n], positions[:, n - 1 : n], cache=cache, keep=1)
    assert len(taken) >= 31
    assert all(torch.equal(keys, then) and torch.equal(values, old) for keys, then, values, old in shown)


def test_a_kernel_that_is_not_compiled_leaves_steps_by_blocks(
    monkeypatch: pytest.MonkeyPatch, taken: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(_dtype: Any) -> int:
        raise ValueError("numba has had enough")

    monkeypatch.setattr("lora_rt.core.forward.whole_kernel.step_of", refuses)
    lm = CausalLM(model_of("llama"))
    assert lm.blocks is not None
    close(steps(lm), steps(lm, False))
    assert not taken
    assert caplog.text.count("numba has had enough") == 1
    monkeypatch.setitem(sys.modules, "lora_rt.core.forward.whole_step", None)  # it lacks what it stands on
    lm = CausalLM(model_of("llama"))
    assert lm.blocks is not None
    close(steps(lm), steps(lm, False))


def test_what_a_step_computes_does_not_hang_on_what_a_process_compiled_or_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All of a step is one function: one that it called could be another file's, which adds up in another order."""
    k.step_of(np.float32)
    fresh = [made for made in k._made if not made.cache_hits]
    if not fresh:  # of what was found in a file numba does not tell what it is
        monkeypatch.setattr(home, "kernels", lambda: tmp_path)
        k.step_of.__wrapped__(np.float32)
        fresh = [k._made.pop()]
    for made in fresh:
        defined = re.findall(r"^define .*@(\S+)\(", made.inspect_llvm(), re.MULTILINE)
        assert [name for name in defined if "lora_rt" in name and "step" not in name.split("B2v")[0]] == []
        assert any("whole_kernel" in name for name in defined)
