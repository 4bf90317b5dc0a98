"""Rows join, leave and fail each by itself; nobody waits for ever, and a long prompt stalls nobody."""

from __future__ import annotations

import threading
import time
from typing import Any

import openai
import pytest
import torch

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving import scheduler
from lora_rt.core.serving.service import Ask, Service
from lora_rt.core.serving.settings import Limits, ServeError, ServeSettings
from lora_rt.core.serving.speaking import merged
from lora_rt.core.serving.ticket import Event, Events, Over, Said, Ticket, hand_out
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from support.serving import Live, asked
from support.tiny import Zoo, mode_host

pytestmark = pytest.mark.slow

LONG = "a long prompt about rain on a tin roof and a bill that nobody has paid. "


class Crowd:
    """Fails where more than two rows share a pass, as memory that is too small does."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook of a module has no self
        if len(context.active) > 2:
            raise MemoryError
        return Gate(ranks=torch.ones(1))


class Heard:
    """What the rows of requests are told, in the order of telling."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Ticket, Event]] = []

    def listener(self, name: str) -> Any:
        return lambda ticket, event: self.events.append((name, ticket, event))

    def ended(self) -> list[str]:
        return [name for name, _, event in self.events if isinstance(event, Over)]


def settled(service: Service) -> None:
    while service.busy:
        time.sleep(0.002)


def ask(prompt: Any = "a", model: str = "one", tokens: int = 6, **settings: Any) -> Ask:
    return Ask([prompt], model, sampling={"max_new_tokens": tokens, "min_new_tokens": tokens}, **settings)


@pytest.fixture
def started(runtime: Runtime, request: pytest.FixtureRequest) -> Any:
    service = Service(runtime, ServeSettings(limits=getattr(request, "param", Limits())))
    yield service
    service.close()


@pytest.mark.parametrize("started", [Limits(rows=1)], indirect=True)
def test_whoever_came_first_is_served_first(started: Service) -> None:
    heard = Heard()
    for number in range(6):
        started.submit(ask(LONG * (number % 3) + "a"), str(number), heard.listener(str(number))).result()
    started.start()
    settled(started)
    assert heard.ended() == [str(number) for number in range(6)]


def test_rows_that_are_being_prepared_at_once_are_read_together(
    started: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_PATIENCE", 60.0)
    joined: list[int] = []
    batch, prepared = started.scheduler._batch, started.preparer.rows

    def slowly(*given: Any) -> Any:
        time.sleep(0.02)
        return prepared(*given)

    monkeypatch.setattr(started.preparer, "rows", slowly)
    monkeypatch.setattr(batch, "add", lambda rows: joined.append(len(rows)) or type(batch).add(batch, rows))
    started.start()
    for number in range(4):
        started.submit(ask(), str(number), Heard().listener(str(number)))
    bad = started.submit(ask(model="nobody"), "bad", Heard().listener("bad"))
    settled(started)
    assert joined == [4]
    with pytest.raises(LoraRtError, match="nobody"):
        bad.result()


def test_clients_whose_answers_ended_together_and_that_ask_one_after_the_other_are_read_together(
    started: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_SILENCE", 60.0)
    monkeypatch.setattr(scheduler, "_PATIENCE", 60.0)
    joined: list[int] = []
    batch = started.scheduler._batch
    monkeypatch.setattr(batch, "add", lambda rows: joined.append(len(rows)) or type(batch).add(batch, rows))

    def four() -> None:
        for number in range(4):
            started.submit(ask(), str(number), Heard().listener(str(number))).result()  # each is ready before the next

    four()
    started.start()
    settled(started)
    four()
    settled(started)
    assert joined == [4, 4]


def test_nobody_waits_for_clients_that_do_not_come_back(started: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_SILENCE", 60.0)
    monkeypatch.setattr(scheduler, "_PATIENCE", 60.0)
    started.start()
    for _ in range(2):  # an answer after the other: there is nobody else to wait for
        started.submit(ask(), "a", Heard().listener("a")).result()
        settled(started)
    monkeypatch.setattr(scheduler, "_SILENCE", 0.01)
    for number in range(3):
        started.submit(ask(), str(number), Heard().listener(str(number))).result()
    settled(started)
    started.submit(ask(), "alone", Heard().listener("alone")).result()
    settled(started)
    assert started.scheduler._gone == 1  # its own: the others are forgotten


@pytest.mark.parametrize("started", [Limits(reading=200)], indirect=True)
def test_twice_as_many_newcomers_are_read_at_once_while_nobody_speaks(
    started: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined: list[int] = []
    batch = started.scheduler._batch
    monkeypatch.setattr(batch, "add", lambda rows: joined.append(len(rows)) or type(batch).add(batch, rows))

    def six() -> int:
        asked = [started.submit(ask(LONG), str(number), Heard().listener(str(number))) for number in range(6)]
        return asked[0].result().prompt_tokens if all(one.result() for one in asked) else 0

    length = six()
    started.start()
    settled(started)
    assert joined[0] == 400 // length == 4

    heard, go_on = Heard(), threading.Event()
    started.submit(ask(tokens=60), "speaks", heard.listener("speaks"))
    while not heard.events:
        time.sleep(0.002)
    joined.clear()
    held = started.scheduler.between(lambda: go_on.wait(60))
    six()
    go_on.set()
    assert held.result()
    settled(started)
    assert joined[0] == 200 // length == 2


@pytest.mark.parametrize(("busy", "idle"), [(0.0, 600.0), (600.0, 0.0)], ids=["while served", "when idle"])
def test_freed_memory_is_given_back_now_and_then(
    started: Service, monkeypatch: pytest.MonkeyPatch, busy: float, idle: float
) -> None:
    running: list[int] = []
    monkeypatch.setattr(scheduler, "_TIDY", busy)
    monkeypatch.setattr(scheduler, "_TIDY_IDLE", idle)
    monkeypatch.setattr(scheduler, "give_back", lambda: running.append(started.scheduler.running))
    started.submit(ask(tokens=4), "one", Heard().listener("one")).result()
    started.start()
    settled(started)
    started.scheduler.between(lambda: None).result()  # the round that ended the row is over
    assert running
    assert set(running) == ({1} if idle else {0})


def test_nobody_waits_for_long_for_a_row_whose_adapter_is_being_loaded(
    started: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, heard, prepared = threading.Event(), Heard(), started.preparer.rows

    def loading(asked: Ask, *rest: Any) -> Any:
        assert asked.prompts != ["slow"] or loaded.wait(60)
        return prepared(asked, *rest)

    monkeypatch.setattr(started.preparer, "rows", loading)
    started.start()
    for name in ("quick", "slow"):
        started.submit(ask(name, tokens=30), name, heard.listener(name))
    while heard.ended() != ["quick"]:
        time.sleep(0.002)
    loaded.set()
    settled(started)
    assert heard.ended() == ["quick", "slow"]


@pytest.mark.parametrize("started", [Limits(kv_bytes=260 * 512)], indirect=True)
def test_a_large_row_is_not_overtaken_by_small_ones_that_would_fit(started: Service) -> None:
    """Two rows of this size do not fit at once: the second one waits, and whoever came later behind it."""
    assert started.preparer.bytes_per_token == 512
    heard = Heard()
    for name, prompt in (("large", LONG * 2), ("next", LONG * 2), ("small", "a")):
        started.submit(ask(prompt, tokens=20), name, heard.listener(name)).result()
    started.start()
    settled(started)
    assert heard.ended()[0] == "large"
    first = {name: next(n for n, (who, _, _) in enumerate(heard.events) if who == name) for name in ("next", "small")}
    over = next(n for n, (who, _, event) in enumerate(heard.events) if who == "large" and isinstance(event, Over))
    assert over < first["next"] < first["small"]


@pytest.mark.parametrize("started", [Limits(chunk=16, reading=16)], indirect=True)
def test_the_others_go_on_while_a_long_prompt_is_read(started: Service) -> None:
    heard = Heard()
    started.submit(ask("a", tokens=40), "short", heard.listener("short")).result()
    started.submit(ask(LONG * 4, tokens=1), "long", heard.listener("long")).result()
    started.start()
    settled(started)
    before = [name for name, _, event in heard.events if isinstance(event, Said)]
    assert before.index("long") >= len(LONG) * 4 // 16


def test_a_row_whose_client_has_gone_leaves_within_one_token(started: Service) -> None:
    heard = Heard()
    started.submit(ask(tokens=200), "gone", heard.listener("gone")).result()
    started.submit(ask(tokens=3), "other", heard.listener("other")).result()
    started.start()
    while not heard.events:
        time.sleep(0.001)
    told = started.scheduler.between(lambda: (started.forget("gone"), len(heard.events))[1]).result()
    settled(started)
    later = [event for name, _, event in heard.events[told:] if name == "gone" and isinstance(event, Said)]
    assert later == []
    assert started.scheduler.idle


def test_a_request_that_is_given_up_while_it_is_prepared_never_runs(started: Service) -> None:
    heard = Heard()
    started.beside(lambda: time.sleep(0.05))
    prepared = started.submit(ask(), "gone", heard.listener("gone"))
    started.forget("gone")
    prepared.result()
    started.start()
    settled(started)
    assert not any(isinstance(event, Said) for _, _, event in heard.events)


@pytest.mark.parametrize("started", [Limits(deadline=0.05)], indirect=True)
def test_an_answer_that_takes_too_long_is_given_up_with_an_error(started: Service) -> None:
    heard = Heard()
    started.submit(ask(tokens=400), "late", heard.listener("late")).result()
    started.start()
    settled(started)
    over = heard.events[-1][2]
    assert isinstance(over, Over)
    assert over.error is not None
    assert "0.05 seconds" in over.error.message


def test_a_gate_that_raises_ends_its_own_row_alone(server: Live, client: openai.OpenAI, runtime: Runtime) -> None:
    with client.chat.completions.create(**asked(model="raising:0.5 one", max_tokens=300), stream=True) as fine:
        pieces = iter(fine)
        text = [next(pieces) for _ in range(4)]
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(**asked(model="raising", max_tokens=30), extra_body={"scene": "raise later"})
        assert "this gate is broken" in raised.value.message
        text += list(pieces)
    expected = runtime.generate(["rain, tin roof"], ["raising:0.5 one"], max_new_tokens=300)[0]
    assert "".join(c.delta.content or "" for piece in text for c in piece.choices) == expected
    assert server.idle()


def test_what_can_be_seen_to_fail_never_joins_the_batch(server: Live, client: openai.OpenAI, runtime: Runtime) -> None:
    passes = []
    handle = runtime.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(openai.InternalServerError, match="this gate is broken"):
            client.chat.completions.create(**asked(model="raising"), extra_body={"scene": "raise"})
        with pytest.raises(openai.InternalServerError, match="this gate is broken"):
            client.chat.completions.create(**asked(model="raising[never said]"), extra_body={"scene": "raise"})
    finally:
        handle.remove()
    assert passes == []


def test_a_row_without_numbers_ends_alone(server: Live, client: openai.OpenAI, runtime: Runtime) -> None:
    with client.chat.completions.create(**asked(model="one", max_tokens=100), stream=True) as fine:
        pieces = iter(fine)
        text = [next(pieces) for _ in range(3)]
        with pytest.raises(openai.InternalServerError, match="not a number"):
            client.chat.completions.create(**asked(model="huge:1e38"))
        text += list(pieces)
    expected = runtime.generate(["rain, tin roof"], ["one"], max_new_tokens=100)[0]
    assert "".join(c.delta.content or "" for piece in text for c in piece.choices) == expected


def test_an_error_in_a_stream_is_told_in_the_stream(client: openai.OpenAI) -> None:
    settings = asked(model="raising", stream=True)
    with pytest.raises(openai.APIError, match="this gate is broken"):
        list(client.chat.completions.create(**settings, extra_body={"scene": "raise later"}))


def test_rows_that_fail_only_together_take_turns(zoo: Zoo) -> None:
    runtime = zoo.runtime_with(mode_host(crowd=Crowd), "llama")
    runtime.load_adapter(str(zoo.adapter("llama", mode="crowd", seed=3)), name="crowd")
    service, heard = Service(runtime, ServeSettings()), Heard()
    prompts = ["rain", "tin roof", "unpaid bill", "so", "it is"]
    prepared = [service.submit(ask(p, "crowd", 9), p, heard.listener(p)).result() for p in prompts]
    service.start()
    settled(service)
    service.close()
    expected = [runtime.generate([p], ["crowd"], max_new_tokens=9, min_new_tokens=9)[0] for p in prompts]
    said = {
        p: "".join(event.text for name, _, event in heard.events if name == p and isinstance(event, Said))
        for p in prompts
    }
    assert [said[p] for p in prompts] == expected
    assert all(len(item.tickets[0].row.answer) == 9 for item in prepared)


def test_what_is_left_when_the_server_is_closed_is_told_so(runtime: Runtime) -> None:
    service, heard = Service(runtime, ServeSettings(limits=Limits(rows=1))), Heard()
    for name in "ab":
        service.submit(ask(tokens=400), name, heard.listener(name)).result()
    service.start()
    while not heard.events:
        time.sleep(0.001)
    service.close()
    errors = [event.error for _, _, event in heard.events if isinstance(event, Over)]
    assert [error is not None and "being stopped" in error.message for error in errors] == [True, True]


def test_a_prompt_that_memory_will_never_hold_is_refused(runtime: Runtime) -> None:
    service = Service(runtime, ServeSettings(limits=Limits(kv_bytes=100 * 512)))
    with pytest.raises(LoraRtError, match="more than this server has memory for"):
        service.submit(ask(LONG * 2), "large", Heard().listener("large")).result()
    assert service.busy == 0
    service.close()


def test_limits_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ServeError) as raised:
        Limits(rows=0, deadline=0, chunk=-1).check()
    assert all(word in raised.value.message for word in ("rows", "deadline", "chunk"))


def test_all_that_a_round_says_is_delivered_at_once(runtime: Runtime) -> None:
    """Each delivery wakes the thread of the API; one per row would cost the model its turn sixteen times a step."""
    service, heard, sizes = Service(runtime, ServeSettings()), Heard(), []

    def deliver(events: Events) -> None:
        sizes.append(len(events))
        hand_out(events)

    service.scheduler.deliver = deliver
    for name in "abcd":
        service.submit(ask(tokens=6), name, heard.listener(name)).result()
    service.start()
    settled(service)
    service.close()
    assert max(sizes) >= 4
    assert len(sizes) < len(heard.events) / 2


def test_what_a_slow_reader_has_not_been_told_comes_as_one_piece(runtime: Runtime) -> None:
    row, other = runtime.rows(["a", "b"])
    one, two = (Ticket(n, r, 9, 0.0, lambda _ticket, _event: None) for n, r in enumerate((row, other)))
    events: Events = [
        (one, Said("so", 1)),
        (two, Said("x", 1)),
        (one, Said(" it", 2)),
        (one, Over("end")),
        (two, Said("y", 1)),
    ]
    told = [(ticket.number, event) for ticket, event in merged(events)]
    assert told == [(0, Said("so it", 3)), (0, Over("end")), (1, Said("xy", 2))]
