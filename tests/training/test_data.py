"""Data files: every bad line is named at once, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_rt.core.training.data import digest_of, read_pairs
from lora_rt.core.training.sources import DataError

GOOD = '{"scene": "тишинажарвход", "text": "Он стоял, не в силах дышать."}'


def test_every_bad_line_is_named_with_its_number(tmp_path: Path) -> None:
    lines = [GOOD, "{", "[1]", '{"scene": "a"}', '{"scene": "", "text": 3}', "", '{"scene": "a", "text": "b"}']
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_pairs(file, ("scene", "text"))
    numbers = [problem.split(":")[0] for problem in caught.value.problems]
    assert numbers == ["line 2", "line 3", "line 4", "line 5", "line 5"]


def test_bytes_that_are_no_utf8_are_a_bad_line_and_not_a_crash(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_pairs(file, ("scene", "text"))


def test_half_of_a_surrogate_pair_is_a_bad_line_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b'\n{"scene": "a", "text": "\\ud83c"}\n')
    with pytest.raises(DataError) as caught:
        read_pairs(file, ("scene", "text"))
    assert caught.value.problems == ('line 2: "text" holds half of a surrogate pair',)


def test_any_language_is_read(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(GOOD, encoding="utf-8")
    assert read_pairs(file, ("scene", "text"))[0]["scene"] == "тишинажарвход"


@pytest.mark.parametrize(("content", "message"), [("", "no examples"), ("\n \n", "no examples")])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_pairs(file, ("scene", "text"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read_pairs(tmp_path / "none.jsonl", ("scene", "text"))


def test_a_thousand_bad_lines_do_not_flood_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("{\n" * 1000)
    with pytest.raises(DataError, match="1000 problems") as caught:
        read_pairs(file, ("scene", "text"))
    assert len(caught.value.problems) == 21


def test_the_digest_is_of_the_examples_and_not_of_the_layout(tmp_path: Path) -> None:
    assert digest_of([{"scene": "a", "text": "b"}]) == digest_of([{"text": "b", "scene": "a"}])
    assert digest_of([{"scene": "a", "text": "b"}]) != digest_of([{"scene": "a", "text": "c"}])
