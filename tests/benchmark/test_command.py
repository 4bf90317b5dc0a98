"""The command: one document or one table, refusals before anything is loaded, and what an interruption leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_rt.core.benchmark import session
from support.cli import Cli

pytestmark = pytest.mark.slow

TINY = ("bench", "--random-base", "tiny", "--precision", "float32", "--device", "cpu", "--repeats", "2")


def test_json_has_the_contracts_keys_and_a_row_for_every_system(cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "ratios.png"
    done = cli(*TINY, "--quick", "--json", "--plot", str(picture))
    assert done.code == 0
    document = json.loads(done.out)
    assert {"machine", "versions", "rows"} <= set(document)
    assert {"torch", "transformers", "peft", "lora-rt"} <= set(document["versions"])
    for row in document["rows"]:
        assert {"workload", "system", "tokens_per_s", "ratio_to_base", "spread"} <= set(row)
        assert (row["reason"] is None) == (row["seconds"] is not None)
    speeds = {(row["workload"], row["system"]): row for row in document["rows"]}
    assert speeds["quick-row1", "base"]["ratio_to_base"] == 1.0
    assert speeds["quick-row1", "ours"]["tokens_per_s"] > 0
    assert speeds["quick-rows4", "peft-set"]["reason"] == "cannot mix weights in a batch"
    assert speeds["quick-change", "ours"]["tokens_per_s"] is None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_fits_a_hundred_columns_and_gives_reasons(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    done = cli(*TINY, "--workloads", "quick-rows4,quick-change", "--systems", "base,ours,peft-set")
    assert done.code == 0
    assert max(len(line) for line in done.out.splitlines()) <= 100
    assert "cannot mix weights in a batch" in done.out
    assert "random-tiny (float32)" in done.out
    assert "torch" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--workloads", "row1-k3"], 2, ["row1-k3", "row1-k2", "prefill"]),
        (["--systems", "pefft-set"], 2, ["pefft-set", "peft-set"]),
        (["--random-base", "70b"], 2, ["70b", "13b"]),
        (["--precision", "int3"], 2, ["int3", "int4"]),
        (["--plot", "no-such-folder/x.png"], 1, ["no-such-folder/x.png"]),
        (["--plot", "x.docx"], 2, ["x.docx", ".png"]),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_is_loaded(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: list[str]
) -> None:
    monkeypatch.setattr("lora_rt.core.benchmark.lab.Lab.__init__", lambda *_: pytest.fail("it was loaded"))
    done = cli("bench", *arguments)
    assert done.code == code
    assert not [word for word in words if word not in done.err]


def test_two_bases_are_one_too_many(cli: Cli) -> None:
    assert cli("bench", "--base", "x/y", "--random-base", "tiny").code == 2


def test_an_interrupted_run_prints_what_there_is_and_says_so_by_its_exit_code(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = session.measure

    def interrupted(*arguments: Any) -> Iterator[session.Measured]:
        for number, item in enumerate(measure(*arguments)):
            if number == 1:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(session, "measure", interrupted)
    done = cli(*TINY, "--workloads", "quick-row1,quick-rows4", "--systems", "base,ours", "--json")
    assert done.code == 130
    assert {row["workload"] for row in json.loads(done.out)["rows"]} == {"quick-row1"}


def test_a_machine_that_is_not_idle_is_warned_of_before_and_its_load_stands_in_the_document(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = (*TINY, "--workloads", "quick-change", "--systems", "ours", "--json")
    monkeypatch.setattr(psutil, "getloadavg", lambda: (64.0, 1.0, 1.0))
    done = cli(*quick)
    assert "this machine is not idle (load 64.0 on" in done.err
    machine = json.loads(done.out)["machine"]
    assert machine["load"] == 64.0
    assert 0 <= machine["others"] <= 1
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.0, 1.0, 1.0))
    assert "not idle" not in cli(*quick).err
