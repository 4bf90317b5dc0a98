"""A base's chat template: which of several, what it reads, what it shows, and what follows an answer."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_rt.core.base.bounded import trouble_with
from lora_rt.errors import LoraRtError

Message = Mapping[str, Any]
NAME_VARIABLE = "chat_template"
"""The variable that picks one of several named templates."""
# Digits: a template that changes letters (capitalize, upper) or trims blanks leaves them alone.
_USER, _ANSWER, _SYSTEM, _NEXT = "80715539642", "31846207957", "59920418673", "74450163928"
MESSAGE_FORM = 'Each message is {"role": "system" | "user" | "assistant", "content": text}'


class PromptError(LoraRtError):
    """A prompt that can't become tokens."""


@dataclass(frozen=True)
class ChatTemplate:
    """One template with the values of its variables. `source` is Jinja."""

    tokenizer: Any
    source: str
    variables: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, variables: Mapping[str, Any]) -> ChatTemplate | None:
        """The template of a tokenizer, or None where it has none.

        Raises:
            PromptError: several have names and none is chosen, or variables that the template does not have.
        """
        given = getattr(tokenizer, "chat_template", None)
        if not given:
            if variables:
                text = f"this base has no chat template, and so no variable {', '.join(sorted(variables))}"
                raise PromptError(text, next_step="Leave the template variables out")
            return None
        rest = {key: value for key, value in variables.items() if key != NAME_VARIABLE}
        source = _chosen(given, variables.get(NAME_VARIABLE))
        if trouble := trouble_with(source):
            advice = "Use another base, or remove the template from its tokenizer"
            raise PromptError(f"this base can't be used: {trouble}", next_step=advice)
        _check_variables(tokenizer, source, rest)
        return cls(tokenizer, source, rest)

    @property
    def digest(self) -> str:
        """The sha256 of the template's text, 64 hex digits."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def reads_parts(self) -> bool:
        """Whether a message's content has to be a list of parts, since a text in its place would vanish.

        Raises:
            PromptError: the template shows neither.
        """
        message = {"role": "user", "content": _USER}
        for parts in (False, True):
            if _USER in (self._tried([message], parts=parts, opening=True) or ""):
                return parts
        self._render([message], parts=False, opening=True)  # whose own complaint says more
        raise PromptError(
            "the base's chat template does not show what the user says",
            next_step="Repair the template, or remove it from the tokenizer: prompts are then used as they are",
        )

    @cached_property
    def shows_system(self) -> bool:
        """Whether a system message gets into the prompt."""
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
        return _SYSTEM in (self._tried(messages, parts=self.reads_parts, opening=True) or "")

    def render(self, messages: Sequence[Message], *, opening: bool) -> str:
        """The text of a chat, with `opening` up to and including the opening of the next answer.

        Raises:
            PromptError: the template refuses the messages, or would leave out what the system or the user says.
        """
        parts = self.reads_parts
        if any(message["role"] == "system" for message in messages) and not self.shows_system:
            raise PromptError(
                "this base's chat template has no system role",
                next_step="Put the system text at the head of the first user message",
            )
        return self._render(messages, parts=parts, opening=opening)

    def after_answer(self) -> list[str]:
        """What the template writes behind an answer: at the end of a chat, and where the user goes on."""
        asked = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
        chats = (asked, [*asked, {"role": "user", "content": _NEXT}])
        shown = [self._tried(chat, parts=self.reads_parts, opening=False) or "" for chat in chats]
        return [text.partition(_ANSWER)[2].partition(_NEXT)[0] for text in shown if _ANSWER in text]

    def _tried(self, messages: Sequence[Message], *, parts: bool, opening: bool) -> str | None:
        try:
            return self._render(messages, parts=parts, opening=opening)
        except PromptError:
            return None

    def _render(self, messages: Sequence[Message], *, parts: bool, opening: bool) -> str:
        shown = [_in_parts(message) for message in messages] if parts else list(messages)
        try:
            rendered = self.tokenizer.apply_chat_template(
                shown, chat_template=self.source, add_generation_prompt=opening, tokenize=False, **self.variables
            )
        except Exception as error:  # a template is a stranger's program: it can fail in any way
            raise PromptError(
                f"the base's chat template refuses these messages: {error}", next_step=MESSAGE_FORM
            ) from error
        return str(rendered)


def _in_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _chosen(given: str | Mapping[str, str], name: Any) -> str:
    """The template's text."""
    if not isinstance(given, str) and not (
        isinstance(given, Mapping) and all(isinstance(text, str) for text in given.values())
    ):
        text = f"the base's chat template is {given!r:.80}, neither a text nor several with names"
        raise PromptError(text, next_step="Fetch the tokenizer again, or remove the template from its tokenizer")
    if isinstance(given, str):
        if name is not None and name != "default":
            raise PromptError("this base has one chat template, without a name", next_step=f"Leave {NAME_VARIABLE} out")
        return given
    if name is None and len(given) == 1:
        return next(iter(given.values()))
    chosen = given.get(name or "default")
    if chosen is None:
        problem = "none of them is the default" if name is None else f"none is called {name!r}"
        raise PromptError(
            f"this base has the chat templates {', '.join(sorted(given))}, and {problem}",
            next_step=f"Choose one: --template-var {NAME_VARIABLE}={min(given)}",
        )
    return chosen


def _check_variables(tokenizer: Any, source: str, variables: Mapping[str, Any]) -> None:
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    unknown = [key for key in variables if key in taken or not re.search(rf"\b{re.escape(key)}\b", source)]
    if unknown:
        raise PromptError(
            f"the base's chat template has no variable {', '.join(map(repr, unknown))}",
            next_step="Look into the template (chat_template of the tokenizer) for the names that it reads",
        )
