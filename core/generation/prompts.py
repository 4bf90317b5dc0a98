"""Turns prompts into tokens: through the base's chat template where it has one, as they are where it has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_rt.errors import LoraRtError

Prompt = str | Sequence[Mapping[str, str]]
"""A user message, or a list of chat messages {"role": ..., "content": ...}."""

_FORM = 'Each message is {"role": "system" | "user" | "assistant", "content": text}'


class PromptError(LoraRtError):
    """A prompt that can't become tokens."""


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of a prompt, up to and including the opening of the answer.

    Raises:
        PromptError: it is empty, is neither of the two, is no text, or the template refuses the messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt)
    for message in messages:
        _check_text(message["content"], "the prompt")
    if not tokenizer.chat_template:
        text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in messages)
        ids = [int(i) for i in tokenizer(text).input_ids]
    else:
        ids = _templated(tokenizer, messages)
    if not ids:
        raise PromptError("the prompt is empty", next_step="Give at least one character")
    return ids


def _messages(prompt: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        text = f"a prompt is a {type(prompt).__name__}"
        raise PromptError(text, next_step="Give a text, or a list of chat messages")
    problems = [f"message {n}: {message!r:.200}" for n, message in enumerate(prompt, 1) if not _is_message(message)]
    if problems:
        raise PromptError("the prompt holds what is no chat message", problems=problems, next_step=_FORM)
    if not prompt:
        raise PromptError("the prompt has no messages", next_step="Give a text, or at least one chat message")
    return [dict(message) for message in prompt]


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    import jinja2

    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (jinja2.TemplateError, KeyError, TypeError) as error:
        raise PromptError(
            f"the base's chat template refuses these messages: {error}",
            next_step=_FORM,
        ) from error
    return [int(i) for i in tokenizer(rendered, add_special_tokens=False).input_ids]


def _check_text(text: str, what: str) -> None:
    """Tokenizers fail on half of a surrogate pair: bytes of a command line that are not UTF-8, or a cut emoji."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1} is {text[error.start]!a}"
        raise PromptError(f"{what} is no Unicode text: {where}", next_step="Give it in UTF-8") from error


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an answer with the end of the turn behind it, as training wants them.

    Raises:
        PromptError: it is no text.
    """
    _check_text(text, "the answer")
    ids = [int(i) for i in tokenizer(text, add_special_tokens=False).input_ids]
    return [*ids, int(tokenizer.eos_token_id)]
