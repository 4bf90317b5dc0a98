"""Turns prompts and answers into tokens: through the base's chat template where it has one, as they are elsewhere.

messages.py   what a prompt may be     template.py   the chat template     controls.py   control tokens are text
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from lora_rt.core.generation.controls import Controls
from lora_rt.core.generation.messages import Prompt, check_text, checked_messages, each_text
from lora_rt.core.generation.template import ChatTemplate, PromptError


class TextFormat:
    """How one base reads and writes text. Training, evaluation and generation use the same."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocabulary: int | None = None,
        configured_ends: Iterable[int] = (),
        variables: Mapping[str, Any] | None = None,
        special_tokens: bool = False,
    ) -> None:
        """See `of_base`.

        Args:
            tokenizer: transformers'.
            vocabulary: how many tokens the model has; a tokenizer may know more.
            configured_ends: tokens at which the model's configuration says that an answer is over.
            variables: the chat template's, for instance {"enable_thinking": False}.
            special_tokens: whether `<|im_end|>` and the like in a text are tokens; text by default.

        Raises:
            PromptError: the template can't be used, or has no such variables.
        """
        if not isinstance(variables, Mapping | None):
            text = f"the template's variables are a {type(variables).__name__}"
            raise PromptError(text, next_step='Give their names and values: {"enable_thinking": False}')
        self.tokenizer = tokenizer
        self.template = ChatTemplate.of(tokenizer, variables or {})
        self.variables = dict(variables or {})
        self.special_tokens = special_tokens
        self._vocabulary = vocabulary
        self._configured = [int(i) for i in configured_ends]
        self.controls = Controls(tokenizer, self.template.source if self.template else "")

    @classmethod
    def of_base(
        cls, base: Any, variables: Mapping[str, Any] | None = None, *, special_tokens: bool = False
    ) -> TextFormat:
        """The format of a `LoadedBase`."""
        generation = getattr(base.model, "generation_config", None)
        return cls(
            base.tokenizer,
            vocabulary=base.facts.vocab_size,
            configured_ends=_listed(getattr(generation, "eos_token_id", None)),
            variables=variables,
            special_tokens=special_tokens,
        )

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, up to and including the opening of the answer.

        Raises:
            PromptError: it is empty, is neither of the two, is not a text, or the template refuses the messages.
        """
        messages = checked_messages(prompt)
        if self.template is None:
            text = "\n".join(message["content"] for message in messages)
            ids = self.document_ids(text)
        else:
            ids = self._templated(self.template, messages)
        if not ids:
            raise PromptError("the prompt is empty", next_step="Give at least one character")
        return self._known(ids)

    def text_ids(self, text: str, what: str = "the text") -> list[int]:
        """The tokens of a text by itself, nothing before and nothing behind it.

        Raises:
            PromptError: it is not a text.
        """
        check_text(text, what)
        if self.special_tokens or not self.controls.within(text):
            return self._known(self._encoded(text))
        return self._known(self.controls.ids(text))

    def answer_ids(self, text: str) -> list[int]:
        """The tokens of an answer with the end of the turn behind it, as training wants them.

        Raises:
            PromptError: it is not a text, or nothing says how an answer ends.
        """
        ids = self.text_ids(text, "the answer")
        if not self.turn_end:
            raise PromptError(
                "nothing says how an answer of this base ends: its tokenizer names no end-of-text token, its "
                "configuration none either, and its chat template writes none behind an answer",
                next_step='Name one as "eos_token" in its tokenizer_config.json',
            )
        return [*ids, *self.turn_end]

    @cached_property
    def turn_end(self) -> list[int]:
        """The tokens that training puts behind an answer: the template's own end of a turn, else the tokenizer's end.

        Empty where neither exists.
        """
        tails = [] if self.template is None else self.template.after_answer()
        ends = [end for tail in tails[:1] if (end := self._end_in(tail))]
        # Some templates close a turn by opening the next one (GLM): only where the model is known to stop there.
        ends += [end for tail in tails[1:] if (end := self._end_in(tail)) and end[-1] in self._configured]
        if ends:
            return ends[0]
        last = self.tokenizer.eos_token_id
        return [int(last)] if last is not None else self._configured[:1]

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens at which an answer is over, sorted: the turn's end, the tokenizer's, the configuration's.

        Empty where nothing names one; an answer then ends at its limit alone.
        """
        own = _listed(self.tokenizer.eos_token_id)
        ends = {*self.turn_end[-1:], *own, *self._configured}
        return sorted(end for end in ends if self._vocabulary is None or 0 <= end < self._vocabulary)

    @property
    def pad_id(self) -> int:
        """A token that padding can be made of, one that the model has: it is masked, so any will do."""
        own = self.tokenizer.pad_token_id
        return next((int(i) for i in (own, *self.end_ids) if i is not None and self._exists(int(i))), 0)

    @property
    def record(self) -> dict[str, str | bool]:
        """What an adapter's card says of the format it was trained with."""
        found: dict[str, str | bool] = {"chat_template": self.template.digest if self.template else "none"}
        if self.variables:
            found["template_variables"] = json.dumps(self.variables, sort_keys=True, ensure_ascii=False)
        if self.special_tokens:
            found["special_tokens"] = True
        return found

    def differs_from(self, trained: Mapping[str, Any]) -> str | None:
        """In what this format is another one than a card's `training` says, for one line; None where it is the same.

        Cards that say nothing, of earlier versions or of other programs, are taken to agree.
        """
        if "chat_template" not in trained:
            return None
        own = self.record
        if trained["chat_template"] != own["chat_template"]:
            return "with another chat template than this base has"
        then, now = (record.get("template_variables") or "none" for record in (trained, own))
        return None if then == now else f"with the template variables {then}, and they are {now} here"

    def _templated(self, template: ChatTemplate, messages: list[dict[str, Any]]) -> list[int]:
        given: list[str] = []
        each_text(messages, given.append)
        if self.special_tokens or not any(self.controls.within(text) for text in given):
            return self._encoded(template.render(messages, opening=True))
        fences = self.controls.fences(given)
        fenced = each_text(messages, lambda text: self.controls.fenced(text, fences))
        return self.controls.ids(template.render(fenced, opening=True), fences)

    def document_ids(self, text: str) -> list[int]:
        """A text as the beginning of a document: what the tokenizer puts before it stays, what it appends does not.

        Raises:
            PromptError: it is not a text.
        """
        check_text(text, "the prompt")
        return [*self._before, *self.text_ids(text, "the prompt")]

    @cached_property
    def _before(self) -> list[int]:
        whole = [int(i) for i in self.tokenizer("a").input_ids]
        plain = self._encoded("a")
        starts = range(len(whole) - len(plain) + 1)
        return next((whole[:start] for start in starts if whole[start : start + len(plain)] == plain), [])

    def _encoded(self, text: str) -> list[int]:
        try:
            return [int(i) for i in self.tokenizer(text, add_special_tokens=False).input_ids]
        except BaseException as error:
            # What stops the tokenizers library in Rust arrives as a BaseException of a class that nobody can import.
            if type(error).__name__ != "PanicException":
                raise
            problem = f"the base's tokenizer fails on this text: {str(error)[:200]}"
            raise PromptError(problem, next_step="Use another text, or a base with another tokenizer") from error

    def _end_in(self, tail: str) -> list[int]:
        """The tokens of what stands behind an answer, up to its first control token; none where it has none."""
        found = self.controls.first(tail)
        if found is None:
            return []
        before = tail[: found.start()]
        return [i for i in self._encoded((before if before.strip() else "") + found[0]) if self._exists(i)]

    def _exists(self, token: int) -> bool:
        return self._vocabulary is None or 0 <= token < self._vocabulary

    def _known(self, ids: list[int]) -> list[int]:
        strange = sorted({i for i in ids if not self._exists(i)})
        if strange:
            shown = ", ".join(f"{self.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in strange[:5])
            raise PromptError(
                f"the tokenizer has tokens that the model has not: {shown}; the model's end at {self._vocabulary}",
                next_step="Leave them out of the text, or repair the base: its tokenizer was extended, its model not",
            )
        return ids


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """`TextFormat.prompt_ids` with a tokenizer alone."""
    return TextFormat(tokenizer).prompt_ids(prompt)


def template_variables(pairs: Sequence[str]) -> dict[str, Any]:
    """The chat template's variables as a command line gives them, KEY=VALUE; true, false and numbers are read as such.

    Raises:
        PromptError: there is no KEY or no "=".
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise PromptError(
                f"{pair!r} is not a template variable", next_step="Write it as KEY=VALUE: enable_thinking=false"
            )
        try:
            found[key] = json.loads(text.lower() if text in ("True", "False", "None", "TRUE", "FALSE") else text)
        except (ValueError, RecursionError):
            found[key] = text
    return found


def _listed(ids: Any) -> list[int]:
    """One token id, several or none.

    Raises:
        PromptError: they are something else.
    """
    if ids is None:
        return []
    several = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    strange = [i for i in several if isinstance(i, bool) or not isinstance(i, int)]
    if strange:
        text = f"this base's generation_config.json ends an answer with {strange[0]!r:.80}, which is not a token id"
        raise PromptError(text, next_step="Write whole numbers there, or remove eos_token_id")
    return several
