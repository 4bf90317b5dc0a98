"""Text in a terminal: words stay whole, and tables keep names, paths and digests."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lora_rt.core.cli.wrapping import WordWrap, show_table

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
