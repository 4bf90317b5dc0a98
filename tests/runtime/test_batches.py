"""A row of a batch gets what it would get alone, on every architecture, padded, cached, sampled or in two threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from torch.testing import assert_close

from lora_rt.core.runtime import Runtime
from support.tiny import ARCHITECTURES, MLP, TARGETS, Zoo, some_ids

pytestmark = pytest.mark.slow

EXACT = {"atol": 1e-4, "rtol": 0.0}
LENGTHS = (9, 4, 6, 1)


@pytest.fixture(params=ARCHITECTURES)
def runtime(zoo: Zoo, request: pytest.FixtureRequest) -> Runtime:
    return ready(zoo, request.param)


def ready(zoo: Zoo, architecture: str) -> Runtime:
    """A runtime with three adapters of different ranks and modules, called one, two and three."""
    made = zoo.runtime(architecture)
    attention, mlp = TARGETS[architecture], MLP[architecture]
    options = (
        {"seed": 41, "targets": [*attention, *mlp]},
        {"seed": 42, "targets": [*mlp], "r": 3, "lora_bias": True},
        {"seed": 43, "targets": [attention[0]], "r": 5, "use_rslora": True},
    )
    for name, settings in zip(("one", "two", "three"), options, strict=True):
        if name not in made.adapters:
            made.load_adapter(str(zoo.adapter(architecture, **settings)), name=name)
    return made


SPECS = ("one:0.7 two:0.3", None, "three:-1.5", "one two:2")


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Rows of four lengths: ids, mask, and each row alone."""
    rows = [some_ids(1, length, seed=length)[0] for length in LENGTHS]
    ids = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(-len(row), None) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask, [row[None] for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_logits_of_the_row_alone(runtime: Runtime, side: str) -> None:
    ids, mask, rows = padded(side)
    together = runtime.logits(ids, mask, compositions=SPECS)
    for number, row in enumerate(rows):
        alone = runtime.logits(row, compositions=SPECS[number])
        assert_close(together[number][mask[number].bool()], alone[0], **EXACT)


def test_none_rows_equal_the_base_exactly(runtime: Runtime) -> None:
    ids, mask, _ = padded("left")
    base = runtime.logits(ids, mask)
    mixed = runtime.logits(ids, mask, compositions=SPECS)
    assert torch.equal(mixed[1], base[1])
    assert not torch.equal(mixed[0], base[0])


GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "repetition_penalty": 1.5}
PROMPTS = ("rain, tin roof", "a", "the unpaid bill on the table", "so")


def test_greedy_text_of_a_batch_is_that_of_its_rows_alone(runtime: Runtime) -> None:
    together = runtime.generate(PROMPTS, SPECS, **GREEDY)
    alone = [runtime.generate(p, s, **GREEDY) for p, s in zip(PROMPTS, SPECS, strict=True)]
    assert together == alone
    assert len(set(together)) == len(PROMPTS)


def test_decoding_with_a_cache_chooses_what_reading_everything_again_would(runtime: Runtime) -> None:
    text = runtime.generate(PROMPTS[0], SPECS[0], max_new_tokens=8, min_new_tokens=8)
    ids = runtime.tokenizer(f"user: {PROMPTS[0]}\nassistant: ", add_special_tokens=False).input_ids
    answer: list[int] = []
    for _ in range(8):
        scores = runtime.logits([[*ids, *answer]], compositions=SPECS[0])[0, -1]
        scores[runtime.tokenizer.eos_token_id] = -torch.inf
        answer.append(int(scores.argmax()))
    assert runtime.tokenizer.decode(answer, skip_special_tokens=True) == text


def test_a_composition_changes_the_text(runtime: Runtime) -> None:
    base = runtime.generate(PROMPTS[0], **GREEDY)
    assert runtime.generate(PROMPTS[0], SPECS[0], **GREEDY) != base
    assert runtime.generate(PROMPTS[0], None, **GREEDY) == base


SAMPLED = {"max_new_tokens": 12, "min_new_tokens": 12, "temperature": 1.1, "top_p": 0.95, "repetition_penalty": 1.2}


