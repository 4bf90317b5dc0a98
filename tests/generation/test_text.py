"""Streamed text takes nothing back and joins to the whole, whatever the tokenizer does with bytes and spaces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.generation.text import TextStream, text_of
from support.tiny import save_tokenizer


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A token is a byte."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bytes")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def wordwise() -> Any:
    """Words that carry their space in front, as Llama's do, over single bytes as the last resort."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "▁the", "▁sea", "s", "▁'", "'", "▁m", "m", "▁", ",", "▁,", "▁don", "t"]
    vocabulary = {word: number for number, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", clean_up_tokenization_spaces=True
    )


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.rest()]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def test_pieces_of_any_bytes_join_to_what_the_tokenizer_makes_of_them(bytewise: Any) -> None:
    for seed in range(200):
        dice = random.Random(seed)
        ids = [dice.randrange(len(bytewise)) for _ in range(dice.randrange(30))]
        assert "".join(pieces_of(bytewise, ids)) == text_of(bytewise, ids) == decoded(bytewise, ids)


def test_pieces_of_words_and_spelt_out_characters_join_to_what_the_tokenizer_makes_of_them(wordwise: Any) -> None:
    for seed in range(200):
        dice = random.Random(seed)
        ids: list[int] = []
        for _ in range(dice.randrange(20)):
            character = chr(dice.choice([9, 65, 233, 0x20AC, 0x65E5, 0x1F30A]))
            spelt = [wordwise.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in character.encode()]
            ids += dice.choice([spelt, [dice.randrange(1, 14)]])
        assert "".join(pieces_of(wordwise, ids)) == text_of(wordwise, ids) == decoded(wordwise, ids)


def test_broken_bytes_do_not_take_back_what_was_given(wordwise: Any) -> None:
    ids = wordwise.convert_tokens_to_ids(["▁sea", "<0x41>", "<0xC3>", "▁the"])
    assert text_of(wordwise, ids) == "seaA\ufffd the"


@pytest.mark.parametrize("text", ["grün", "日本語", "👩‍👩‍👧", "e\u0301a", "naïve – “so”"])
def test_a_character_of_several_tokens_appears_when_it_is_whole(bytewise: Any, text: str) -> None:
    pieces = pieces_of(bytewise, bytewise(text, add_special_tokens=False).input_ids)
    assert [piece for piece in pieces if piece] == list(text)


def test_every_token_of_plain_text_is_given_at_once(bytewise: Any) -> None:
    assert pieces_of(bytewise, bytewise("rain", add_special_tokens=False).input_ids) == ["r", "a", "i", "n", ""]


def test_a_broken_end_is_given_when_the_answer_is_over(bytewise: Any) -> None:
    ids = bytewise("aü", add_special_tokens=False).input_ids[:-1]
    assert pieces_of(bytewise, ids) == ["a", "", "\ufffd"]


def test_spaces_are_not_tidied(wordwise: Any) -> None:
    ids = [wordwise.convert_tokens_to_ids(word) for word in ("▁the", "▁sea", "▁,", "▁'", "m")]
    assert text_of(wordwise, ids) == "the sea , 'm"


def test_special_tokens_are_not_text(bytewise: Any, tmp_path: Path) -> None:
    ids = [1, *bytewise("a", add_special_tokens=False).input_ids, 2]
    assert "".join(pieces_of(bytewise, ids)) == text_of(bytewise, ids) == "a"
