"""What clients are told, as the OpenAPI document says it. The answers themselves are made in `answers.py`; the tests
hold them against these forms, which name every field.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lora_rt.core.serving.failures import RESPONSES
from lora_rt.core.serving.protocol import ErrorBody

FinishReason = Literal["stop", "length"]
Many = dict[int | str, dict[str, Any]]


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PromptTokens(_Told):
    """`cached_tokens` of the prompt did not have to be read."""

    cached_tokens: int


class Usage(_Told):
    """What was read and said, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class LikelyToken(_Told):
    """A token and the logarithm of its chance; no bytes where it is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(LikelyToken):
    """A token that was said, and the likeliest in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Told):
    """Of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(_Told):
    """Of a completion; `text_offset` is where the text that each token adds begins in the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class SaidMessage(_Told):
    """An answer to a chat."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(_Told):
    """What is new of an answer: who speaks, then its text."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(_Told):
    """One answer."""

    index: int
    message: SaidMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatPiece(_Told):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class TextChoice(_Told):
    """One answer to a completion, whole or a piece; only the last piece says why it ended."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class _Answer(_Told):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(_Answer):
    """The answers to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(_Answer):
    """One event of a stream; `usage` is in the last one, where `stream_options.include_usage` asks for it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]
    usage: Usage | None = None


class Completion(_Answer):
    """The answers to texts, or one event of a stream of them."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage | None = None


class Turned(_Told):
    """`tokens` says how many tokens each answer had when the change came into force."""

    id: str
    model: str
    tokens: list[int]


class ModelFacts(_Told):
    """What OpenAI has no field for; all but `base` of adapters that are loaded."""

    base: str
    mode: str | None = None
    of_register: str | None = Field(None, alias="register")  # pydantic's classes have a method of that name
    sha256: str | None = None
    scene_types: list[str] | None = None


class Model(_Told):
    """A name that `model` may be made of."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    lora_rt: ModelFacts


class Models(_Told):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Health(_Told):
    """Whether the process works."""

    status: Literal["ok", "broken"]


class Ready(_Told):
    """Whether a request is served."""

    ready: bool


def told(form: type[BaseModel], event: type[BaseModel] | None = None) -> Many:
    """The responses of an endpoint that answers in this form, or, as a stream, in events of another one.

    OpenAPI 3.1 has no word for the events of a stream: its schema is that of the `data` of each but the last.
    """
    answered: dict[str, Any] = {"model": form, "description": "The answer."}
    if event is not None:
        forms = [{"$ref": f"#/components/schemas/{name}"} for name in (event.__name__, ErrorBody.__name__)]
        answered["description"] = (
            "The answer; with `stream`, server-sent events with a piece, or an error, in the `data` of each. "
            "The last one's is [DONE]."
        )
        answered["content"] = {"text/event-stream": {"schema": {"anyOf": forms}}}
    return {200: answered, **RESPONSES}


def components(form: type[BaseModel]) -> dict[str, Any]:
    """A form and all that it is made of, by name, as the document holds them."""
    schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
    parts: dict[str, Any] = schema.pop("$defs", {})
    return parts | {form.__name__: schema}
