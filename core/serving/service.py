"""From what a client asks for to rows that wait for their turn; everything that takes time is done beside the model.

One thread prepares: it reads prompts, resolves compositions, loads adapters and weighs them, in the order in which
requests came. The model's thread gets rows that are complete.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from lora_rt.core.base.machine import free_bytes
from lora_rt.core.native import openmp
from lora_rt.core.requests.composition import Composition
from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.metrics import Meter
from lora_rt.core.serving.names import Names
from lora_rt.core.serving.prefix import PrefixCache
from lora_rt.core.serving.preparing import Ask, Preparer
from lora_rt.core.serving.scheduler import Scheduler
from lora_rt.core.serving.settings import ServeSettings
from lora_rt.core.serving.shelf import Shelf
from lora_rt.core.serving.ticket import Listener, Ticket
from lora_rt.errors import LoraRtError

_KV_SHARE = 0.5  # of what is free when the server starts


class FullError(LoraRtError):
    """The queue is full."""


class TooManyError(LoraRtError):
    """A request that there will never be room for."""


class DrainingError(LoraRtError):
    """The server takes no more requests."""


class GoneError(LoraRtError):
    """An answer that is not being spoken."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows of a request, as many for each prompt, the composition that they are under, and the prompts' tokens."""

    tickets: Sequence[Ticket]
    model: str
    prompt_tokens: int
    answers: int = 1

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that did not have to be read."""
        each = [self.tickets[at : at + self.answers] for at in range(0, len(self.tickets), self.answers)]
        return sum(max(ticket.cached for ticket in rows) for rows in each)


class Service:
    """A runtime that serves. Thread-safe; `close` ends its threads, the runtime stays the caller's."""

    def __init__(self, runtime: Runtime, settings: ServeSettings) -> None:
        limits = settings.limits
        limits.check()
        self.runtime = runtime
        self.settings = settings
        self.meter = Meter()
        self.names = Names(runtime, settings.allow, limits.terms)
        self.shelf = Shelf(runtime, self.meter, limits.adapter_bytes)
        room = limits.kv_bytes or int(_KV_SHARE * free_bytes(str(runtime.parts.lm.device)))
        self.preparer = Preparer(runtime, limits, room)
        self.scheduler = Scheduler(
            runtime,
            limits,
            self.meter,
            # A prompt whose beginning was read before is read in other passes, and in few bits those round otherwise.
            PrefixCache(runtime, self.meter, 0 if settings.deterministic else limits.prefix_bytes),
            kv_bytes=room,
            bytes_per_token=self.preparer.bytes_per_token,
            deterministic=settings.deterministic,
        )
        self.scheduler.on_over = self._over
        self.scheduler.coming = lambda: self._preparing
        self.draining = False
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._asked = 0  # rows that were taken in and have not ended
        self._preparing = 0  # those of them that the scheduler has not got yet
        self._flying: dict[str, list[Ticket]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="lora-rt-prepare")

    def start(self) -> None:
        """Load what is pinned and what steps need, and begin to serve.

        Raises:
            LoraRtError: a pinned adapter can't be loaded.
        """
        for name in self.settings.pin:
            self.shelf.load(name, pin=True)
        _ = self.runtime.parts.lm.blocks  # what steps need is compiled or loaded before somebody waits for it
        openmp.dismiss()  # this thread has loaded the model, and the scheduler's goes on with it
        self.scheduler.start()

    def close(self) -> None:
        """End: whoever is still served is told."""
        self.draining = True
        self._worker.shutdown(wait=True, cancel_futures=True)
        self.scheduler.stop()

    @property
    def ready(self) -> bool:
        """Whether a request that comes now is served."""
        return not self.draining and not self.scheduler.broken

    @property
    def busy(self) -> int:
        """Rows that were taken in and have not ended."""
        return self._asked

    def check_open(self, rows: int = 1) -> None:
        """Whether so many rows may come in now.

        Raises:
            DrainingError, FullError: they may not.
        """
        if self.draining or self.scheduler.broken:
            raise DrainingError("the server is being stopped", next_step="Send the request to another one")
        most = self.settings.limits.rows + self.settings.limits.queue
        if rows > most:
            text = f"{rows} answers are asked for at once, and this server never takes more than {most}"
            raise TooManyError(text, next_step="Ask for fewer")
        if self._asked + rows > most:
            raise FullError(
                f"{self._asked} answers are being given or wait, and this server takes {most}",
                next_step="Send the request again in a moment",
            )

    def submit(self, ask: Ask, name: str, listener: Listener) -> Future[Prepared]:
        """Take a request in; it is prepared in another thread, and then waits for its turn.

        Args:
            name: under which it can be turned to another composition while it runs.
            listener: told of its rows (see `Scheduler.deliver`).

        Raises:
            DrainingError, FullError: it is not taken in.
        """
        rows = len(ask.prompts) * ask.answers
        with self._lock:
            self.check_open(rows)
            self._asked += rows
            self._preparing += rows
            self._flying[name] = []
            number = next(self._numbers)
        arrived = time.monotonic()

        def work() -> Prepared:
            tickets: list[Ticket] = []
            try:
                prepared = self._prepared(ask, number, arrived, listener)
                tickets += prepared.tickets
            finally:
                with self._lock:
                    self._asked -= rows - len(tickets)
                    self._preparing -= rows
                    if name in self._flying:
                        self._flying[name] = tickets
                    else:  # nobody wants it any more
                        for ticket in tickets:
                            ticket.cancelled.set()
                self.scheduler.submit(tickets)  # none where that failed: nobody is to wait for them any more
            return prepared

        return self.beside(work)

    def turn(self, name: str, model: str, composition: Mapping[str, float] | str | None) -> Future[Mapping[str, Any]]:
        """Put the rows of a request under another composition, from each one's next token on."""

        def work() -> Mapping[str, Any]:
            wanted = self.names.composition(model, composition)
            tickets = self._running(name)
            turned = [(ticket, ticket.row.weighed(wanted)) for ticket in tickets]
            for ticket, row in turned:
                self.runtime.parts.try_out(ticket.row, row)

            def act() -> Mapping[str, Any]:
                self._running(name)
                for ticket, row in turned:
                    if not ticket.over:
                        ticket.row.turn(row)
                        new = ticket.row.timeline.adapters - ticket.adapters
                        ticket.adapters |= new
                        self.shelf.take(new)
                return {"model": _told(wanted), "tokens": [len(one.row.answer) for one in self._flying.get(name, ())]}

            return self.scheduler.between(act).result()

        return self.beside(work)

    def beside(self, action: Any) -> Future[Any]:
        """Run something in the thread that prepares: what loads or unloads adapters."""
        return self._worker.submit(openmp.visiting()(action))

    def forget(self, name: str) -> None:
        """A request is over, or nobody wants it any more: what is still running of it is cancelled."""
        with self._lock:
            tickets = self._flying.pop(name, [])
        for ticket in tickets:
            if not ticket.over:
                self.scheduler.cancel(ticket)

    def _running(self, name: str) -> list[Ticket]:
        tickets = [ticket for ticket in self._flying.get(name, ()) if not ticket.over]
        if not tickets:
            text = f"no answer {name[:80]!r} is being given"
            raise GoneError(text, next_step="Use the id of a response that is being streamed")
        return tickets

    def _over(self, ticket: Ticket) -> None:
        self.shelf.give_back(ticket.adapters)
        with self._lock:
            self._asked -= 1

    # What follows runs in the preparing thread.

    def _prepared(self, ask: Ask, number: int, arrived: float, listener: Listener) -> Prepared:
        composition = self.names.composition(ask.model, ask.composition)
        rows = self.preparer.rows(ask, composition)
        end = arrived + self.settings.limits.deadline
        tickets = [
            Ticket(number, row, need, end, listener, adapters=row.timeline.adapters, arrived=arrived)
            for row, need in zip(rows, map(self.preparer.need, rows), strict=True)
        ]
        for ticket in tickets:
            self.shelf.take(ticket.adapters)
        self.shelf.trim()
        for name in sorted({adapter.name for ticket in tickets for adapter in ticket.adapters}):
            self.meter.adapters.labels(name).inc()
        prompts = sum(len(row.ids) for row in rows[:: ask.answers])
        return Prepared(tickets, _told(composition), prompts, ask.answers)


def _told(composition: Composition | None) -> str:
    return "base" if composition is None else str(composition)
