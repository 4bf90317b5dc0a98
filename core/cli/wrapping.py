"""Text for a terminal: answers wrap at words, and tables keep what they say whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | Text

# Scripts without spaces, whose lines break between letters; never before what closes, nor behind what opens.
_IDEOGRAPH = "[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffdc\U00020000-\U0003fffd]"
_CLOSES = "[^\\w\\s「『（【《〈［｛\ufe00-\ufe0f]|[ぁぃぅぇぉっゃゅょァィゥェォッャュョー々〜]"
_OPENS = "[「『（【《〈［｛]"
# Behind letters that are read from the right a terminal would take the line and numbers of the next column for theirs.
_FROM_RIGHT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]")
_LEFT_AGAIN = "\u200e"
_BREAK = re.compile(rf"(?<=\S)(?=\s)|(?:(?<={_IDEOGRAPH})(?=\S)|(?<=\S)(?={_IDEOGRAPH}))(?<!{_OPENS})(?!{_CLOSES})")


def padded(text: str, width: int, *, right: bool = False) -> str:
    """A text with blanks behind it, or `right` of them, up to so many cells: a wide letter takes two."""
    blanks = " " * max(width - cell_len(text), 0)
    return blanks + text if right else text + blanks


class WordWrap:
    """Breaks a stream of text at words: what it is fed comes back as soon as it is known on which line it stands.

    Args:
        width: cells of a line; None breaks nothing.
    """

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._column = 0
        self._held = ""  # blanks and the beginning of a word
        self._inside = False  # a word whose beginning was shown already

    def feed(self, piece: str) -> str:
        """Take the next piece and return what can be shown."""
        if self._width is None:
            return piece
        parts = _BREAK.split(self._held + piece)
        self._held = parts.pop()
        if cell_len(self._held) > self._width:  # no line holds it: a long link, or a script that has no spaces
            shown = "".join(map(self._placed, [*parts, self._held]))
            self._held, self._inside = "", True
            return shown
        return "".join(map(self._placed, parts))

    def end(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return self._placed(held) if self._width is not None else held

    def _placed(self, part: str) -> str:
        """Blanks and one word, on this line or the next."""
        assert self._width is not None
        blanks = part[: len(part) - len(part.lstrip())]
        word = part[len(blanks) :]
        if "\n" in blanks:
            self._column = cell_len(blanks[blanks.rindex("\n") + 1 :])
        elif self._column and not (self._inside and not blanks) and self._column + cell_len(part) > self._width:
            blanks, self._column = "\n", 0
        else:
            self._column += cell_len(blanks)
        self._inside = False
        self._column += cell_len(word)
        if self._column > self._width:  # a word that is longer than a line: the terminal breaks it
            self._column %= self._width
        return blanks + word


def show_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """A table where its lines fit; else each row as a block, a line for each column, with nothing cut or broken apart.

    Whoever pipes a table gets whole lines, however long.
    """
    whole = [[_cell(cell, console.is_terminal) for cell in row] for row in rows]
    table = Table(show_header=any(columns))
    for column in columns:
        table.add_column(Text(column), no_wrap=True)
    for row in whole:
        table.add_row(*row)
    needed = console.measure(table, options=console.options.update(width=100_000)).maximum
    if needed <= console.width or not console.is_terminal:
        width = console.width
        console.width = max(needed, width)  # rich takes no other word for how wide a line may be
        console.print(table)
        console.width = width
        return
    label = max((cell_len(column) for column in columns[1:]), default=0)
    for number, row in enumerate(whole):
        if number and len(columns) > 2:
            console.print()
        title, *cells = row
        title.stylize("bold")
        _block(console, title, list(zip(columns[1:], cells, strict=True)), label)


def _cell(given: Cell, shown: bool) -> Text:
    """A cell that leaves the direction of its line as it was, where it is shown and not piped."""
    text = given if isinstance(given, Text) else Text(given)
    return text.append(_LEFT_AGAIN) if shown and _FROM_RIGHT.search(text.plain) else text


def _block(console: Console, title: Text, cells: Sequence[tuple[str, Text]], label: int) -> None:
    console.print(title, soft_wrap=True)
    for name, cell in cells:
        if not cell.plain:
            continue
        for line in cell.split("\n"):
            _line(console, f"  {padded(name, label)}  " if label else "  ", line)
            name = ""


def _line(console: Console, head: str, text: Text) -> None:
    """A line that wraps between words, and lets a word that is too long for it (a path, a digest) run over whole."""
    room = max(console.width - cell_len(head), 20)
    lines = [""]
    for part in _BREAK.split(text.plain):
        if lines[-1] and cell_len(lines[-1] + part) > room:
            lines.append(part.lstrip())
        else:
            lines[-1] += part
    for piece in lines:
        console.print(Text(head, style="dim") + Text(piece, style=text.style), soft_wrap=True)
        head = " " * cell_len(head)
