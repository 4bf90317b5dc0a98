"""Text in a terminal: words stay whole, and tables keep names, paths and digests."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lora_rt.core.cli.wrapping import WordWrap, padded, show_table

DIGEST = "d" * 64
PATH = "/home/somebody/" + "folder/" * 12


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_keeps_digests_and_paths_whole(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, no_color=True, highlight=False)
    show_table(console, ("name", "sha256", "folder"), [("emotion", DIGEST, PATH)])
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert (DIGEST in written, PATH in written, "…" in written) == (True, True, False)


def test_an_answer_wraps_at_words_however_it_is_cut_into_pieces() -> None:
    text = "The rain on the tin roof was a letter that nobody had paid for.\n\nNext."
    for size in (1, 3, 100):
        wrap = WordWrap(20)
        shown = "".join(wrap.feed(text[i : i + size]) for i in range(0, len(text), size)) + wrap.end()
        assert max(map(len, shown.splitlines())) <= 20
        assert shown.split() == text.split()


@pytest.mark.parametrize(
    "text",
    [
        "雨が屋根を叩く。彼女は「もう行かなくちゃ」と言って、コートを取った。",
        "今天下雨了，屋顶上的铁皮一直在响。ok then, 一个人",
        "Дождь идёт, и крыша его повторяет снова и снова.",
        "المطر على سقف الصفيح ولا أحد يسمع شيئا هنا",
    ],
)
def test_scripts_without_spaces_break_between_letters_and_come_at_once(text: str) -> None:
    wrap = WordWrap(20)
    pieces = [wrap.feed(letter) for letter in text]
    lines = ("".join(pieces) + wrap.end()).split("\n")
    assert max(map(cell_len, lines)) <= 20
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert not any(line[0] in "。，、」" or line[-1] == "「" for line in lines)
    wide = cell_len(text) > 1.5 * len(text)
    assert not wide or max(len(piece) for piece in pieces) <= 6  # a break, and a word among them


def test_a_word_that_is_longer_than_a_line_is_not_broken_but_shown_as_it_comes() -> None:
    wrap = WordWrap(10)
    pieces = [wrap.feed(letter) for letter in "x" * 30]
    assert "".join(pieces) + wrap.end() == "x" * 30
    assert any(pieces)


def test_wide_letters_take_two_cells_where_columns_are_padded() -> None:
    assert [cell_len(padded(name, 8)) for name in ("海", "sea", "море", "e\u0301")] == [8] * 4
    assert padded("海", 4, right=True) == "  海"


def test_a_block_of_a_narrow_terminal_wraps_wide_letters_by_their_cells() -> None:
    console = Console(file=io.StringIO(), width=30, force_terminal=True, no_color=True, highlight=False)
    show_table(console, ("name", "本文"), [("海", "雨が屋根を叩く。彼女は何も言わない。" * 2)])
    written = Text.from_ansi(console.file.getvalue()).plain  # type: ignore[attr-defined]
    assert max(cell_len(line) for line in written.splitlines()) <= 30


def test_figures_beside_arabic_stay_in_their_columns_on_a_terminal_and_a_pipe_gets_the_letters_alone() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=40, force_terminal=terminal, no_color=True, highlight=False)
        show_table(console, ("data", "base"), [("المطر", "4.91"), ("海", "4.91")])
        written = Text.from_ansi(console.file.getvalue()).plain  # type: ignore[attr-defined]
        assert len({cell_len(line) for line in written.splitlines()}) == 1
        assert ("المطر\u200e" in written) is terminal
