"""From what rows say to OpenAI's objects: whole answers, and the pieces of streamed ones."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_rt.core.generation.row import Ending, TokenScore
from lora_rt.core.generation.text import TextStream, bytes_of
from lora_rt.core.serving.service import Prepared
from lora_rt.core.serving.ticket import Ticket

Kind = Literal["chat", "text"]
_OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "text": ("text_completion", "text_completion")}


def new_id(kind: Kind) -> str:
    """The name of a response, which nobody can guess."""
    return f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{secrets.token_hex(12)}"


def finish_reason(ending: Ending | None) -> str:
    """OpenAI's word for an ending."""
    return "stop" if ending in ("end", "stop") else "length"


@dataclass
class Choice:
    """One row's answer so far."""

    text: list[str] = field(default_factory=list)
    scores: list[TokenScore] = field(default_factory=list)
    tokens: int = 0
    reason: str | None = None


@dataclass
class _Reading:
    """How many letters of an answer its tokens have made so far; a character of several tokens stands at its last."""

    stream: TextStream
    letters: int = 0
    waits: bool = False  # for whether the bytes before are a character

    def begin(self, token: int, text: str) -> int:
        """Where the next token begins, whose own text is given."""
        new = len(self.stream.push(token))
        # What comes out now may be that of bytes before it, which were none: then it begins behind them.
        begun = self.letters + (max(new - len(text), 0) if self.waits else 0)
        self.letters, self.waits = self.letters + new, new == 0
        return begun


@dataclass
class Response:
    """The objects of one request."""

    kind: Kind
    name: str
    prepared: Prepared
    fingerprint: str
    tokenizer: Any
    likely: int | None
    created: int = field(default_factory=lambda: int(time.time()))
    _read: dict[int, _Reading] = field(default_factory=dict)  # of the tokens of each choice

    @property
    def tickets(self) -> Sequence[Ticket]:
        """Its rows; the place of each is the index of its choice."""
        return self.prepared.tickets

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """A response that is not streamed."""
        return self._object(0) | {
            "choices": [self._choice(number, choice) for number, choice in enumerate(choices)],
            "usage": self.usage(choices),
        }

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What was read and said."""
        said = sum(choice.tokens for choice in choices)
        prompt = self.prepared.prompt_tokens
        cached = self.prepared.cached_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
        }

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of a chat's answer: who speaks."""
        return self._piece(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """New text."""
        content = {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
        return self._piece(index, content, None, self._scores(scores, self._reading(index)))

    def closing(self, index: int, reason: str) -> dict[str, Any]:
        """The last piece: why it ended."""
        content: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._piece(index, content, reason)

    def counted(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """What comes last where the client asked for it."""
        return self._object(1) | {"choices": [], "usage": self.usage(choices)}

    def _object(self, form: int) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": _OBJECTS[self.kind][form],
            "created": self.created,
            "model": self.prepared.model,
            "system_fingerprint": self.fingerprint,
        }

    def _piece(self, index: int, content: dict[str, Any], reason: str | None, scores: Any = None) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": scores, "finish_reason": reason}
        return self._object(1) | {"choices": [choice]}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        content: dict[str, Any] = said if self.kind == "chat" else {"text": text}
        scores = self._scores(choice.scores, self._reading(index))
        return {"index": index, **content, "logprobs": scores, "finish_reason": choice.reason}

    def _scores(self, scores: Sequence[TokenScore], reading: _Reading) -> dict[str, Any] | None:
        if self.likely is None:
            return None
        return self._of_chat(scores) if self.kind == "chat" else self._of_text(scores, reading)

    def _reading(self, index: int) -> _Reading:
        """What was read of a choice's tokens so far."""
        return self._read.setdefault(index, _Reading(TextStream(self.tokenizer)))

    def _of_chat(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            content = bytes_of(self.tokenizer, token)
            told = None if content is None else list(content)
            return {"token": self._text(token), "logprob": logprob, "bytes": told}

        content = [
            {**told(one.token, one.logprob), "top_logprobs": [told(*pair) for pair in one.likeliest]} for one in scores
        ]
        return {"content": content, "refusal": None}

    def _of_text(self, scores: Sequence[TokenScore], reading: _Reading) -> dict[str, Any]:
        return {
            "tokens": [self._key(one.token) for one in scores],
            "token_logprobs": [one.logprob for one in scores],
            "top_logprobs": [self._likeliest(one) for one in scores],
            "text_offset": [reading.begin(one.token, self._text(one.token)) for one in scores],
        }

    def _likeliest(self, one: TokenScore) -> dict[str, float]:
        """By text; of two tokens that read the same the likelier one."""
        found: dict[str, float] = {}
        for token, logprob in one.likeliest:
            found.setdefault(self._key(token), logprob)
        return found

    def _key(self, token: int) -> str:
        """The text of a token, or its bytes as OpenAI spells them where it is part of a character."""
        text = self._text(token)
        if "\ufffd" not in text or (content := bytes_of(self.tokenizer, token)) is None:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
