"""A tokenizer without transformers: what `TextFormat` asks of one, out of tokenizer.json and a chat template.

transformers takes a second to import, of which nothing here is needed: its tokenizers of today are a shell around the
tokenizers library, and its chat templates run in Jinja's sandbox. A tokenizer whose class does more is kept as it is
(see `same_words`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer

from lora_rt.core.base.probe import template_environment

FILE = "tokenizer.json"
_DIFFICULT = ("The rain: it's 12 o'clock,\n\tand élan 雨", "a", " a  b ", "", "<|im_end|> </s> <eos> [INST]\ufffd🙂")


class Words:
    """A tokenizer with the names that transformers gives to things."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """`facts` are those of `facts_of`."""
        self.backend_tokenizer = Tokenizer.from_file(str(folder / FILE))
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self.chat_template: str | dict[str, str] | None = facts["chat_template"]
        self.all_special_tokens: list[str] = facts["all_special_tokens"]
        self.eos_token_id: int | None = facts["eos_token_id"]
        self.pad_token_id: int | None = facts["pad_token_id"]
        self._named: dict[str, Any] = facts["special_tokens_map"]

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> SimpleNamespace:
        """The tokens of a text."""
        return SimpleNamespace(input_ids=self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    @cached_property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """The tokens that were added to the model's own words, by number."""
        found: Mapping[int, Any] = self.backend_tokenizer.get_added_tokens_decoder()
        return found

    def convert_ids_to_tokens(self, token: int) -> str | None:
        """A token as the vocabulary spells it."""
        found: str | None = self.backend_tokenizer.id_to_token(token)
        return found

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        """The text of tokens; spaces are never tidied here."""
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        chat_template: str,
        add_generation_prompt: bool,
        tokenize: bool = False,
        tools: None = None,
        documents: None = None,
        **variables: Any,
    ) -> str:
        """A conversation as one text, by a template that was tried when the base was opened."""
        given = {"messages": conversation, "add_generation_prompt": add_generation_prompt}
        return str(
            _compiled(chat_template).render(**given, tools=tools, documents=documents, **{**self._named, **variables})
        )


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """A template as Jinja runs it: 20 ms, and a prompt is rendered four times (see `ChatTemplate.reads_parts`)."""
    return template_environment().from_string(template)


def facts_of(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer of transformers knows besides its tokenizer.json, as JSON can hold it."""
    return {
        "chat_template": tokenizer.chat_template,
        "all_special_tokens": [str(token) for token in tokenizer.all_special_tokens],
        "special_tokens_map": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def same_words(one: Any, other: Any) -> bool:
    """Whether two tokenizers read and write difficult texts alike, with and without what they put around a text."""
    return all(_read(one, text) == _read(other, text) for text in _DIFFICULT)


def _read(tokenizer: Any, text: str) -> list[Any]:
    found: list[Any] = [list(tokenizer(text, add_special_tokens=added).input_ids) for added in (True, False)]
    return found + [tokenizer.decode(found[0], skip_special_tokens=skipped) for skipped in (True, False)]
