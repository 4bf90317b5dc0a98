"""A prompt's beginning is read once, and only under what it was read under."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from safetensors.torch import save

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.metrics import Meter
from lora_rt.core.serving.prefix import PrefixCache
from lora_rt.core.serving.ticket import Ticket
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.files import sha256_bytes
from support.routers import router_state
from support.serving import Live, asked

STORY = "It rained on the tin roof all night, and nobody had paid the bill that lay on the table. "


@dataclass(frozen=True)
class Under:
    """Whatever a prompt can be read under."""

    spec: str | None = None
    scene: str | None = None
    prompt: str = STORY


def read(runtime: Runtime, cache: PrefixCache, under: Under, text: str, tokens: int = 3) -> Ticket:
    """Run one row with the cache."""
    ids = runtime.text.document_ids(text)
    (row,) = runtime.parts.rows(
        [ids], under.spec, [under.scene], prompts=[under.prompt], sampling=_greedy(tokens), spoken=True
    )
    ticket = Ticket(0, row, row.length + tokens, 0.0, lambda _ticket, _event: None)
    batch = runtime.batch(keep=cache.keep)
    cache.lend(ticket)
    batch.add([row])
    while batch.rows:
        batch.step()
    return ticket


def _greedy(tokens: int) -> Any:
    from lora_rt.core.generation.sampling import Sampling

    return Sampling(max_new_tokens=tokens, min_new_tokens=tokens)


@pytest.fixture
def cache(runtime: Runtime) -> PrefixCache:
    return PrefixCache(runtime, Meter(), 1 << 24)


SPECS = (None, "one", "one:0.5", "one two", "two one", "one one", "one:2", "two", "one:0.5 two:0", "fading", "raising")


@pytest.mark.slow
def test_nothing_is_shared_between_compositions_that_differ_in_anything(runtime: Runtime) -> None:
    """Wherever a beginning is lent, its keys and values are those of the row alone."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    under = st.builds(Under, st.sampled_from(SPECS), st.sampled_from([None, "a", "b"]), st.sampled_from([STORY, "x"]))

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(first=under, second=under)
    def hold(first: Under, second: Under) -> None:
        cache = PrefixCache(runtime, Meter(), 1 << 24)
        read(runtime, cache, first, STORY)
        found = read(runtime, cache, second, STORY + "So it is.")
        gated = {"fading", "raising"}
        acting = [{} if under.spec is None else _weights(under.spec) for under in (first, second)]
        same = acting[0] == acting[1] and (not gated & set(acting[0]))
        assert (found.cached > 0) == same
        alone = PrefixCache(runtime, Meter(), 0)
        assert found.row.answer == read(runtime, alone, second, STORY + "So it is.").row.answer

    hold()


def _weights(spec: str) -> dict[str, float]:
    total: dict[str, float] = {}
    for term in spec.split():
        name, _, weight = term.partition(":")
        total[name] = total.get(name, 0.0) + float(weight or 1)
    return {name: weight for name, weight in total.items() if weight}


def test_a_gated_composition_shares_the_very_same_prompt_alone(runtime: Runtime, cache: PrefixCache) -> None:
    """A gate may depend on the prompt's length and text, and on the scene type."""
    read(runtime, cache, Under("fading", "a"), STORY)
    assert read(runtime, cache, Under("fading", "a"), STORY).cached == len(runtime.text.document_ids(STORY)) - 1
    assert read(runtime, cache, Under("fading", "b"), STORY).cached == 0
    assert read(runtime, cache, Under("fading", "a", "x"), STORY).cached == 0
    assert read(runtime, cache, Under("fading", "a"), STORY + ".").cached == 0


def test_a_waking_composition_shares_with_the_base_until_it_wakes(runtime: Runtime, cache: PrefixCache) -> None:
    text = STORY + "So: the bill"
    wakes = len(runtime.text.document_ids(STORY + "So:")) - 1  # the token that completes the text is under the adapter
    read(runtime, cache, Under(None), text)
    assert read(runtime, cache, Under("one[So:]"), text).cached == wakes
    assert read(runtime, cache, Under("two:0.3[So:]"), text).cached == wakes
    assert read(runtime, cache, Under("one"), text).cached == 0


