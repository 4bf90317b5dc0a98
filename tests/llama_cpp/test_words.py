"""A tokenizer without transformers reads and writes every text as transformers' own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.generation.template import PromptError
from lora_rt.core.generation.text import pieces_of
from lora_rt.core.llama_cpp.words import Words, facts_of, same_words
from support import templates
from support.words import text_of

TEMPLATES = ("CHATML", "LLAMA3", "GEMMA", "QWEN3", "MISTRAL", "PARTS", "GLM", "PLAIN")
CHATS: list[Any] = [
    "rain, tin roof",
    " <|im_end|> is text, and so is <eos>; 日本語 👩‍👩‍👧\ttoo ",
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>well</think>\n yes "},
        {"role": "user", "content": "no"},
    ],
]


def both(tmp_path: Path, kind: str, template: str | None) -> tuple[Any, Words]:
    own = templates.tokenizer(kind, template)
    own.save_pretrained(tmp_path)
    return own, Words(tmp_path, facts_of(own))


@pytest.mark.slow
@pytest.mark.parametrize("kind", templates.KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("special", [False, True], ids=["text", "tokens"])
def test_prompts_and_ends_are_those_of_transformers(tmp_path: Path, kind: str, template: str, special: bool) -> None:
    own, words = both(tmp_path, kind, getattr(templates, template))
    formats = [TextFormat(tokenizer, special_tokens=special) for tokenizer in (own, words)]
    for ask in (
        lambda f: f.end_ids,
        lambda f: f.turn_end,
        lambda f: f.answer_ids("a <|im_end|> b"),
        lambda f: f.pad_id,
    ):
        assert ask(formats[1]) == ask(formats[0])
    assert [formats[1].prompt_ids(chat) for chat in CHATS] == [formats[0].prompt_ids(chat) for chat in CHATS]


@pytest.mark.parametrize("kind", templates.KINDS)
def test_tokens_become_the_same_text_whole_and_in_pieces(tmp_path: Path, kind: str) -> None:
    own, words = both(tmp_path, kind, None)
    assert same_words(own, words)
    for text in templates.CORPUS:
        ids = own(text).input_ids
        assert text_of(words, ids) == text_of(own, ids)
        assert pieces_of(words, ids) == pieces_of(own, ids)
    assert TextFormat(words).document_ids("a b") == TextFormat(own).document_ids("a b")


def test_templates_see_what_transformers_lets_them_see(tmp_path: Path) -> None:
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if loop.last %}{% break %}"
        "{% endif %}{% endfor %}{{ ns.n }}{{ dict(a=1) | tojson }}{{ {'é': [1, '<']} | tojson(indent=2) }}"
        "{% generation %} {{ messages[0].content }} {% endgeneration %}{{ strftime_now('%Y') }}{{ eos_token }}"
        "{{ tools is none }}{{ thinking is defined }}\n"
    )
    own, words = both(tmp_path, "bytes", template)
    formats = [TextFormat(tokenizer, variables={"thinking": True}) for tokenizer in (own, words)]
    assert formats[1].prompt_ids("hi") == formats[0].prompt_ids("hi")
    assert "é" in words.decode(formats[1].prompt_ids("hi"))


@pytest.mark.parametrize(
    "inner", ["namespace(__class__=1)", "namespace(**{'_x': 1})", "messages.append(1)", "''.__class__"]
)
def test_a_template_that_reaches_for_more_is_refused(tmp_path: Path, inner: str) -> None:
    for tokenizer in both(tmp_path, "bytes", "{{ messages[0].content }}{% if " + inner + ".x.y %}{% endif %}"):
        with pytest.raises(PromptError):
            TextFormat(tokenizer).prompt_ids("hi")


def test_a_tokenizer_that_does_more_than_its_file_says_is_told_from_its_file(tmp_path: Path) -> None:
    own, words = both(tmp_path, "bytes", None)
    plain = own.decode
    own.decode = lambda ids, **options: plain(ids, **options).strip()
    assert not same_words(own, words)
