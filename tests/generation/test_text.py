"""Streamed text takes nothing back and joins to the whole, whatever the tokenizer does with bytes and spaces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.generation.stopping import SpokenText
from lora_rt.core.generation.text import TextStream, bytes_of, pieces_of
from support.tiny import save_tokenizer
from support.words import text_of


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


def streamed(tokenizer: Any, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.rest()]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def test_pieces_of_any_bytes_join_to_what_the_tokenizer_makes_of_them(bytewise: Any) -> None:
    for seed in range(200):
        dice = random.Random(seed)
        ids = [dice.randrange(len(bytewise)) for _ in range(dice.randrange(30))]
        assert "".join(streamed(bytewise, ids)) == text_of(bytewise, ids) == decoded(bytewise, ids)


@pytest.mark.parametrize("kind", ["bytewise", "wordwise"])
def test_the_tokens_that_are_told_are_those_whose_text_is_given(kind: str, request: pytest.FixtureRequest) -> None:
    """While it goes on no token of which a letter is held back; in the end all that begin before a stop text."""
    tokenizer, stopped = request.getfixturevalue(kind), 0
    letters = range(2, 14) if kind == "wordwise" else tokenizer("ab €", add_special_tokens=False).input_ids
    for seed in range(300):
        dice = random.Random(seed)
        spoken = SpokenText(tokenizer, dice.sample(["ab", "a ", "bab", "the s", "s,", "m'm"], 3))
        made, ends, given, told = TextStream(tokenizer), [0], "", [0]
        while len(told) <= 20 and not spoken.stopped:
            token = dice.choice(letters)
            ends.append(ends[-1] + len(made.push(token)))
            given += spoken.push(token)
            told.append(spoken.tokens)
            assert spoken.stopped or told[-1] == sum(end <= len(given) for end in ends[1:])
        given += spoken.rest()
        told.append(spoken.tokens)
        assert told == sorted(told)
        begun = sum(begin < len(given) for begin in ends[:-1])
        done = sum(end <= len(given) for end in ends[1:])  # beyond those some may have no letters of their own
        assert begun <= told[-1] <= max(begun, done) if spoken.stopped else told[-1] == 20
        stopped += spoken.stopped
    assert stopped > 50


def test_pieces_of_words_and_spelt_out_characters_join_to_what_the_tokenizer_makes_of_them(wordwise: Any) -> None:
    for seed in range(200):
        dice = random.Random(seed)
        ids: list[int] = []
        for _ in range(dice.randrange(20)):
            character = chr(dice.choice([9, 65, 233, 0x20AC, 0x65E5, 0x1F30A]))
            spelt = [wordwise.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in character.encode()]
            ids += dice.choice([spelt, [dice.randrange(1, 14)]])
        assert "".join(streamed(wordwise, ids)) == text_of(wordwise, ids) == decoded(wordwise, ids)


def test_broken_bytes_do_not_take_back_what_was_given(wordwise: Any) -> None:
    ids = wordwise.convert_tokens_to_ids(["▁sea", "<0x41>", "<0xC3>", "▁the"])
    assert text_of(wordwise, ids) == "seaA\ufffd the"


@pytest.mark.parametrize("text", ["grün", "日本語", "👩‍👩‍👧", "e\u0301a", "naïve – “so”"])
def test_a_character_of_several_tokens_appears_when_it_is_whole(bytewise: Any, text: str) -> None:
    pieces = streamed(bytewise, bytewise(text, add_special_tokens=False).input_ids)
    assert [piece for piece in pieces if piece] == list(text)


def test_every_token_of_plain_text_is_given_at_once(bytewise: Any) -> None:
    assert streamed(bytewise, bytewise("rain", add_special_tokens=False).input_ids) == ["r", "a", "i", "n", ""]


def test_a_broken_end_is_given_when_the_answer_is_over(bytewise: Any) -> None:
    ids = bytewise("aü", add_special_tokens=False).input_ids[:-1]
    assert streamed(bytewise, ids) == ["a", "", "\ufffd"]


def test_spaces_are_not_tidied(wordwise: Any) -> None:
    ids = [wordwise.convert_tokens_to_ids(word) for word in ("▁the", "▁sea", "▁,", "▁'", "m")]
    assert text_of(wordwise, ids) == "the sea , 'm"


def test_special_tokens_are_not_text(bytewise: Any, tmp_path: Path) -> None:
    ids = [1, *bytewise("a", add_special_tokens=False).input_ids, 2]
    assert "".join(streamed(bytewise, ids)) == text_of(bytewise, ids) == "a"


SCRIPTS = {
    "English": "The sea, the sea: the rain on the roof.",
    "Russian": "Дождь идёт, и крыша его повторяет.",
    "Japanese": "海は広い。雨が屋根を叩く。",
    "Chinese": "今天下雨了，屋顶一直在响。",
    "Arabic": "المطر على السقف، ولا أحد يسمع.",
    "Hindi": "बारिश छत पर गिरती है।",
    "combining marks": "e\u0301 a\u0308o\u0302 n\u0303",
    "emoji": "🌊 👩‍👩‍👧 🇳🇴 👍🏽",
}


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Llama 2's kind: sentencepiece's own file, with bytes as the last resort."""
    trained = pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = [SCRIPTS["English"], SCRIPTS["Russian"], "日本の海 海は広い"] * 20
    settings = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    trained.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), normalization_rule_name="identity",
        add_dummy_prefix=True, **settings,
    )  # fmt: skip
    return LlamaTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tiktokens() -> Any:
    """Llama 3's and Qwen's kind: tiktoken's pattern over bytes, here cut from a few texts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([SCRIPTS["English"], SCRIPTS["Russian"]] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["bytewise", "wordwise", "sentencepieces", "tiktokens"])
def test_text_of_any_script_is_streamed_in_whole_characters(
    kind: str, script: str, request: pytest.FixtureRequest
) -> None:
    if kind == "wordwise" and script == "English":
        pytest.skip("it has too few words")
    tokenizer, text = request.getfixturevalue(kind), SCRIPTS[script]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces).strip() == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""  # nothing had to wait for the end
    assert len([piece for piece in pieces if piece]) > 3


def test_a_token_is_shown_with_its_space_and_a_character_at_its_last_one(tiktokens: Any, wordwise: Any) -> None:
    ids = [wordwise.convert_tokens_to_ids(word) for word in ("▁the", "▁sea", "s", "<eos>")]
    assert pieces_of(wordwise, ids) == ["the", " sea", "s", "<eos>"]
    pieces = pieces_of(tiktokens, tiktokens("a 海!", add_special_tokens=False).input_ids)
    assert [piece for piece in pieces if piece] == ["a", " ", "海", "!"]
    assert pieces_of(tiktokens, tiktokens("海", add_special_tokens=False).input_ids[:2]) == ["", "\ufffd"]
    assert pieces_of(tiktokens, []) == []


def test_the_bytes_of_tokens_make_up_their_text_also_where_one_is_part_of_a_character(
    bytewise: Any, wordwise: Any
) -> None:
    text = "the sea, 海 🌊 é"
    for tokenizer in (bytewise, wordwise):
        ids = tokenizer.encode(text, add_special_tokens=False)
        found = [bytes_of(tokenizer, token) for token in ids]
        assert any("\ufffd" in tokenizer.decode([token]) for token in ids)
        assert b"".join(part or b"" for part in found).decode().replace(" ", "") == text.replace(" ", "")


def test_bytes_that_nothing_tells_are_none() -> None:
    class Odd:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "\ufffd"

        def convert_ids_to_tokens(self, token: int) -> str:
            return "海?"

    assert bytes_of(Odd(), 0) is None