def test_a_row_that_was_turned_shares_what_it_read_before_the_turn(runtime: Runtime, cache: PrefixCache) -> None:
    ids = runtime.text.document_ids(STORY)
    (row,) = runtime.parts.rows([ids], "one", sampling=_greedy(8), spoken=True)
    batch = runtime.batch(keep=cache.keep)
    batch.add([row])
    for _ in range(4):
        batch.step()
    turned = row.read
    row.compose("two")
    while batch.rows:
        batch.step()
    again = runtime.text.document_ids(STORY) + row.answer
    (same,) = runtime.parts.rows([again], "one", sampling=_greedy(1), spoken=True)
    ticket = Ticket(0, same, 0, 0.0, lambda _ticket, _event: None)
    cache.lend(ticket)
    assert ticket.cached == turned


def test_a_reloaded_adapter_is_another_one(runtime: Runtime, cache: PrefixCache, tmp_path: Any) -> None:
    import shutil

    from support.tiny import config_of, save_adapter

    folder = tmp_path / "mine"
    save_adapter(folder, config_of("llama", max_position_embeddings=512), targets=["q_proj"], seed=1)
    runtime.load_adapter(str(folder), name="mine")
    read(runtime, cache, Under("mine"), STORY)
    assert read(runtime, cache, Under("mine"), STORY).cached > 0
    shutil.rmtree(folder)
    save_adapter(folder, config_of("llama", max_position_embeddings=512), targets=["q_proj"], seed=2)
    runtime.load_adapter(str(folder), name="mine")
    assert read(runtime, cache, Under("mine"), STORY).cached == 0
    runtime.unload_adapter("mine")


def test_what_is_kept_stays_within_its_room(runtime: Runtime) -> None:
    cache = PrefixCache(runtime, Meter(), 300_000)
    for number in range(12):
        read(runtime, cache, Under(), f"{number} {STORY}")
    assert 0 < cache.nbytes <= 300_000
    assert read(runtime, cache, Under(), f"11 {STORY}").cached > 0
    assert read(runtime, cache, Under(), f"0 {STORY}").cached == 0


def test_a_chats_second_turn_reads_only_what_is_new(server: Live, client: Any, runtime: Runtime) -> None:
    messages = [{"role": "user", "content": STORY + "Why?"}]
    first = client.chat.completions.create(model="one:0.7 two:0.3", messages=messages, temperature=0, max_tokens=20)
    spoken = first.choices[0].message.content
    messages += [{"role": "assistant", "content": spoken}, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(model="one:0.7 two:0.3", messages=messages, temperature=0, max_tokens=20)
    known = len(runtime.text.prompt_ids(messages[:1])) + first.usage.completion_tokens - 1
    assert (
        second.usage.prompt_tokens_details.cached_tokens >= known - 8
    )  # an answer of random bytes may be read otherwise
    assert second.choices[0].message.content == runtime.generate([messages], "one:0.7 two:0.3", max_new_tokens=20)[0]
    other = client.chat.completions.create(model="one:0.7", messages=messages, temperature=0, max_tokens=20)
    assert other.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.slow
def test_answers_do_not_depend_on_what_is_kept(server: Live, client: Any, runtime: Runtime) -> None:
    for spec in ("one", "one[So:]", "base", "one", "two:0.5"):
        for text in (STORY, STORY + "So: it is", STORY * 2):
            found = client.chat.completions.create(**asked(text, model=spec))
            expected = runtime.generate([text], None if spec == "base" else spec, max_new_tokens=12)[0]
            assert found.choices[0].message.content == expected


def test_a_composition_whose_own_mode_weights_it_shares_with_itself_alone(runtime: Runtime, cache: PrefixCache) -> None:
    content = save(router_state(2))
    made = NamedComposition(
        name="routed",
        base=runtime.base.id,
        terms=(NamedTerm(reference="one", weight=0.5), NamedTerm(reference="two", weight=0.3)),
        mode="router",
        state=sha256_bytes(content),
        hidden_layers=1,
        card={"gate": "softmax"},
    )
    runtime.parts.registry.compositions.save(made, content)
    first = read(runtime, cache, Under("routed"), STORY)
    for other in ("one:0.5 two:0.3", "routed:2", None):
        assert read(runtime, cache, Under(other), STORY).cached == 0
    again = read(runtime, cache, Under("routed"), STORY)
    assert again.row.answer == first.row.answer
