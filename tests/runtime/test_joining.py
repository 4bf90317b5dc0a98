"""Rows join and leave a running batch, in any order, and each says what it says alone."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lora_rt.core.requests.running import RequestRow
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from support.tiny import Zoo, mode_host

pytestmark = pytest.mark.slow

Wish = dict[str, Any]
PROMPTS = ("rain, tin roof", "a", "two and two. So: four", "the unpaid bill on the table and a late bus", "so it is")


class Fading:
    """Comes in over the first tokens of the answer, by position."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook of a module has no self
        answered = context.positions - (context.prompt_lengths[:, None] - 1)
        return Gate(ranks=(answered / 4).clamp(0, 1)[..., None])


def mixed_runtime(zoo: Zoo, precision: str) -> Runtime:
    """A runtime with two plain adapters and a gated one."""
    runtime = zoo.runtime_with(mode_host(fading=Fading), "llama", precision)
    runtime.load_adapter(str(zoo.adapter("llama", seed=41)), name="one")
    runtime.load_adapter(str(zoo.adapter("llama", seed=42, r=3, targets=["q_proj", "down_proj"])), name="two")
    runtime.load_adapter(str(zoo.adapter("llama", mode="fading", seed=3)), name="fading")
    return runtime


@pytest.fixture(scope="module")
def mixed(zoo: Zoo) -> Runtime:
    return mixed_runtime(zoo, "float32")


GREEDY: tuple[Wish, ...] = ({},)
KINDS: tuple[Wish, ...] = (
    *GREEDY,
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.8, "repetition_penalty": 1.3},
)


def wishes(dice: random.Random, count: int, kinds: tuple[Wish, ...] = KINDS) -> list[Wish]:
    """Rows of every sort: static, gated, waking, the base; short and long."""
    specs = (None, "one:0.7 two:0.3", "two:-1.5", "fading:2", "one[So:] fading", "one:2[ ] two:0.5[e]", "fading:3 one")
    return [
        {
            "prompt": dice.choice(PROMPTS),
            "spec": dice.choice(specs),
            "seed": dice.randrange(100),
            "max_new_tokens": (length := dice.randrange(1, 14)),
            "min_new_tokens": dice.choice([0, length]),
            **dice.choice(kinds),
        }
        for _ in range(count)
    ]


def row_of(runtime: Runtime, wish: Wish) -> RequestRow:
    settings = {key: value for key, value in wish.items() if key not in ("prompt", "spec")}
    return runtime.rows([wish["prompt"]], [wish["spec"]], **settings)[0]


def alone(runtime: Runtime, wish: Wish) -> list[int]:
    row = row_of(runtime, wish)
    batch = runtime.batch()
    batch.add([row])
    while batch.rows:
        batch.step()
    return row.answer


@dataclass(frozen=True)
class Played:
    """A row of a schedule when all is over, its wish, and whether it was made to leave."""

    wish: Wish
    row: RequestRow
    dropped: bool


def play(runtime: Runtime, seed: int, kinds: tuple[Wish, ...] = KINDS, chunk: int | None = None) -> list[Played]:
    """Rows that join a batch at random steps, some of which leave it at random steps, by these dice."""
    dice = random.Random(seed)
    waiting = wishes(dice, 14, kinds)
    batch = runtime.batch(chunk=chunk)
    joined: list[tuple[Wish, RequestRow]] = []
    dropped: set[int] = set()
    while waiting or batch.rows:
        newcomers = [waiting.pop() for _ in range(min(len(waiting), dice.choice([0, 0, 1, 2, 4])))]
        joined += (added := [(wish, row_of(runtime, wish)) for wish in newcomers])
        batch.add([row for _, row in added])
        if batch.rows and dice.random() < 0.1:
            gone = dice.choice(batch.rows)
            dropped.add(id(gone))
            batch.drop([gone])
        batch.step()
    return [Played(wish, row, id(row) in dropped) for wish, row in joined]


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("seed", range(6))
def test_every_row_says_what_it_says_alone_whatever_joins_or_leaves_beside_it(
    mixed: Runtime, seed: int, chunk: int | None
) -> None:
    for played in play(mixed, seed, chunk=chunk):
        whole = alone(mixed, played.wish)
        if played.dropped:
            assert played.row.ended is None
            assert played.row.answer == whole[: len(played.row.answer)]
        else:
            assert played.row.ended is not None
            assert played.row.answer == whole


