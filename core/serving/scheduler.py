"""One thread that owns the model: rows join and leave the running batch between two tokens.

    submit ──► waiting ──► batch ──► step ──► a token for every row ──► events
                 │ first come, first served; admitted when its keys and values fit beside the others'
    cancel, turn, between ──► done before the next step

A step reads at most `chunk` tokens of a newcomer and `reading` of all, so the others never wait long for a long prompt
(twice as many of prompts that one step reads, while nobody speaks yet).
Nobody overtakes: the first of the queue is the next one to join, however large it is, so that nobody starves.

A pass that fails takes nobody with it but the row that is to blame: every row is then tried alone, from its beginning,
and those that go on stand together again. Where each goes on alone and only all together fail (memory), half of them
wait.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from lora_rt.core.base.machine import give_back
from lora_rt.core.generation.batch import Batch
from lora_rt.core.generation.row import Ending
from lora_rt.core.requests.running import RequestRow
from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.metrics import Meter
from lora_rt.core.serving.prefix import PrefixCache
from lora_rt.core.serving.settings import Limits
from lora_rt.core.serving.ticket import Event, Events, Over, Said, Ticket, hand_out
from lora_rt.errors import LoraRtError

_log = logging.getLogger("lora_rt.serving")
_SHORT = 64  # tokens; prompts up to there may be read together whatever the padding
_PATIENCE = 0.2  # seconds at most that rows wait for others that are about to join
_SILENCE = 0.02  # seconds in which clients ask one after the other, once their answers have ended together
_TIDY, _TIDY_IDLE = 15.0, 10.0  # seconds between two times that freed memory is given back, served or not
T = TypeVar("T")


class ModelError(LoraRtError):
    """A row that the model, or a mode, could not go on with: no fault of the client's."""


class StoppedError(LoraRtError):
    """A row that was not done when the server was stopped."""