def test_a_sample_depends_on_its_own_seed_alone(zoo: Zoo) -> None:
    runtime = ready(zoo, "llama")
    seeds = [5, 6, 7, 8]
    together = runtime.generate(PROMPTS, SPECS, seed=seeds, **SAMPLED)
    backwards = runtime.generate(PROMPTS[::-1], SPECS[::-1], seed=seeds[::-1], **SAMPLED)
    alone = [runtime.generate(p, s, seed=seed, **SAMPLED) for p, s, seed in zip(PROMPTS, SPECS, seeds, strict=True)]
    assert together == backwards[::-1] == alone
    assert runtime.generate(PROMPTS[0], SPECS[0], seed=9, **SAMPLED) != together[0]


def test_one_seed_stands_for_all_rows_and_none_for_a_new_one_each_time(zoo: Zoo) -> None:
    runtime = ready(zoo, "llama")
    same = runtime.generate([PROMPTS[0]] * 2, SPECS[0], seed=3, **SAMPLED)
    assert same[0] == same[1] == runtime.generate(PROMPTS[0], SPECS[0], seed=3, **SAMPLED)
    assert len(set(runtime.generate([PROMPTS[0]] * 4, SPECS[0], **SAMPLED))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int4", "int8"])
def test_threads_with_different_compositions_get_what_they_would_get_alone(zoo: Zoo, precision: str) -> None:
    runtime = zoo.runtime("llama", precision)
    for name, seed in (("one", 41), ("two", 42)):
        if name not in runtime.adapters:
            runtime.load_adapter(str(zoo.adapter("llama", seed=seed)), name=name)
    specs: Sequence[str | None] = ("one:1.5", "two:-1", None)
    options = {"max_new_tokens": 16, "min_new_tokens": 16}
    alone = [runtime.generate(PROMPTS[0], spec, **options) for spec in specs]
    found: dict[int, list[str]] = {number: [] for number in range(len(specs))}

    def work(number: int) -> None:
        start.wait()
        for _ in range(4):
            found[number].append(runtime.generate(PROMPTS[0], specs[number], **options))

    start = threading.Barrier(len(specs))
    threads = [threading.Thread(target=work, args=(number,)) for number in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(alone)) == len(specs)
    assert found == {number: [text] * 4 for number, text in enumerate(alone)}


def test_a_request_that_runs_is_not_touched_by_unloading_and_loading(zoo: Zoo) -> None:
    runtime = zoo.runtime("llama", fresh=True)
    runtime.load_adapter(str(zoo.adapter("llama", seed=41)), name="one")
    options = {"max_new_tokens": 10, "min_new_tokens": 10}
    whole = runtime.generate(PROMPTS[0], "one:1.5", **options)
    stream = runtime.stream(PROMPTS[0], "one:1.5", **options)
    pieces = [next(stream)]
    runtime.unload_adapter("one")
    runtime.load_adapter(str(zoo.adapter("llama", seed=42)), name="one")
    assert "".join([*pieces, *stream]) == whole
    assert runtime.generate(PROMPTS[0], "one:1.5", **options) != whole


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_streamed_pieces_join_to_what_generate_returns(zoo: Zoo, chat: bool) -> None:
    runtime = zoo.runtime("llama", chat=chat)
    for seed in range(3):
        options = {"max_new_tokens": 40, "min_new_tokens": 40, "temperature": 1.5, "seed": seed}
        pieces = list(runtime.stream(PROMPTS[0], None, **options))
        assert "".join(pieces) == runtime.generate(PROMPTS[0], None, **options)
        assert len(pieces) > 5
        assert all(pieces)


def test_a_prompt_goes_through_the_chat_template_where_there_is_one(zoo: Zoo) -> None:
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    chat, plain = zoo.runtime("llama"), zoo.runtime("llama", chat=False)
    assert chat.generate("x", **options) == plain.generate("user: x\nassistant: ", **options)
    told = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "x"}]
    assert chat.generate([told], **options) == [plain.generate("system: be kind\nuser: x\nassistant: ", **options)]
    assert chat.generate([], **options) == []
