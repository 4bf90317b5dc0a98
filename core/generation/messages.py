"""What a caller gives as a prompt: a text, or chat messages whose contents are texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_rt.core.generation.template import MESSAGE_FORM, PromptError

Prompt = str | Sequence[Mapping[str, Any]]
"""A user message, or a list of chat messages {"role", "content"}, where content is a text or a list of text parts."""

_ROLE = re.compile(r"\w[\w.-]*")


def one_per_row(value: Any, what: str) -> list[Any]:
    """Prompts or answers of several rows.

    Raises:
        PromptError: it is a single one, whose letters are no rows, or nothing of the kind.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        kind = "one text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise PromptError(f"{what} is {kind}", next_step="Give a list with one for each row")
    return list(value)


def checked_messages(prompt: Prompt) -> list[dict[str, Any]]:
    """A prompt as a list of messages whose contents are texts.

    Raises:
        PromptError: what is neither a text nor a list of chat messages, or is no Unicode.
    """
    if isinstance(prompt, str):
        check_text(prompt, "the prompt")
        return [{"role": "user", "content": prompt}]
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        text = f"a prompt is a {type(prompt).__name__}"
        chat = "Give a text, or put the messages of each chat into a list of their own: [[{...}, {...}]]"
        step = chat if isinstance(prompt, Mapping) else "Give a text, or a list of chat messages"
        raise PromptError(text, next_step=step)
    messages = [_message(message) for message in prompt]
    problems = [f"message {n}: {prompt[n - 1]!r:.200}" for n, message in enumerate(messages, 1) if message is None]
    if problems:
        raise PromptError(
            "the prompt holds something that is not a chat message", problems=problems, next_step=MESSAGE_FORM
        )
    if not messages:
        raise PromptError("the prompt has no messages", next_step="Give a text, or at least one chat message")
    whole = [message for message in messages if message is not None]
    for message in whole:
        check_text(message["content"], "the prompt")
    return whole


def _message(given: object) -> dict[str, Any] | None:
    """A message with its content as one text; None where it is none that a text model can read."""
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str) or not _ROLE.fullmatch(given["role"]):
        return None
    content = given.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(texts) if whole else None  # type: ignore[arg-type]
    return {**given, "content": content} if isinstance(content, str) else None


def each_text(value: Any, change: Callable[[str], Any]) -> Any:
    """The same messages with every text in them changed, whatever field it stands in."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: each_text(item, change) for key, item in value.items()}
    return [each_text(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def check_text(text: str, what: str) -> None:
    """Tokenizers fail on half of a surrogate pair: bytes of a command line that are not UTF-8, or a cut emoji.

    Raises:
        PromptError: there is one, or it is no text at all.
    """
    if not isinstance(text, str):
        raise PromptError(f"{what} is a {type(text).__name__}", next_step="Give a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1} is {text[error.start]!a}"
        raise PromptError(f"{what} is not Unicode text: {where}", next_step="Give it in UTF-8") from error
