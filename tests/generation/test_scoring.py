"""The likelihood of an answer is that with which generation would have said it, whatever a gate makes of the prompt."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoTokenizer

from lora_rt.core.generation.prompts import prompt_ids
from lora_rt.core.generation.scoring import answer_nll
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from support.tiny import Zoo, config_of, mode_host, random_model, some_ids

PROMPTS = ["ab", "a longer prompt"]
EXACT: Any = {"atol": 1e-4, "rtol": 0.0}


class Fading:
    """Comes in over four tokens of the answer; while the prompt is read it is off."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook of a module has no self
        answered = context.positions - (context.prompt_lengths[:, None] - 1)
        return Gate(ranks=(answered / 4).clamp(0, 1)[..., None])


@pytest.fixture
def fading(zoo: Zoo) -> Runtime:
    """A runtime with an adapter "fading" that makes a large difference."""
    runtime = zoo.runtime_with(mode_host(fading=Fading), "llama")
    runtime.load_adapter(str(zoo.adapter("llama", mode="fading", seed=3)), name="fading")
    return runtime


def test_scoring_an_answer_gives_the_likelihood_that_generation_saw(fading: Runtime) -> None:
    spec, seen = "fading:8", []
    model = fading.model
    handle = model.register_forward_hook(lambda _model, _inputs, out: seen.append(out.logits[:, -1].float()))
    ids = [prompt_ids(fading.tokenizer, prompt) for prompt in PROMPTS]
    tokens = list(fading.decode(ids, spec, max_new_tokens=8))
    handle.remove()
    answers = [[step[row] for step in tokens if step[row] is not None] for row in range(len(PROMPTS))]
    assert all(len(answer) > 4 for answer in answers)

    parts = fading.parts
    rows = parts.rows([[*a, *b] for a, b in zip(ids, answers, strict=True)], spec, lengths=[len(one) for one in ids])  # type: ignore[misc]
    found = answer_nll(parts.lm, parts.planner(), rows, answers)  # type: ignore[arg-type]
    for row, answer in enumerate(answers):
        stepwise = torch.stack(
            [-logits[row].log_softmax(-1)[token] for logits, token in zip(seen[: len(answer)], answer, strict=True)]
        )
        assert_close(found[row], stepwise, **EXACT)


def test_one_answer_scored_alone_among_choices_and_in_a_batch_is_the_same(fading: Runtime) -> None:
    together = fading.answer_nll(PROMPTS, ["abcdefgh", "xy"], "fading:8")
    assert_close(together[0], fading.choices_nll(PROMPTS[0], ["abcdefgh"], "fading:8")[0], **EXACT)
    assert_close(together[1], fading.choices_nll(PROMPTS[1], ["xy"], "fading:8")[0], **EXACT)


def test_a_prompt_is_read_once_for_all_choices_and_an_empty_one_needs_no_more(fading: Runtime) -> None:
    answers, seen = ["abcdefgh", "", "xy"], []
    handle = fading.model.register_forward_pre_hook(
        lambda _model, _inputs, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    found = fading.choices_nll(PROMPTS[1], answers, "fading:8")
    prompt, lengths = len(prompt_ids(fading.tokenizer, PROMPTS[1])), [len(nll) for nll in found]
    assert lengths[1] == 1, "an empty answer is the end of the turn"
    assert seen == [(1, prompt), (2, max(lengths))]
    del seen[:]
    (empty,) = fading.choices_nll(PROMPTS[1], [""], "fading:8")
    handle.remove()
    assert seen == [(1, prompt)]
    assert_close(empty, found[1], **EXACT)
    for one, other in zip(found, fading.answer_nll([PROMPTS[1]] * 3, answers, "fading:8"), strict=True):
        assert_close(one, other, **EXACT)


def test_what_explains_an_answer_sees_where_the_prompt_ends(fading: Runtime) -> None:
    """While the prompt is read the gate is 0 (at its last token, too); behind it the adapter adds something."""
    prompt = len(prompt_ids(fading.tokenizer, "ab"))
    added = fading.explain("ab", "fading", answer="cdefgh").tokens[0]
    assert not bool(added[:prompt].any())
    assert bool((added[prompt:] > 0).all())


def passes_of(model: Any) -> list[tuple[int, ...]]:
    """The shape of every pass of a model from now on, those of trials included, which call no hooks."""
    seen: list[tuple[int, ...]] = []
    own = model.forward

    @functools.wraps(own)
    def noted(*arguments: Any, **named: Any) -> Any:
        seen.append(tuple(named["input_ids"].shape))
        return own(*arguments, **named)

    model.forward = noted
    return seen


def test_rows_that_are_only_read_need_no_trial_of_a_cache(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_RT_BLOCKS", "0")  # which has trials of its own
    with Runtime.over(random_model(config_of("llama")), AutoTokenizer.from_pretrained(zoo.base("llama"))) as runtime:
        seen = passes_of(runtime.model)
        runtime.logits(some_ids(3, 6))
        prompt = len(prompt_ids(runtime.tokenizer, "ab"))
        runtime.answer_nll(["ab"], ["c"])
    assert seen == [(3, 6), (1, prompt + 2)]


def test_a_row_of_padding_alone_has_logits_of_0_and_changes_nothing_in_the_others(zoo: Zoo) -> None:
    runtime, ids = zoo.runtime("llama"), some_ids(3, 6)
    mask = torch.tensor([[1] * 6, [0] * 6, [0, 0, 1, 1, 1, 1]])
    found = runtime.logits(ids, mask)
    assert not bool(found[1].any())
    assert_close(found[0], runtime.logits(ids[:1])[0], **EXACT)
    assert_close(found[2, 2:], runtime.logits(ids[2:, 2:])[0], **EXACT)
    with pytest.raises(LoraRtError, match="hides every token"):
        runtime.logits(ids, torch.zeros_like(mask))


def test_a_choice_may_fill_the_context(zoo: Zoo) -> None:
    """Nothing comes behind it."""
    runtime = zoo.runtime("llama")
    prompt = len(prompt_ids(runtime.tokenizer, "ab"))
    fitting = "c" * (runtime.parts.lm.capacity - prompt - 1)  # and the end of the turn
    (choice, _), (answer,) = runtime.choices_nll("ab", [fitting, "x"]), runtime.answer_nll(["ab"], [fitting])
    assert_close(choice, answer, **EXACT)
    with pytest.raises(LoraRtError, match="a row is too long"):
        runtime.choices_nll("ab", ["x", f"{fitting}c"])
