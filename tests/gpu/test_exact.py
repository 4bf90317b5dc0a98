"""What every path of the engine computes is the dense sum, in every precision, on a CPU and on a GPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.base.precision import Precision
from lora_rt.core.engine import lanes
from lora_rt.core.engine.lanes import LanePlan
from lora_rt.core.engine.shared import SharedPlan
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.contract import Gate
from support.architectures.shrink import random_model, tiny_config
from support.summed import Gated, close, summed_logits, weights_of
from support.tiny import (
    EVEN,
    HEAD_SIZE,
    HEADS,
    LAYERS,
    MLP,
    TARGETS,
    Zoo,
    peft_model,
    save_tokenizer,
    some_ids,
    spec,
)

pytestmark = pytest.mark.slow

Terms = list[tuple[Path, float]]
TOKENS = 7


@pytest.fixture
def exact(precision: Precision) -> bool:
    return precision == "float32"


def ids_on(runtime: Runtime, rows: int) -> Tensor:
    return some_ids(rows=rows, tokens=TOKENS).to(runtime.model.device)


def test_rows_of_one_composition_are_the_dense_sum(runtime: Runtime, zoo: Zoo, terms: Terms, exact: bool) -> None:
    ids = ids_on(runtime, 3)
    found = runtime.logits(ids, compositions=spec(terms))
    wanted = summed_logits(runtime.model, zoo.base("llama", **EVEN), [terms] * 3, ids)
    close(found, wanted, runtime.logits(ids), exact=exact)


def test_rows_of_different_compositions_in_one_stack_are_each_its_own_dense_sum(
    runtime: Runtime, zoo: Zoo, terms: Terms, exact: bool
) -> None:
    ids = ids_on(runtime, 4)
    rows = [terms, terms[:2], [], terms[3:]]
    plan = runtime.parts.bank.plan(weights_of(rows))
    assert isinstance(plan, SharedPlan)
    found = runtime.logits(ids, compositions=[spec(row) or None for row in rows])
    base = runtime.logits(ids)
    close(found, summed_logits(runtime.model, zoo.base("llama", **EVEN), rows, ids), base, exact=exact)
    assert torch.equal(found[2], base[2]), "a row of the base alone is the base, bit for bit"


def test_rows_on_lanes_are_each_its_own_dense_sum(
    runtime: Runtime, zoo: Zoo, terms: Terms, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_WIDE", 0)  # on a GPU they are for wider stacks than these
    ids = ids_on(runtime, 6)
    rows = [[(adapter, weight)] for adapter, weight in terms]
    plan = runtime.parts.bank.plan(weights_of(rows))
    assert isinstance(plan, LanePlan)
    found = runtime.logits(ids, compositions=[spec(row) for row in rows])
    close(found, summed_logits(runtime.model, zoo.base("llama", **EVEN), rows, ids), runtime.logits(ids), exact=exact)


def test_gates_by_layer_row_token_and_head_are_the_dense_sum_of_what_they_leave(
    runtime: Runtime, zoo: Zoo, terms: Terms, exact: bool
) -> None:
    ids = ids_on(runtime, 2)
    (one, first), (two, second) = terms[0], terms[4]
    dice = torch.Generator().manual_seed(5)
    ranks = torch.rand((LAYERS, 2, TOKENS, 1), generator=dice).to(ids.device)
    heads = 2 * torch.rand((LAYERS, 1, 1, HEADS), generator=dice).to(ids.device)
    plan = runtime.parts.bank.plan([{one.name: first, two.name: second}], {one.name: Gate(ranks, heads)})
    assert plan is not None
    with torch.inference_mode(), plan.running(2, TOKENS):
        found = runtime.model(input_ids=ids).logits

    def gated(row: int) -> Gated:
        def adds(name: str, x: Tensor, change: Tensor) -> Tensor:
            layer, leaf = int(name.split(".")[2]), name.rsplit(".", 1)[-1]
            own = heads[layer, 0, 0]
            if leaf == "o_proj":
                added = (x * own.repeat_interleave(HEAD_SIZE)) @ change.T
            elif leaf in ("q_proj", "k_proj", "v_proj"):
                count = change.shape[0] // HEAD_SIZE
                added = (x @ change.T) * own.view(count, -1).mean(1).repeat_interleave(HEAD_SIZE)
            else:
                added = x @ change.T
            return first * ranks[layer, row] * added

        return adds

    rows = [[(one, gated(row)), (two, second)] for row in range(2)]
    close(found, summed_logits(runtime.model, zoo.base("llama", **EVEN), rows, ids), runtime.logits(ids), exact=exact)


def test_until_its_text_an_adapter_that_wakes_up_is_the_base_bit_for_bit(runtime: Runtime, terms: Terms) -> None:
    text = "two. So: four"
    ids = torch.tensor([runtime.tokenizer(text, add_special_tokens=False).input_ids], device=runtime.model.device)
    woken = len(runtime.tokenizer("two. So:", add_special_tokens=False).input_ids) - 1  # it completes the text
    found, base = runtime.logits(ids, compositions=f"{terms[0][0].name}[So:]"), runtime.logits(ids)
    assert torch.equal(found[:, :woken], base[:, :woken])
    assert not torch.equal(found[:, woken:], base[:, woken:])


KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True, "targets": [*TARGETS["llama"], *MLP["llama"]]},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "head": {"targets": ["down_proj", "lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_other_kinds_are_what_peft_makes_of_them(zoo: Zoo, device: str, kind: str) -> None:
    adapter = zoo.adapter("llama", changes=EVEN, seed=61, **KINDS[kind])
    runtime = zoo.runtime("llama", device=device, **EVEN)
    name, ids = zoo.load(runtime, adapter), ids_on(runtime, 2)
    found, base = runtime.logits(ids, compositions=[name, None]), runtime.logits(ids)
    with torch.inference_mode():
        wanted = peft_model(zoo.base("llama", **EVEN), adapter)(input_ids=ids.cpu()).logits.to(ids.device)
    close(found[:1], wanted[:1], base[:1], exact=True)
    assert torch.equal(found[1], base[1])


def test_fused_experts_are_what_peft_makes_of_them(tmp_path: Path, device: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = random_model(tiny_config("mixtral"))
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config).eval()
        dice = torch.Generator().manual_seed(1)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.2, generator=dice)
        tuned.save_pretrained(tmp_path / "one")
    with Runtime.load(str(tmp_path / "base"), precision="float32", device=device, project=tmp_path) as runtime:
        runtime.load_adapter(str(tmp_path / "one"), name="one")
        ids = ids_on(runtime, 3)
        found, base = runtime.logits(ids, compositions=["one", None, "one"]), runtime.logits(ids)
    with torch.inference_mode():
        wanted = tuned(input_ids=ids.cpu()).logits.to(ids.device)
    close(found[::2], wanted[::2], base[::2], exact=True)
    assert torch.allclose(found[1], base[1], atol=1e-4), "a GPU adds experts up in any order"