def test_a_row_that_has_left_costs_nothing(mixed: Runtime) -> None:
    rows = mixed.rows(PROMPTS, "one", max_new_tokens=9, min_new_tokens=9)
    seen: list[tuple[int, ...]] = []
    handle = mixed.model.register_forward_pre_hook(
        lambda _module, _arguments, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    batch = mixed.batch()
    batch.add(rows)
    batch.step()
    batch.drop(rows[1:4])
    batch.step()
    batch.drop(rows[:1])
    batch.step()
    handle.remove()
    assert [shape[0] for shape in seen] == [5, 2, 1]
    assert batch.rows == rows[4:]


def test_a_row_that_joins_is_read_without_the_others(mixed: Runtime) -> None:
    first, second = mixed.rows([PROMPTS[3], PROMPTS[1]], "one", max_new_tokens=9, min_new_tokens=9)
    seen: list[tuple[int, ...]] = []
    batch = mixed.batch()
    batch.add([first])
    batch.step()
    handle = mixed.model.register_forward_pre_hook(
        lambda _module, _arguments, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    batch.add([second])
    batch.step()
    batch.step()
    handle.remove()
    assert seen == [(1, 1), (1, second.prompt_length), (2, 1)]


@pytest.mark.parametrize("chunk", [None, 3])
def test_rows_that_are_only_read_join_a_running_batch_and_leave_it_with_the_next_step(
    mixed: Runtime, chunk: int | None
) -> None:
    wish: Wish = {"prompt": PROMPTS[3], "spec": "fading:2", "max_new_tokens": 12, "min_new_tokens": 12}
    (speaking,) = mixed.rows([wish["prompt"]], wish["spec"], max_new_tokens=12, min_new_tokens=12)
    specs = ["one:2", None, "one:2", "two:-1.5"]
    read = mixed.rows(list(PROMPTS[:4]), specs)
    for row in read:
        row.wanted = range(row.length - 1, row.length)
    read[0].wanted = range(2, 7)
    seen: list[tuple[int, ...]] = []
    batch = mixed.batch(chunk=chunk)
    batch.add([speaking])
    while speaking.length < len(speaking.ids) + 2:
        batch.step()
    batch.add(read)
    handle = mixed.model.register_forward_pre_hook(
        lambda _module, _arguments, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    assert batch.step() == [speaking]
    handle.remove()
    assert seen == [(1, 1), (4, max(row.length for row in read))]  # all of them share a pass, whatever they are under
    assert batch.rows == [speaking]
    for row, spec in zip(read, specs, strict=True):
        assert (row.ended, row.answer) == ("read", [])
        assert row.logits is not None
        assert row.wanted is not None
        assert_close(row.logits, mixed.logits([row.ids], compositions=[spec])[0, row.wanted], atol=1e-4, rtol=0.0)
    while batch.rows:
        batch.step()
    assert speaking.answer == alone(mixed, wish)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_that_are_only_read_may_begin_with_one_cache(mixed: Runtime, deterministic: bool) -> None:
    caches: list[Any] = []
    (first,) = mixed.rows([PROMPTS[0]], "one:2", max_new_tokens=1)
    whole = mixed.batch(keep=lambda _row, cache: caches.append(cache))
    whole.add([first])
    whole.step()
    start, rows = len(first.ids), mixed.parts.rows([[*first.ids, *range(40, 40 + n)] for n in (2, 5, 3)], ["one:2"] * 3)
    for row in rows:
        row.begin, row.wanted = (caches[0], start), range(start, row.length)
    batch = mixed.batch(deterministic=deterministic)
    batch.add(rows)
    batch.step()
    assert [layer.keys.shape[2] for layer in caches[0].layers] == [start] * len(caches[0].layers)
    for row in rows:
        assert row.logits is not None
        assert_close(row.logits, mixed.logits([row.ids], compositions="one:2")[0, start:], atol=1e-4, rtol=0.0)


def test_the_weights_of_a_running_row_change_from_the_next_token_on_and_its_cache_stays(mixed: Runtime) -> None:
    """What it then says is what the changed weights say over keys and values that the first ones made."""
    (row,) = mixed.rows([PROMPTS[0]], "one:0.7", max_new_tokens=12, min_new_tokens=12)
    (other,) = mixed.rows([PROMPTS[3]], "two", max_new_tokens=12, min_new_tokens=12)
    batch = mixed.batch()
    batch.add([row, other])
    for _ in range(4):
        batch.step()
    row.compose({"two": -1.5})
    while batch.rows:
        batch.step()
    # By hand: a cache made under the first weights, then steps under the others.
    from transformers import DynamicCache

    cache = DynamicCache(config=mixed.model.config)
    ids, answer = torch.tensor([row.ids]), []
    for step in range(12):
        plan = mixed.parts.bank.plan([{"one": 0.7} if step < 4 else {"two": -1.5}])
        assert plan is not None
        with torch.inference_mode(), plan.running(*ids.shape):
            scores = mixed.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1].clone()
            scores[mixed.tokenizer.eos_token_id] = -torch.inf
        answer.append(int(scores.argmax()))
        ids = torch.tensor([answer[-1:]])
    assert row.answer == answer
    assert other.answer == alone(
        mixed, {"prompt": PROMPTS[3], "spec": "two", "max_new_tokens": 12, "min_new_tokens": 12}
    )


def test_a_stream_s_weights_can_be_changed_while_it_speaks(mixed: Runtime) -> None:
    options = {"max_new_tokens": 12, "min_new_tokens": 12}
    stream = mixed.stream(PROMPTS[0], "one:0.7", **options)
    first = next(stream)
    stream.compose("two:-1.5")
    whole = first + "".join(stream)
    assert whole != mixed.generate(PROMPTS[0], "one:0.7", **options)
    assert whole != mixed.generate(PROMPTS[0], "two:-1.5", **options)


def test_rows_keep_the_adapters_that_they_began_with(zoo: Zoo) -> None:
    """Two rows of one batch use two adapters that had one name, one after the other."""
    runtime = zoo.runtime("llama", fresh=True)
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    rows, wanted = [], []
    for seed in (41, 42):
        runtime.load_adapter(str(zoo.adapter("llama", seed=seed)), name="same")
        wanted.append(runtime.generate(PROMPTS[0], "same:1.5", **options))
        rows += runtime.rows([PROMPTS[0]], "same:1.5", **options)
    batch = runtime.batch()
    batch.add(rows)
    while batch.rows:
        batch.step()
    assert [row.new_text() for row in rows] == wanted
    assert wanted[0] != wanted[1]


def test_an_answer_ends_before_a_stop_text_and_nothing_of_it_is_streamed(mixed: Runtime) -> None:
    options: Any = {"max_new_tokens": 30, "min_new_tokens": 30}
    plain = mixed.generate(PROMPTS[0], "one", **options)
    assert len(plain) > 8
    stop = plain[5:8]
    wanted = plain[: plain.index(stop)]
    assert mixed.generate([PROMPTS[0], PROMPTS[1]], "one", stop=[stop, "\0"], **options)[0] == wanted
    assert "".join(mixed.stream(PROMPTS[0], "one", stop=stop, **options)) == wanted


def test_a_mapping_is_a_composition_for_all_rows_and_as_one_of_them(mixed: Runtime) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    wanted = mixed.generate(list(PROMPTS[:2]), "one:0.1 two:-2", **options)
    weights = {"one": 0.1, "two": -2}
    assert mixed.generate(list(PROMPTS[:2]), weights, **options) == wanted
    assert mixed.generate(list(PROMPTS[:2]), [weights, "one:0.1 two:-2"], **options) == wanted
    assert mixed.generate(PROMPTS[0], {"one": 0.1}, **options) == mixed.generate(PROMPTS[0], "one:0.1", **options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int4", "int8"])
def test_deterministic_rows_say_bit_for_bit_what_they_say_alone(zoo: Zoo, precision: str) -> None:
    runtime = zoo.runtime("llama", precision)
    for name, seed in (("one", 41), ("two", 42)):
        if name not in runtime.adapters:
            runtime.load_adapter(str(zoo.adapter("llama", seed=seed)), name=name)
    specs = ("one:0.7 two:0.3", None, "two:-1.5", "one", "two")
    options: Any = {"max_new_tokens": 16, "min_new_tokens": 16, "deterministic": True}
    together = runtime.generate(PROMPTS, specs, **options)
    alone = [runtime.generate(prompt, spec, **options) for prompt, spec in zip(PROMPTS, specs, strict=True)]
    assert together == alone
    plain = options | {"deterministic": False}
    assert alone == [runtime.generate(prompt, spec, **plain) for prompt, spec in zip(PROMPTS, specs, strict=True)]


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_same_schedule_repeats_exactly_in_few_bits(zoo: Zoo, precision: str) -> None:
    """In few bits a row may say something else than alone; but the same schedule says the same again."""
    runtime = mixed_runtime(zoo, precision)
    dropped = said = 0
    for seed in range(4):
        once, again = (play(runtime, seed, GREEDY) for _ in range(2))
        assert [outcome(played) for played in once] == [outcome(played) for played in again]
        dropped += sum(played.dropped for played in once)
        said += len({tuple(played.row.answer) for played in once})
    assert dropped > 0
    assert said > 28  # half of the rows at least say something of their own


def outcome(played: Played) -> tuple[object, ...]:
    row = played.row
    return played.wish, played.dropped, row.answer, row.ended, row.new_text()


def test_unloading_beside_running_requests_gives_an_answer_or_an_error_of_ours(zoo: Zoo) -> None:
    """What a request looked up stays what it works with; a name that is gone is explained."""
    runtime = zoo.runtime("llama", fresh=True)
    adapter = zoo.adapter("llama", seed=41)
    runtime.load_adapter(adapter, name="one")
    wanted = runtime.generate("x", "one:1.5", max_new_tokens=2, min_new_tokens=2)
    strange: list[object] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            try:
                found = runtime.generate("x", "one:1.5", max_new_tokens=2, min_new_tokens=2)
            except LoraRtError:
                continue
            except Exception as error:  # what this test looks for
                strange.append(error)
            else:
                if found != wanted:
                    strange.append(found)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        runtime.unload_adapter("one")
        runtime.load_adapter(adapter, name="one")
    over.set()
    for thread in threads:
        thread.join()
    assert strange == []


def test_a_runtime_that_was_closed_gives_the_model_back_and_says_so(zoo: Zoo, tmp_path: Path) -> None:
    with zoo.runtime("llama", fresh=True) as runtime:
        model = runtime.model
        runtime.load_adapter(zoo.adapter("llama", seed=41), name="one")
        assert any("forward" in vars(module) for module in model.modules())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    runtime.close()
    for call in (lambda: runtime.generate("x"), lambda: runtime.adapters, lambda: runtime.load_adapter(tmp_path)):
        with pytest.raises(LoraRtError, match="closed"):
            call()


@pytest.mark.parametrize("where", ["plan", "pass"])
def test_rows_go_on_after_a_step_in_which_another_one_failed(
    mixed: Runtime, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some groups have been read when it fails, and what they were to say next is not lost."""
    wish: Wish = {"prompt": PROMPTS[2], "spec": "one:0.7 two:0.3", "max_new_tokens": 6}
    healthy, other = row_of(mixed, wish), row_of(mixed, {**wish, "prompt": "a", "spec": "fading:2"})
    batch = mixed.batch(deterministic=True)
    batch.add([healthy, other])
    batch.step()
    if where == "plan":
        planner = batch._planner

        def plan(info: Any, rows: Any) -> Any:
            if other in rows:
                raise LoraRtError("no gate")
            return planner(info, rows)

        monkeypatch.setattr(batch, "_planner", plan)
    else:
        forward = batch._forward

        def interrupted(group: Any, info: Any, plan: Any) -> Any:
            found = forward(group, info, plan)
            if other in group.rows:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(batch, "_forward", interrupted)
    with pytest.raises((LoraRtError, KeyboardInterrupt)):
        batch.step()
    monkeypatch.undo()
    batch.drop([other])
    while batch.rows:
        batch.step()
    assert healthy.answer == alone(mixed, wish)


def test_a_row_joins_once(mixed: Runtime) -> None:
    row = row_of(mixed, {"prompt": "a", "spec": None, "max_new_tokens": 1})
    batch = mixed.batch()
    with pytest.raises(LoraRtError, match="joined already"):
        batch.add([row, row])
    batch.add([row])
    with pytest.raises(LoraRtError, match="joined already"):
        batch.add([row])
    batch.step()
    with pytest.raises(LoraRtError, match="has ended"):
        batch.add([row])
    assert len(row.answer) == 1
