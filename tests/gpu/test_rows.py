"""Rows that share passes, their tokens and the base's bytes, on a CPU and on a GPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rt.core.base.load import load_base
from lora_rt.core.base.precision import Precision
from lora_rt.core.generation.choosing import RowSampler, choose
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.requests.running import RequestRow
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from support.features import lacks
from support.tiny import EVEN, Zoo, mode_host

pytestmark = pytest.mark.slow

PROMPTS = ("rain, tin roof", "a", "two and two. So: four", "the unpaid bill on the table and a late bus", "so it is")
SPECS = (None, "one:0.7 two:0.3", "two:-1.5", "fading:2", "one[So:] fading", "one:2[ ] two:0.5[e]", "fading:3 one")
WAYS: tuple[dict[str, Any], ...] = ({}, {"temperature": 1.2, "top_p": 0.9}, {"temperature": 0.8, "top_k": 7})


class Fading:
    """Comes in over the first tokens of the answer, by position."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook of a module has no self
        answered = context.positions - (context.prompt_lengths[:, None] - 1)
        return Gate(ranks=(answered / 4).clamp(0, 1)[..., None])


def rows_of_all_kinds(runtime: Runtime, count: int) -> list[RequestRow]:
    dice = random.Random(count)
    found = []
    for seed in range(count):
        settings = {"max_new_tokens": dice.randrange(3, 14), "seed": seed, **dice.choice(WAYS)}
        found += runtime.rows([dice.choice(PROMPTS)], [dice.choice(SPECS)], **settings)
    return found


def test_rows_that_join_and_leave_say_what_they_say_alone(zoo: Zoo, device: str) -> None:
    runtime = zoo.runtime_with(mode_host(fading=Fading), "llama", device=device)
    runtime.load_adapter(str(zoo.adapter("llama", seed=41)), name="one")
    runtime.load_adapter(str(zoo.adapter("llama", seed=42, r=3, targets=["q_proj", "down_proj"])), name="two")
    runtime.load_adapter(str(zoo.adapter("llama", mode="fading", seed=3)), name="fading")
    together, alone = rows_of_all_kinds(runtime, 12), rows_of_all_kinds(runtime, 12)
    batch, waiting = runtime.batch(), list(together)
    while waiting or batch.rows:
        batch.add([waiting.pop() for _ in range(min(2, len(waiting)))])
        batch.step()
    for row in alone:
        single = runtime.batch()
        single.add([row])
        while single.rows:
            single.step()
    assert [row.answer for row in together] == [row.answer for row in alone]
    assert {row.ended for row in together} <= {"end", "length"}


@pytest.mark.gpu
def test_recorded_steps_say_what_passes_launched_one_by_one_say(zoo: Zoo) -> None:
    if not torch.cuda.is_available():
        pytest.skip(lacks("CUDA"))
    said = []
    for records in (True, False):
        runtime = zoo.runtime_with(mode_host(fading=Fading), "llama", device="cuda")
        runtime.load_adapter(str(zoo.adapter("llama", seed=41)), name="one")
        runtime.load_adapter(str(zoo.adapter("llama", seed=42, r=3, lora_bias=True)), name="two")
        runtime.load_adapter(str(zoo.adapter("llama", mode="fading", seed=3)), name="fading")
        if not records:
            runtime.parts.lm.steps = None
        specs = ["one:0.7 two:0.3", "fading:2", None, "one[So:] fading", "two:-1.5"]
        ids = [runtime.text.prompt_ids(prompt) for prompt in PROMPTS]
        options = {"max_new_tokens": 24, "min_new_tokens": 24}
        said.append([list(runtime.decode(ids[:n], specs[:n], **options)) for n in (5, 1, 3)])
        if records:
            assert runtime.parts.lm.steps is not None
            assert len(runtime.parts.lm.steps) >= 3
    assert said[0] == said[1]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_what_can_be_recorded_is(runtime: Runtime, terms: list[tuple[Path, float]], precision: Precision) -> None:
    """Products in int8 look at their input's outliers, for which the GPU is waited for."""
    list(runtime.decode([[9, 10, 11]], terms[0][0].name, max_new_tokens=12, min_new_tokens=12))
    assert runtime.parts.lm.steps is not None
    print(f"{precision}: {len(runtime.parts.lm.steps)} recordings")
    assert precision == "int8" or len(runtime.parts.lm.steps) > 0


def test_every_precision_decodes_a_mixed_batch_to_its_end(runtime: Runtime, terms: list[tuple[Path, float]]) -> None:
    name = terms[0][0].name
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "temperature": 0.8, "seed": 1}
    steps = list(runtime.decode([[9, 10, 11], [12] * 8, [13]], [name, None, f"{name}:-1"], **options))
    assert [len(step) for step in steps] == [3] * 9
    assert steps == list(runtime.decode([[9, 10, 11], [12] * 8, [13]], [name, None, f"{name}:-1"], **options))


def test_a_row_s_token_is_its_own_whoever_is_beside_it(device: str) -> None:
    """And one on every device, where a row's tokens are few: a wide nucleus is sorted on a GPU, and not on a CPU."""
    logits = torch.randn((16, 50_000), generator=torch.Generator().manual_seed(3)) * 3
    settings = [
        Sampling(temperature=0.3 + 0.1 * n, top_p=(1.0, 0.9, 0.5)[n % 3], top_k=(0, 50)[n % 2]) for n in range(15)
    ]
    settings.append(Sampling())

    def drawn(rows: list[int], where: str) -> list[int | None]:
        samplers = [RowSampler(settings[row], seed=row) for row in rows]
        return [token for _ in range(4) for token in choose(logits[rows].to(where), samplers)]

    everybody = list(range(16))
    together = drawn(everybody, device)
    on_cpu = drawn(everybody, "cpu")
    for row in everybody:
        assert drawn([row], device) == together[row::16]
        if settings[row].top_k or settings[row].greedy:
            assert together[row::16] == on_cpu[row::16]


@pytest.mark.gpu
def test_a_base_has_one_digest_on_every_device(zoo: Zoo, precision: Precision) -> None:
    if not torch.cuda.is_available():
        pytest.skip(lacks("CUDA"))
    here, there = (load_base(str(zoo.base("llama", **EVEN)), precision, device) for device in ("cpu", "cuda"))
    assert here.digest() == there.digest()


def test_no_adapter_and_no_answer_changes_a_byte_of_the_base(runtime: Runtime, zoo: Zoo) -> None:
    before = runtime.base_digest()
    name = runtime.load_adapter(str(zoo.adapter("llama", changes=EVEN, seed=3)), name="passing")
    runtime.generate(["one", "a longer prompt"], [f"{name}:1.5", None], max_new_tokens=4)
    runtime.unload_adapter(name)
    assert runtime.base_digest() == before
