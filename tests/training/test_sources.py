"""Data as people have it: a list, a table, a folder of files or a data set gives the records that JSON lines give."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lora_rt.core.training import sources
from lora_rt.core.training.data import digest_of, read_pairs
from lora_rt.core.training.sources import DataError, records

FIELDS = ("scene", "text")
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ROWS = [CHAT, {"instruction": "c", "output": "d"}, {"scene": "e", "text": "f"}]
READ = [{"scene": "a", "text": "b"}, {"scene": "c", "text": "d"}, {"scene": "e", "text": "f"}]


def as_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(_schema(pyarrow))), path)
    return path


def _schema(pyarrow: object) -> list[tuple[str, object]]:
    arrow: object = pyarrow
    text = arrow.string()  # type: ignore[attr-defined]
    message = arrow.struct([("role", text), ("content", text)])  # type: ignore[attr-defined]
    names = ("instruction", "output", "scene", "text")
    return [("messages", arrow.list_(message)), *((name, text) for name in names)]  # type: ignore[attr-defined]


def as_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_table_a_list_and_lines_are_the_same_examples(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    made = [as_lines(tmp_path / "a.jsonl", ROWS), tmp_path / "a.json", as_parquet(tmp_path / "a.parquet", ROWS)]
    found = [read_pairs(path, FIELDS) for path in made]
    assert found == [READ] * 3
    assert len({digest_of(pairs) for pairs in found}) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("lines", [True, False], ids=["lines", "a list"])
def test_what_a_file_is_called_and_how_its_letters_are_written_change_nothing(
    tmp_path: Path, name: str, encoding: str, lines: bool
) -> None:
    text = (
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS) if lines else json.dumps(ROWS, indent=1)
    )
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_pairs(tmp_path / name, FIELDS) == READ


def test_half_a_file_in_utf_16_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json.dumps(ROWS[2]).encode("utf-16")[:-1])
    with pytest.raises(DataError, match="begins like a UTF-16 file"):
        read_pairs(tmp_path / "a.jsonl", FIELDS)


def test_a_folder_is_read_file_by_file_and_its_lines_are_named_with_their_file(tmp_path: Path) -> None:
    as_lines(tmp_path / "b.jsonl", ROWS[2:])
    as_lines(tmp_path / "a.jsonl", [ROWS[1], {"scene": "no text"}])
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / ".hidden.jsonl").write_text("{")
    with pytest.raises(DataError) as caught:
        read_pairs(tmp_path, FIELDS)
    assert caught.value.problems == ('a.jsonl line 2: "text" is missing',)
    as_lines(tmp_path / "a.jsonl", ROWS[:2])
    found = read_pairs(tmp_path, FIELDS)
    assert list(zip(found.places, found, strict=True)) == [
        ("a.jsonl line 1", READ[0]),
        ("a.jsonl line 2", READ[1]),
        ("b.jsonl line 1", READ[2]),
    ]


def test_what_is_null_in_a_row_is_missing_and_named_by_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_pairs(as_parquet(tmp_path / "a.parquet", [ROWS[2], {"scene": "e"}]), FIELDS)
    assert caught.value.problems == ('row 2: "text" is missing',)


def test_a_folder_without_data_names_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl") as caught:
        read_pairs(tmp_path, FIELDS)
    assert "train" in caught.value.next_step


def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text("PAR1 it is not")
    with pytest.raises(DataError, match="is not Parquet") as caught:
        read_pairs(tmp_path / "a.parquet", FIELDS)
    assert "\n" not in caught.value.message


def test_rows_of_a_data_set_are_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "org" / "name").mkdir(parents=True)
    as_lines(tmp_path / "org" / "name" / "train.jsonl", ROWS[1:])
    monkeypatch.chdir(tmp_path)  # there the library takes a folder of that name for the data set
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.enable_progress_bars()
    before = datasets.logging.get_verbosity()
    rows = list(sources._data_set("org/name:train"))
    assert rows == [("row 1", ROWS[1]), ("row 2", ROWS[2])]
    # an application that asks us to train has settings of its own
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == (before, False)
    with pytest.raises(DataError, match="no split 'other'; it has: train"):
        list(sources._data_set("org/name:other"))


@pytest.mark.parametrize(("package", "given"), [("pyarrow", "a.parquet"), ("datasets", "org/name:train")])
def test_a_package_that_is_not_installed_is_said_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_text("")
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == package else object())
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=package) as caught:
        list(records(Path(given)))
    assert "pip install 'lora-rt[data]'" in caught.value.next_step


@pytest.mark.parametrize("given", ["none.jsonl", "some/where/none.parquet", "/none", "./none", "none"])
def test_a_path_that_is_not_there_is_no_data_set(given: str) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_pairs(Path(given), FIELDS)


@pytest.mark.parametrize(
    ("name", "kind"), [("F.csv", "CSV"), ("F.TSV", "TSV"), ("F.xlsx", "a spreadsheet"), ("F.gz", "packed")]
)
def test_a_table_of_another_kind_is_refused_by_its_kind_and_not_line_by_line(
    tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / name).write_text("scene,text\na,b\n")
    with pytest.raises(DataError, match=f"is {kind}, which is not read") as refused:
        read_pairs(tmp_path / name, FIELDS)
    assert "JSON lines" in str(refused.value.next_step)


def test_a_list_with_an_error_is_told_once_and_a_word_that_stands_twice_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"scene": "a", "text": "b"},\n]\n')
    with pytest.raises(DataError, match="is not a JSON list at line 3"):
        read_pairs(tmp_path / "a.json", FIELDS)
    (tmp_path / "a.jsonl").write_text('{"scene": "a", "text": "b"}\n{"scene": "a", "scene": "c", "text": "b"}\n')
    with pytest.raises(DataError) as caught:
        read_pairs(tmp_path / "a.jsonl", FIELDS)
    assert caught.value.problems == ('line 2: "scene" stands there twice',)


@pytest.mark.parametrize("row", ROWS[:2])
def test_the_whole_as_one_text_beside_a_known_form_is_left_out(tmp_path: Path, row: dict[str, object]) -> None:
    as_lines(tmp_path / "a.jsonl", [row])
    plain = read_pairs(tmp_path / "a.jsonl", FIELDS)
    as_lines(tmp_path / "a.jsonl", [{**row, "text": "question and answer in one"}])
    assert read_pairs(tmp_path / "a.jsonl", FIELDS) == plain


def test_the_ending_of_a_file_may_be_written_in_capitals(tmp_path: Path) -> None:
    as_lines(tmp_path / "A.JSONL", ROWS)
    assert read_pairs(tmp_path, FIELDS) == READ


def test_what_a_folder_holds_besides_is_named_where_it_looks_like_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    as_lines(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "more.csv").write_text("a,b")
    (tmp_path / "old").mkdir()
    as_lines(tmp_path / "old" / "b.jsonl", ROWS[1:])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "c.png").write_bytes(b"")
    for _ in range(2):  # as often as a run reads it, it is said once
        assert len(list(records(tmp_path))) == 1
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"of {tmp_path} these are not read: more.csv (CSV), old/ (a folder)"
    (tmp_path / "more.csv").unlink()
    (tmp_path / "old" / "b.jsonl").unlink()
    caplog.clear()
    list(records(tmp_path))
    assert not caplog.records
