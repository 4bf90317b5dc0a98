"""An adapter, or a scene, that begins in the middle of a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rt.core.requests.activation import scene_turns
from lora_rt.core.requests.composition import Composition, InvalidCompositionError
from lora_rt.core.runtime import Runtime
from support.tiny import Zoo

Made = Callable[..., Path]
PROMPT = "two and two. So: four"


def caches(runtime: Runtime, prompt: str, composition: Any, tokens: int = 6, **options: Any) -> tuple[str, list[Any]]:
    """The answer, and the keys and values of every layer when it was done."""
    seen: list[Any] = []
    model = runtime.model
    handle = model.register_forward_pre_hook(
        lambda _module, _arguments, named: seen.append(named.get("past_key_values")), with_kwargs=True
    )
    try:
        text = runtime.generate(prompt, composition, max_new_tokens=tokens, min_new_tokens=tokens, **options)
    finally:
        handle.remove()
    cache = next(item for item in reversed(seen) if item is not None)
    return text, [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def equal_before(mine: list[Any], other: list[Any], end: int) -> bool:
    return all(
        torch.equal(a[:, :, :end], b[:, :, :end])
        for pair, twin in zip(mine, other, strict=True)
        for a, b in zip(pair, twin, strict=True)
    )


def test_until_the_words_the_cache_is_the_base_s_bit_for_bit_and_then_not(zoo: Zoo, runtime: Runtime) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama")))
    ids = runtime.tokenizer(f"user: {PROMPT}\nassistant: ").input_ids
    turn = len(runtime.tokenizer("user: two and two. So:").input_ids) - 1  # the token that completes the words
    _, base = caches(runtime, PROMPT, None)
    _, woken = caches(runtime, PROMPT, f"{name}[So:]")
    assert equal_before(woken, base, turn)
    assert not equal_before(woken, base, turn + 1)
    assert turn < len(ids)


def test_an_adapter_whose_words_never_come_leaves_the_base_alone(zoo: Zoo, runtime: Runtime) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama")))
    text, base = caches(runtime, PROMPT, None, 12)
    same, asleep = caches(runtime, PROMPT, f"{name}:2[never]", 12)
    assert same == text
    assert equal_before(asleep, base, 10_000)


def test_words_of_its_own_output_wake_it(zoo: Zoo, runtime: Runtime) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama")))
    asked = f"user: {PROMPT}\nassistant: "
    plain, base = caches(runtime, PROMPT, None, 12)
    whole = asked + plain
    words = next(whole[i : i + 2] for i in range(len(asked), len(whole) - 4) if whole[i : i + 2].isascii())
    assert words not in asked
    ids = runtime.tokenizer(asked).input_ids + _answer(runtime, 12)
    turn = next(i for i in range(len(ids)) if words in runtime.tokenizer.decode(ids[: i + 1]))
    _, woken = caches(runtime, PROMPT, Composition.parse(f"{name}:3").waking(words), 12)
    assert equal_before(woken, base, turn)
    assert not equal_before(woken, base, turn + 1)


def _answer(runtime: Runtime, tokens: int, spec: str | None = None) -> list[int]:
    """All but the last token of a greedy answer: its text may hold what is no UTF-8."""
    seen: list[int] = []
    handle = runtime.model.register_forward_pre_hook(
        lambda _module, _arguments, named: seen.append(int(named["input_ids"][0, -1])), with_kwargs=True
    )
    runtime.generate(PROMPT, spec, max_new_tokens=tokens, min_new_tokens=tokens)
    handle.remove()
    return seen[1:]


def test_a_pass_over_everything_equals_decoding_step_by_step(zoo: Zoo, runtime: Runtime) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama")))
    answer = _answer(runtime, 9, f"{name}:2[So:]")
    asked = runtime.tokenizer(f"user: {PROMPT}\nassistant: ").input_ids
    logits = runtime.logits([asked + answer], compositions=f"{name}:2[So:]")
    assert logits[0, len(asked) - 1 : -1].argmax(-1).tolist() == answer


def test_rows_wake_up_apart(zoo: Zoo, runtime: Runtime) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama")))
    prompts = ["it rains. So: stay", "So: it rains and rains and rains", "no such words"]
    specs = [f"{name}[So:]", f"{name}:0.5[So:] {name}:0.5", f"{name}:2[So:]"]
    together = runtime.generate(prompts, specs, max_new_tokens=6, min_new_tokens=6)
    for prompt, spec, text in zip(prompts, specs, together, strict=True):
        assert runtime.generate(prompt, spec, max_new_tokens=6, min_new_tokens=6) == text


def test_a_term_may_stand_twice_and_grow(zoo: Zoo, runtime: Runtime) -> None:
    """Weights 0.3 before and 0.8 after the words equal, on either side, the compositions of these weights."""
    name = runtime.load_adapter(str(zoo.adapter("llama")))
    ids = runtime.tokenizer("ab So: cd", return_tensors="pt").input_ids
    turn = len("ab So:") - 1
    grown = runtime.logits(ids, compositions=f"{name}:0.3 {name}:0.5[So:]")
    before = runtime.logits(ids, compositions=f"{name}:0.3")
    assert torch.allclose(grown[:, :turn], before[:, :turn], atol=1e-5)
    from_start = runtime.logits(ids, compositions=f"{name}:0.3 {name}:0.5[a]")
    assert torch.allclose(from_start, runtime.logits(ids, compositions=f"{name}:0.8"), atol=1e-5)


def test_a_scene_turns_at_its_words(runtime: Runtime, made: Made) -> None:
    runtime.load_adapter(str(made("logic", gates=3)), "logic")
    ids = runtime.tokenizer("ab So: cd", return_tensors="pt").input_ids
    turn = len("ab So:") - 1
    turning = runtime.logits(ids, compositions="logic", scenes="logic body[So:]")
    first = runtime.logits(ids, compositions="logic", scenes="logic")
    assert torch.allclose(turning[:, :turn], first[:, :turn], atol=1e-5)
    assert not torch.allclose(turning[:, turn:], first[:, turn:], atol=1e-3)
    at_once = runtime.logits(ids, compositions="logic", scenes="logic body[a]")
    assert torch.allclose(at_once, runtime.logits(ids, compositions="logic", scenes="body"), atol=1e-5)


def test_the_bracket_survives_a_round_trip_and_keeps_its_text() -> None:
    spec = r"emotion:0.7 logic:-2e-1[So: a, b + \] c] ./my[1] mine[<|im_end|>]"
    parsed = Composition.parse(spec)
    assert str(parsed) == spec
    afters = [None, "So: a, b + ] c", None, "<|im_end|>"]
    assert [term.after for term in parsed.terms] == afters
    assert [term.weight for term in parsed.terms] == [0.7, -0.2, 1.0, 1.0]
    assert parsed.terms[2].reference.target == "./my[1]"
    assert [term.after for term in Composition(parsed.terms).waking("x").terms] == ["x", afters[1], "x", afters[3]]


@pytest.mark.slow
def test_any_text_can_wake_a_term() -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    @given(st.text(min_size=1), st.sampled_from(["logic", "./my[1]", "org/repo@v1"]))
    def hold(after: str, reference: str) -> None:
        term = Composition.parse(f"{reference}:0.5").waking(after).terms[0]
        assert Composition.parse(f"a {term} b:2").terms[1] == term

    hold()


@pytest.mark.parametrize("spec", ["logic[]", "logic:[So:]", "[So:]", "logic[So", "logic:1[a]b[c"])
def test_a_broken_bracket_is_refused(spec: str) -> None:
    with pytest.raises(InvalidCompositionError):
        Composition.parse(spec)


def test_scenes_that_turn_are_read_in_order() -> None:
    assert scene_turns("logic body[So: x] logic[y]") == [(None, "logic"), ("So: x", "body"), ("y", "logic")]
    assert scene_turns("logic body[So") == []