class Scheduler:
    """Start it once, submit tickets from any thread.

    Args:
        runtime: whose model it owns from now on, as far as generation goes.
        limits: rows, queue, chunks.
        kv_bytes: room for keys and values of all rows.
        bytes_per_token: what a token of a row takes of it.
    """

    def __init__(
        self,
        runtime: Runtime,
        limits: Limits,
        meter: Meter,
        prefixes: PrefixCache,
        *,
        kv_bytes: int,
        bytes_per_token: int,
        deterministic: bool = False,
    ) -> None:
        self._runtime = runtime
        self._limits = limits
        self._meter = meter
        self._prefixes = prefixes
        self._kv_bytes = kv_bytes
        self._per_token = bytes_per_token
        self._deterministic = deterministic
        self._most = limits.rows  # fewer for a while where so many did not fit
        self._changed = threading.Condition()
        self._calls: list[Callable[[], None]] = []
        self._waiting: list[Ticket] = []
        self._running: dict[int, Ticket] = {}  # by the id of the row
        self._stopping = False
        self._batch = self._new_batch(limits.chunk)
        self._thread = threading.Thread(target=self._run, name="lora-rt-model", daemon=True)
        self._events: list[tuple[Ticket, Event]] = []  # of this round
        self.on_over: Callable[[Ticket], None] = lambda _ticket: None
        self.deliver: Callable[[Events], None] = hand_out
        """Given the events of a round all at once: to wake another thread for each of them costs that thread's turn."""
        self.coming: Callable[[], int] = lambda: 0
        """How many rows are being prepared."""
        self._patient = True
        self._gone, self._heard = 0, 0.0  # rows that have ended and were followed by no other; when one came or ended
        self._lasted = 0.0  # seconds that the last step took
        self._tidied = time.monotonic()
        self.broken = False

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End; whoever is still running or waiting is told."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows that are in the batch."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether there is nobody to serve."""
        return not self._waiting and not self._running

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Let rows wait for their turn."""
        with self._changed:
            if not self._stopping and not self.broken:
                for ticket in tickets:
                    insort(self._waiting, ticket, key=lambda one: one.number)
                now = time.monotonic()
                gone = self._gone if now - self._heard < _PATIENCE else 0
                self._patient, self._heard, self._gone = True, now, max(0, gone - len(tickets))
                self._changed.notify()
                return
        self.deliver([(ticket, self._over(ticket, None, _stopped())) for ticket in tickets])

    def cancel(self, ticket: Ticket) -> None:
        """Let a row leave before its next token."""
        ticket.cancelled.set()
        with self._changed:
            self._changed.notify()

    def between(self, action: Callable[[], T]) -> Future[T]:
        """Run something that uses the model, or a running row, in its thread between two steps."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(action())
            except Exception as error:  # it belongs to whoever asked
                future.set_exception(error)

        with self._changed:
            if self._stopping or self.broken:
                future.set_exception(_stopped())
                return future
            self._calls.append(call)
            self._changed.notify()
        return future

    # What follows runs in the model's thread.

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except BaseException:
            self.broken = True
            _log.exception("the scheduler has failed")
            raise
        finally:
            with self._changed:
                self._stopping = True
                left, calls = [*self._running.values(), *self._waiting], self._calls
                self._waiting, self._calls = [], []
            for ticket in left:
                self._end(ticket, None, _stopped())
            self._deliver()
            for call in calls:
                call()

    def _next(self) -> bool:
        """One round; false when it is time to end."""
        with self._changed:
            while not (self._calls or self._waiting or self._running or self._stopping):
                self._changed.wait()
            if self._stopping:
                return False
            calls, self._calls = self._calls, []
        for call in calls:
            call()
        self._gather()
        self._dismiss()
        self._admit()
        if self._running:
            self._step()
        else:
            self._most = self._limits.rows
        self._deliver()
        self._tidy()
        self._meter.load(len(self._waiting), len(self._running), self._kv_in_use())
        return True

    def _tidy(self) -> None:
        """Give freed memory back now and then, which holds everybody up for a step; sooner when nobody is served.

        Within half a minute of load a tenth of the process is freed again and not used: so often, memory stays level.
        """
        if time.monotonic() - self._tidied > (_TIDY if self._running else _TIDY_IDLE):
            give_back()
            self._tidied = time.monotonic()

    def _gather(self) -> None:
        """Wait for rows that are about to join, and that there is room for: they are read together then.

        They are being prepared: beside a step, which takes turns of milliseconds with them, what takes ten milliseconds
        takes a hundred, and the step is late as well. Or as many have just ended, and their clients ask one after the
        other for more: who is first would be read alone while all others wait. Nobody waits longer than a step takes;
        and where nothing came of it, not again until something does: it is an adapter that is being loaded.
        """
        end = time.monotonic() + min(_PATIENCE, self._lasted if self._running else _PATIENCE)
        with self._changed:
            before = len(self._waiting)
            while len(self._running) + len(self._waiting) < self._most and not self._stopping:
                prepared = self._patient and self.coming() > 0
                if not prepared and not (self._waiting and self._gone > 0):
                    break
                until = end if prepared else min(end, self._heard + _SILENCE)
                if not self._changed.wait(until - time.monotonic()):
                    self._gone = 0
                    self._patient = not prepared or len(self._waiting) > before
                    break

    def _dismiss(self) -> None:
        """Rows whose client has gone, or whose time is over, leave."""
        now = time.monotonic()
        with self._changed:
            gone = [t for t in self._waiting if t.cancelled.is_set() or t.deadline < now]
            self._waiting = [t for t in self._waiting if not (t.cancelled.is_set() or t.deadline < now)]
        leaving = [t for t in self._running.values() if t.cancelled.is_set() or t.deadline < now]
        if leaving:
            self._batch.drop([ticket.row for ticket in leaving])
        for ticket in [*gone, *leaving]:
            late = None if ticket.cancelled.is_set() else _too_late(self._limits.deadline)
            self._end(ticket, None, late)

    def _admit(self) -> None:
        """Let those join who fit, in the order in which they came."""
        joining: list[Ticket] = []
        with self._changed:
            while self._waiting and self._has_room(self._waiting[0], joining):
                joining.append(self._waiting.pop(0))
        for ticket in joining:
            ticket.row.read = 0
            self._prefixes.lend(ticket)
            self._running[id(ticket.row)] = ticket
        if joining:
            self._batch.add([ticket.row for ticket in joining])

    def _has_room(self, ticket: Ticket, joining: Sequence[Ticket]) -> bool:
        beside = [*self._running.values(), *joining]
        if not beside:
            return True
        # Rows stand padded to the longest of them.
        widest = max(ticket.need, *(one.need for one in beside))
        if len(beside) >= self._most or (len(beside) + 1) * widest * self._per_token > self._kv_bytes:
            return False
        unread = [left for one in beside if (left := one.row.length - one.row.read) > 1]
        chunk, reading = self._limits.chunk, self._limits.reading
        if max([*unread, ticket.row.length]) <= chunk and not any(one.said for one in beside):
            reading *= 2  # nobody waits for a next token, and one pass takes less time than two
        if unread and sum(min(chunk, left) for left in [*unread, ticket.row.length]) > reading:
            return False
        # Those who join together are read together: a long prompt is not to make the short ones wait.
        lengths = [one.row.length for one in joining]
        longest = max([*lengths, ticket.row.length])
        return longest <= _SHORT or longest * (len(lengths) + 1) <= 2 * (sum(lengths) + ticket.row.length)

    def _step(self) -> None:
        began = time.monotonic()
        try:
            self._batch.step()
        except Exception as error:  # a mode's gate, or the memory: it is found out which row is to blame
            self._separate(error)
        self._lasted = time.monotonic() - began
        self._report()

    def _report(self) -> None:
        """Tell every row what it has said, and those that have ended that they have."""
        now = time.monotonic()
        for ticket in list(self._running.values()):
            row = ticket.row
            new = len(row.answer) - ticket.said
            if new:
                self._meter.token(ticket, now, new)
                ticket.said, ticket.spoke = len(row.answer), now
            text, scores = row.new_text(), tuple(row.new_scores())
            if text or new or scores:
                self._events.append((ticket, Said(text, new, scores)))
            if row.ended is not None:
                self._end(ticket, row.ended, _not_a_number() if row.ended == "error" else None)

    def _separate(self, error: Exception) -> None:
        """After a pass that has failed: find the rows that fail alone, and begin anew with the others."""
        _log.warning("a pass has failed, and its rows are tried one by one: %s", error)
        self._batch = self._new_batch(self._limits.chunk)
        whole = True
        for ticket in list(self._running.values()):
            row = ticket.row
            row.read, row.begin = 0, None
            alone = self._new_batch(None)
            try:
                alone.add([row])
                alone.step()
            except Exception as own:  # this one
                whole = False
                self._end(ticket, None, _failed(own))
        left = [ticket for ticket in self._running.values() if ticket.row.ended is None]
        if whole and len(left) > 1:
            self._most = len(left) // 2
            for ticket in left[self._most :]:
                del self._running[id(ticket.row)]
                with self._changed:
                    insort(self._waiting, ticket, key=lambda one: one.number)
            left = left[: self._most]
        for ticket in left:
            ticket.row.read = 0
        self._batch.add([ticket.row for ticket in left])

    def _end(self, ticket: Ticket, ending: Ending | None, error: LoraRtError | None) -> None:
        self._running.pop(id(ticket.row), None)
        if ending is not None:
            with self._changed:
                self._gone, self._heard = self._gone + 1, time.monotonic()
        self._events.append((ticket, self._over(ticket, ending, error)))

    def _over(self, ticket: Ticket, ending: Ending | None, error: LoraRtError | None) -> Over:
        ticket.over = True
        self.on_over(ticket)
        return Over(ending, error)

    def _deliver(self) -> None:
        events, self._events = self._events, []
        if events:
            self.deliver(events)

    def _new_batch(self, chunk: int | None) -> Batch[RequestRow]:
        keep: Any = self._prefixes.keep if self._prefixes.enabled else None
        return self._runtime.batch(chunk=chunk, deterministic=self._deterministic, keep=keep)

    def _kv_in_use(self) -> int:
        widest = max((ticket.row.length for ticket in self._running.values()), default=0)
        return widest * len(self._running) * self._per_token


def _stopped() -> LoraRtError:
    return StoppedError("the server is being stopped", next_step="Send the request again in a moment")


def _too_late(seconds: float) -> LoraRtError:
    text = f"the answer was not done within {seconds:g} seconds"
    return ModelError(text, next_step="Ask for fewer tokens, or try again when the server is less busy")


def _not_a_number() -> LoraRtError:
    return ModelError("the model's output is not a number any more", next_step="Use smaller weights")


def _failed(error: Exception) -> LoraRtError:
    if isinstance(error, LoraRtError):
        return ModelError(error.message, next_step=error.next_step, problems=error.problems)
    return ModelError(f"the model failed on this request: {type(error).__name__}", next_step="Use another composition")
