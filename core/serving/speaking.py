"""What the rows of a request say, from the model's thread to the client: gathered, or passed on piece by piece."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import Request
from sse_starlette import EventSourceResponse

from lora_rt.core.serving import failures
from lora_rt.core.serving.answers import Choice, finish_reason
from lora_rt.core.serving.answers import Response as Answer
from lora_rt.core.serving.failures import Refusal
from lora_rt.core.serving.preparing import Ask
from lora_rt.core.serving.service import Prepared, Service
from lora_rt.core.serving.ticket import Event, Events, Over, Said, Ticket
from lora_rt.errors import LoraRtError

_PING = 15  # seconds between two signs of life on a stream


class Spoken:
    """What the rows of one request say, in the loop of the API."""

    def __init__(self, service: Service, name: str, log: dict[str, Any]) -> None:
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[Ticket, Event]] = asyncio.Queue()
        self._began = time.monotonic()
        self.name = name
        self.log = log
        self.choices: list[Choice] = []
        self._places: dict[Ticket, int] = {}

    async def begin(self, ask: Ask) -> Prepared:
        """Take the request in.

        Raises:
            LoraRtError: it can't be taken in, or not be prepared.
        """
        self.log |= {"id": self.name, "model": ask.model[:200]}
        try:
            prepared = await asyncio.wrap_future(self._service.submit(ask, self.name, self._listen))
        except BaseException:
            self._service.forget(self.name)
            raise
        self.choices = [Choice() for _ in prepared.tickets]
        self._places = {ticket: place for place, ticket in enumerate(prepared.tickets)}
        self.log |= {"model": prepared.model[:200], "prompt_tokens": prepared.prompt_tokens}
        return prepared

    def _listen(self, ticket: Ticket, event: Event) -> None:
        self._events.put_nowait((ticket, event))

    async def events(self) -> AsyncIterator[tuple[int, Said | str]]:
        """(choice, new text), and (choice, why) when it ends.

        Raises:
            LoraRtError: a row has failed.
        """
        while any(choice.reason is None for choice in self.choices):
            waiting = [await self._events.get()]
            while not self._events.empty():
                waiting.append(self._events.get_nowait())
            for ticket, event in merged(waiting):
                place = self._places[ticket]
                if isinstance(event, Said):
                    self._note(self.choices[place], event)
                    yield place, event
                elif event.error is not None:
                    raise event.error
                else:
                    reason = finish_reason(event.ending)
                    self.choices[place].reason = reason
                    yield place, reason

    def _note(self, choice: Choice, said: Said) -> None:
        if not any(one.tokens for one in self.choices):
            self.log["first_token"] = round(time.monotonic() - self._began, 4)
        choice.text.append(said.text)
        choice.scores += said.scores
        choice.tokens += said.tokens

    async def all(self) -> None:
        """Wait for the end of every row."""
        async for _ in self.events():
            pass

    def close(self) -> None:
        """What is still running is of no use to anybody."""
        self._service.forget(self.name)
        self.log |= {"answer_tokens": sum(choice.tokens for choice in self.choices)}
        self.log["finish"] = [choice.reason for choice in self.choices]
        if self._service.settings.log_prompts:
            self.log["answers"] = ["".join(choice.text) for choice in self.choices]


def merged(events: Events) -> Iterator[tuple[Ticket, Event]]:
    """The same, with all that one row has said in one event: whoever reads slowly is told in fewer pieces."""
    said: dict[Ticket, Said] = {}
    for ticket, event in events:
        before = said.pop(ticket, None)
        if isinstance(event, Over):
            if before is not None:
                yield ticket, before
            yield ticket, event
        elif before is None:
            said[ticket] = event
        else:
            tokens, scores = before.tokens + event.tokens, (*before.scores, *event.scores)
            said[ticket] = Said(before.text + event.text, tokens, scores)
    yield from said.items()


class Stream(EventSourceResponse):
    """A stream whose rows leave when it is over, also where the client has gone before its first piece."""

    def __init__(self, spoken: Spoken, pieces: AsyncIterator[dict[str, str]]) -> None:
        super().__init__(pieces, ping=_PING)
        self._spoken = spoken

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._spoken.close()


async def pieces(spoken: Spoken, answer: Answer, counted: bool) -> AsyncIterator[dict[str, str]]:
    """The events of a stream; where the last one counts, those before it say that they don't, as OpenAI's do."""
    none = {"usage": None} if counted else {}
    try:
        if answer.kind == "chat":
            for place in range(len(spoken.choices)):
                yield _sse(answer.opening(place) | none)
        async for place, event in spoken.events():
            if isinstance(event, str):
                yield _sse(answer.closing(place, event) | none)
            elif event.text or event.scores:
                yield _sse(answer.piece(place, event.text, event.scores) | none)
        if counted:
            yield _sse(answer.counted(spoken.choices))
    except LoraRtError as error:
        status, content = failures.of_error(error)
        spoken.log["failed"] = status  # the stream itself began with 200
        yield _sse(content)
    yield {"data": "[DONE]"}


def _sse(content: dict[str, Any]) -> dict[str, str]:
    # In ASCII: readers of lines end one at U+2028 and its like, which may stand in a text.
    return {"data": json.dumps(content, separators=(",", ":"))}


async def unless_gone(request: Request, work: Any) -> None:
    """Wait for it, unless the client goes away first: then it is cancelled.

    Raises:
        Refusal: the client has gone; nobody reads this.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(499, "The client has closed the connection", "client_closed")
        await working
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
