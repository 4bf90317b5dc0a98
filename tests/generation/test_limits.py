"""What a model can't be given is explained in a line: prompts, messages, token ids, and texts beyond its context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lora_rt.core.base.load import load_base
from lora_rt.core.generation.prompts import PromptError
from lora_rt.core.generation.row import LengthError
from lora_rt.core.generation.sampling import SamplingError
from lora_rt.core.generation.scoring import BatchError
from lora_rt.core.requests.rows import RequestError
from lora_rt.core.runtime import Runtime
from lora_rt.registry.registry import Registry
from support.tiny import VOCAB, Zoo, mode_host, some_ids


@pytest.fixture
def runtime(zoo: Zoo) -> Runtime:
    return zoo.runtime("gpt2", n_positions=40)


@pytest.mark.parametrize(
    "prompt",
    [{"role": "user", "content": "x"}, [{"role": "user"}], ["x"], [{"role": "user", "content": None}], 7, None],
    ids=["one message", "no content", "a list of text", "content of nothing", "a number", "nothing"],
)
@pytest.mark.parametrize("chat", [True, False])
def test_what_is_no_prompt_is_refused(zoo: Zoo, prompt: Any, chat: bool) -> None:
    with pytest.raises(PromptError) as caught:
        zoo.runtime("llama", chat=chat).generate([prompt], max_new_tokens=1)
    assert caught.value.next_step


def test_one_message_instead_of_a_list_of_prompts_is_refused(runtime: Runtime) -> None:
    with pytest.raises(RequestError, match="one chat message"):
        runtime.generate({"role": "user", "content": "x"}, max_new_tokens=1)  # type: ignore[call-overload]


def test_messages_that_the_template_refuses_are_explained(runtime: Runtime) -> None:
    with pytest.raises(PromptError, match="unknown role king"):
        runtime.generate([[{"role": "king", "content": "x"}]], max_new_tokens=1)


def test_what_is_no_unicode_text_is_refused(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama")
    with pytest.raises(PromptError, match=r"the prompt is not Unicode text: character 2 is '\\udcff'"):
        runtime.generate("a\udcff", max_new_tokens=1)
    with pytest.raises(PromptError, match="the answer is not Unicode text"):
        runtime.answer_nll(["a"], ["\ud83c"])


def test_an_empty_prompt_is_refused_where_no_template_surrounds_it(zoo: Zoo) -> None:
    with pytest.raises(PromptError, match="empty"):
        zoo.runtime("llama", chat=False).generate("", max_new_tokens=1)
    with pytest.raises(PromptError, match="no messages"):
        zoo.runtime("llama").generate([[]], max_new_tokens=1)
    assert isinstance(zoo.runtime("llama").generate("", max_new_tokens=1), str)


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([1, 2], None),
        ([[1, 2], [3]], None),
        ([[]], None),
        ([[-1, 2]], None),
        ([[VOCAB, 2]], None),
        ([[0.5, 1.0]], None),
        ([[1, 2]], [[1]]),
        (["ab"], None),
    ],
    ids=["one row", "ragged", "no tokens", "negative", "beyond the vocabulary", "fractions", "another mask", "text"],
)
def test_what_are_no_tokens_of_the_base_is_refused(runtime: Runtime, ids: Any, mask: Any) -> None:
    with pytest.raises(BatchError) as caught:
        runtime.logits(ids, mask)
    assert caught.value.next_step


@pytest.mark.parametrize("settings", [{"compositions": [None]}, {"scenes": ["body"]}, {"seed": [1]}])
def test_lists_of_another_length_than_the_prompts_are_refused(runtime: Runtime, settings: dict[str, Any]) -> None:
    with pytest.raises((RequestError, SamplingError), match="for 2 rows"):
        runtime.generate(["x", "y"], max_new_tokens=1, **settings)


def test_a_prompt_that_fills_the_context_is_refused_and_every_such_row_named(runtime: Runtime) -> None:
    surroundings = len("user: \nassistant: ")
    with pytest.raises(LengthError) as caught:
        runtime.generate(["x" * 40, "x", "x" * (40 - surroundings)], max_new_tokens=1)
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["row 0", "row 2"]
    with pytest.raises(LengthError, match="40 tokens"):
        runtime.logits(some_ids(tokens=41))


def test_an_answer_ends_where_the_context_does_whatever_its_neighbours_do(runtime: Runtime) -> None:
    long, short = "x" * 17, "x"
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "repetition_penalty": 1.5}
    together = runtime.generate([long, short], **options)
    assert together == [runtime.generate(long, **options), runtime.generate(short, **options)]
    (row,) = runtime.rows([long], max_new_tokens=60, min_new_tokens=60)
    batch = runtime.batch()
    batch.add([row])
    while batch.rows:
        batch.step()
    assert row.ended == "context"
    assert len(row.answer) == 40 - len(f"user: {long}\nassistant: ")


def test_the_last_place_of_the_context_can_be_used(runtime: Runtime) -> None:
    assert runtime.logits(some_ids(tokens=40)).shape == (1, 40, VOCAB)


def test_the_caller_owns_the_logits(runtime: Runtime) -> None:
    logits = runtime.logits(some_ids())
    logits[0, 0, 0] = 7.0
    assert logits[0, 0, 0] == 7.0


def test_the_end_of_a_turn_is_no_text_and_ends_its_row_alone(zoo: Zoo) -> None:
    base = load_base(str(zoo.base("llama")), "float32", "cpu")
    ends = range(ord("a"), ord("a") + 100)
    base.model.generation_config.eos_token_id = list(ends)  # a third of all tokens, so that rows end soon
    runtime = Runtime(base, mode_host(), Registry(project=zoo.folder))
    prompts = [f"prompt number {number}" for number in range(8)]
    options = {"max_new_tokens": 20, "temperature": 1.0}
    rows = runtime.rows(prompts, seed=list(range(8)), **options)
    batch = runtime.batch()
    batch.add(rows)
    while batch.rows:
        batch.step()
    counts = [len(row.answer) for row in rows]
    assert len(set(counts)) > 2, "the rows should end at different steps"
    together = runtime.generate(prompts, seed=list(range(8)), **options)
    assert together == [runtime.generate(prompt, seed=seed, **options) for seed, prompt in enumerate(prompts)]
    letters = runtime.tokenizer.convert_ids_to_tokens(list(ends))
    assert not set("".join(together)) & {letter for letter in letters if letter.isascii()}


def test_the_likelihood_of_an_answer_is_what_the_logits_say(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama")
    prompts, answers = ["ab", "a longer one"], ["first answer", "no"]
    found = runtime.answer_nll(prompts, answers, None)
    for prompt, answer, nll in zip(prompts, answers, found, strict=True):
        before = runtime.tokenizer(f"user: {prompt}\nassistant: ", add_special_tokens=False).input_ids
        after = [*runtime.tokenizer(answer, add_special_tokens=False).input_ids, runtime.tokenizer.eos_token_id]
        chances = runtime.logits([[*before, *after]])[0].log_softmax(-1)
        wanted = [-chances[len(before) + number - 1, token] for number, token in enumerate(after)]
        assert_close(nll, torch.stack(wanted), atol=1e-4, rtol=0.0)
    assert_close(runtime.choices_nll("ab", answers, None)[0], found[0], atol=1e-4, rtol=0.0)
