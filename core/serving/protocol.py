"""What clients send: OpenAI's requests, with `composition` and `scene` beside them.

Every field is known: one that is not is refused, since a setting that is silently left out is a wrong answer. What
OpenAI's clients send along and what changes no answer is taken and not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
Weight = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Token = Annotated[int, Field(strict=True)]
Given = dict[str, Weight] | str
_NEUTRAL: dict[str, Sequence[Any]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "best_of": (None, 1),
    "suffix": (None, ""),
}


def _of_unicode(value: Any) -> Any:
    """JSON can spell half of a surrogate pair, which no tokenizer takes and no answer can repeat."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            if any("\ud800" <= letter <= "\udfff" for letter in one):
                raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is not Unicode text")
        elif isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
    return value


class Body(BaseModel):
    """The body of a request: all of its texts are Unicode."""

    _is_unicode = model_validator(mode="before")(_of_unicode)


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = STRICT

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat. `developer` is read as `system`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":  # which may have called tools, and said nothing
            raise ValueError("content is missing")
        return self


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    include_usage: bool = False


class _Request(Body):
    """What both kinds of requests have."""

    model_config = STRICT
    _numbers: ClassVar[tuple[str, ...]] = (
        *("max_tokens", "max_completion_tokens", "min_tokens", "seed", "n", "temperature", "top_p", "top_k"),
        *("repetition_penalty", "frequency_penalty", "presence_penalty", "top_logprobs", "best_of"),
    )

    model: str = Field(description='A composition ("emotion:0.7 logic:0.3"), a named composition, or "base".')
    composition: Given | None = Field(
        None, description='In the place of `model`: a text, or references and weights: {"emotion": 0.7}.'
    )
    scene: str | None = Field(None, description="The scene type, for modes that gate by it.")
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31)
    repetition_penalty: float | None = Field(None, gt=0, lt=100, description="On the answer's own tokens; 1 is off.")
    min_tokens: int | None = Field(
        None, ge=0, le=2**31, description="Before so many the end of the turn is held back; a stop text is not."
    )
    stop: str | list[str] | None = Field(None, description="At most 16 texts before which an answer ends.")
    seed: int | None = Field(None, ge=0, lt=2**63 - 2**20, description="Answer i of `n` has the seed `seed + i`.")
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def answers(self) -> int:
        """How many answers are wanted to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts at which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @model_validator(mode="before")
    @classmethod
    def _has_numbers(cls, value: Any) -> Any:
        """Pydantic takes true for 1."""
        if isinstance(value, dict) and (odd := [n for n in cls._numbers if isinstance(value.get(n), bool)]):
            raise ValueError(f"{', '.join(odd)}: true and false are not numbers")
        return value

    @model_validator(mode="after")
    def _is_served(self) -> _Request:
        most = getattr(self, "limit", None)
        if most is not None and (self.min_tokens or 0) > most:
            raise ValueError(f"min_tokens is {self.min_tokens}, and the answer has at most {most}")
        odd = [name for name, fine in _NEUTRAL.items() if getattr(self, name, None) not in fine]
        if odd:
            raise ValueError(f"{', '.join(odd)} can't be had here; leave it out")
        if getattr(self, "top_logprobs", None) and not getattr(self, "logprobs", None):
            raise ValueError("top_logprobs go with logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream: true")
        if len(self.stops) > 16 or not all(self.stops):
            raise ValueError("stop takes at most 16 texts, none of them empty")
        return self


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @property
    def limit(self) -> int | None:
        """The longest answer that the client wants."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likely(self) -> int | None:
        """How many likely tokens are told beside each."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """The chat as the runtime takes it; a single user message is one text."""
        return chat_prompt(self.messages)


def chat_prompt(messages: Sequence[Message]) -> str | list[dict[str, str]]:
    """A chat as the runtime takes it; a single user message is one text."""
    found = []
    for message in messages:
        given = message.content or ""
        text = given if isinstance(given, str) else "".join(part.text for part in given)
        found.append({"role": "system" if message.role == "developer" else message.role, "content": text})
    return found[0]["content"] if len(found) == 1 and found[0]["role"] == "user" else found


class CompletionRequest(_Request):
    """The body of /v1/completions. A prompt is gone on with as it is: no chat template."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_or_many(cls, value: Any) -> Any:
        """`false`, as a chat has it, is none; `true` does not say how many."""
        if value is True:
            raise ValueError("it must be a number here: how many likely tokens to list at each place")
        return None if value is False else value

    @property
    def limit(self) -> int | None:
        """The longest answer that the client wants: 16 tokens unless told, as OpenAI's."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def likely(self) -> int | None:
        """How many likely tokens are told beside each."""
        return self.logprobs

    @property
    def prompts(self) -> list[Any]:
        """Each prompt, a text or token ids."""
        given: Any = self.prompt
        several = isinstance(given, list) and (not given or not isinstance(given[0], int))
        return list(given) if several else [given]

    @model_validator(mode="after")
    def _has_prompts(self) -> CompletionRequest:
        if self.echo:
            raise ValueError("echo can't be had here; leave it out")
        if not self.prompts or not all(self.prompts):
            raise ValueError("the prompt is empty")
        return self


class TurnRequest(Body):
    """The body of PATCH /v1/responses-in-flight/{id}: what its answers are under from their next token on."""

    model_config = STRICT

    model: str | None = None
    composition: Given | None = None

    @model_validator(mode="after")
    def _says_what(self) -> TurnRequest:
        if self.model is None and self.composition is None:
            raise ValueError("give a model or a composition")
        return self


class AdminRequest(Body):
    """The body of POST /admin/adapters."""

    model_config = STRICT

    name: str = Field(description="A name of this machine's store; never a path or a repository.")
    action: Literal["load", "reload", "pin", "unpin", "unload"]


class ErrorDetail(BaseModel):
    """What is wrong and what to do."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail
