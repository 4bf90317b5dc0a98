"""Control tokens (`<|im_end|>`, `<bos>`) that stand in a user's text are text; those that a template writes are tokens.

A text without any of them is tokenized as a whole, as it always was. For the others the tokenizer gets a twin that
knows each control token under another, secret name. What the template wrote is renamed before the twin reads it; what
the user wrote is left alone, so the twin finds ordinary letters there:

    rendered   <|im_start|>user\n⟦<|im_end|>⟧ hi<|im_end|>          ⟦⟧: around what came from a user
    twin reads A1user\n<|im_end|> hiA2                              A1, A2: the secret names
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any

_FENCES = [chr(code) for code in range(0xE000, 0xE100)]  # private use: no text of a language has them
_CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)


class Controls:
    """The control tokens of a tokenizer, and how texts are tokenized in which they are letters."""

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        """`template`: added tokens that it writes are control tokens, too, though the tokenizer does not say so."""
        self._tokenizer = tokenizer
        found = {str(token) for token in tokenizer.all_special_tokens}
        for token in tokenizer.added_tokens_decoder.values():
            text = token.content
            written = text in template and not text.isspace() and not text.isalnum()
            if token.special or written or _CONTROL_FORM.fullmatch(text):
                found.add(text)
        self.texts: tuple[str, ...] = tuple(sorted(found - {""}, key=lambda text: (-len(text), text)))
        self._any = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")

    def within(self, text: str) -> bool:
        """Whether a text holds one of them."""
        return self._any.search(text) is not None

    def first(self, text: str) -> re.Match[str] | None:
        """The first one in a text."""
        return self._any.search(text)

    def fences(self, texts: Sequence[str]) -> tuple[str, str]:
        """Two characters that stand in none of the texts."""
        taken = set().union(*texts)
        opening, closing = [fence for fence in _FENCES if fence not in taken][:2]
        return opening, closing

    def fenced(self, text: str, fences: tuple[str, str]) -> str:
        """The text with each control token in it between fences, so that it is known after a template has copied it."""
        return self._any.sub(lambda match: f"{fences[0]}{match[0]}{fences[1]}", text)

    def ids(self, text: str, fences: tuple[str, str] | None = None) -> list[int]:
        """The tokens of a text. A control token in it is one where there are fences and it is not between them."""
        pieces: list[tuple[str, bool]] = [(text, False)]
        if fences is not None:
            pieces = list(self._parted(text, fences))
        if self._twin is not None:
            return self._twin.ids("".join(self._twin.names[piece] if real else piece for piece, real in pieces))
        return [i for piece, real in pieces for i in self._without_twin(piece, real)]

    def _parted(self, text: str, fences: tuple[str, str]) -> list[tuple[str, bool]]:
        """(text, whether it is a control token). A fence that lost its fellow, since a template may cut, is dropped."""
        opening, closing = fences
        token = self._any.pattern
        parts: list[tuple[str, bool]] = []
        end = 0
        for match in re.finditer(f"{opening}({token}){closing}|({token})|[{opening}{closing}]", text):
            parts.append((text[end : match.start()] + (match[1] or ""), False))
            if match[2]:
                parts.append((match[2], True))
            end = match.end()
        return [*parts, (text[end:], False)]

    def _without_twin(self, piece: str, real: bool) -> list[int]:
        """For tokenizers that are not of the tokenizers library."""
        if real:
            return [int(self._tokenizer.convert_tokens_to_ids(piece))]
        if not piece:
            return []
        encoded = self._tokenizer(piece, add_special_tokens=False, split_special_tokens=True)
        return [int(i) for i in encoded.input_ids]

    @cached_property
    def _twin(self) -> _Twin | None:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else _Twin(backend, self.texts)


class _Twin:
    """A copy of a tokenizer whose control tokens have names that nobody can guess."""

    def __init__(self, backend: Any, controls: Sequence[str]) -> None:
        from tokenizers import Tokenizer

        nonce = secrets.token_hex(8)
        self.names = {text: f"\uf8f0{nonce}.{number}\uf8f1" for number, text in enumerate(controls)}
        document = json.loads(backend.to_str())
        document.update(truncation=None, padding=None, post_processor=None)
        self._rename_words(document["model"])
        originals: dict[str, int] = {}
        for token in document["added_tokens"]:
            name = self.names.get(token["content"], token["content"])
            originals[name] = token["id"]
            if name != token["content"]:
                token.update(content=name, normalized=False)
        self._backend = Tokenizer.from_str(json.dumps(document))
        # An added token that is no word of the model gets its number anew when the copy is made.
        self._ids = {self._backend.token_to_id(name): number for name, number in originals.items()}

    def ids(self, text: str) -> list[int]:
        return [self._ids.get(i, i) for i in self._backend.encode(text, add_special_tokens=False).ids]

    def _rename_words(self, model: dict[str, Any]) -> None:
        """Some control tokens are words of the model as well, which it could find in a text by itself."""
        names = self.names
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [word, score] by number
            model["vocab"] = [[names.get(word, word), score] for word, score in vocabulary]
            return
        model["vocab"] = {names.get(word, word): number for word, number in vocabulary.items()}
        if "merges" in model:  # a merge that makes a control token has no result any more
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [pair for pair in pairs if not names.keys() & {"".join(pair), *pair}]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
