"""The registry's commands: what they print, and how they end."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.cli.app import run
from lora_rt.core.step.settings import TrainSettings
from lora_rt.registry.registry import Registry
from support.adapters import adapter_files, write_adapter
from support.hub import LocalHub

REPO = "someone/mood"
FIELDS = ["name", "register", "mode", "base", "source", "revision", "sha256"]


class Line:
    """The command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        self._monkeypatch.setattr("sys.argv", ["lora-rt", *words])
        code: Any = 0
        try:
            run()
        except SystemExit as end:
            code = end.code
        self.out, self.err = self._capsys.readouterr()
        return int(code or 0)

    def json(self, *words: str) -> Any:
        """The one document of a command that must succeed."""
        assert self(*words, "--json") == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def line(
    registry: Registry, hub: LocalHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Line:
    """The command line in an empty project, with one adapter on the Hub."""
    monkeypatch.chdir(registry.folder)
    hub.commit(REPO, adapter_files(), tag="v1", tags=["lora-rt", "register:emotion"])
    return Line(capsys, monkeypatch)


def _row(line: Line, name: str) -> dict[str, Any]:
    return next(row for row in line.json("list") if row["name"] == name)


def test_a_name_may_be_typed_with_its_marks_apart(line: Line, registry: Registry, tmp_path: Path) -> None:
    """As the keyboards and file systems of some machines give it."""
    name, apart = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    assert line.json("pull", REPO, "--as", apart)["name"] == name
    assert [item["name"] for item in line.json("verify", apart)] == [name]
    assert line("rm", apart, "-y") == 0, line.err
    (registry.folder / "lora-rt.toml").write_text(f'[adapters]\n{apart!r} = "{REPO}"\n')
    assert line.json("show", apart)["name"] == name
    assert TrainSettings(register=apart, mode="output-only", data=tmp_path).register == name


def test_pull_list_show_verify_and_rm(line: Line, hub: LocalHub) -> None:
    assert line("pull", f"{REPO}@v1") == 0
    assert "pulled mood from someone/mood" in line.out
    row = _row(line, "mood")
    assert list(row) == FIELDS
    assert row["source"] == "hub someone/mood"
    assert row["revision"] == hub.repos[REPO].refs["v1"]
    shown = line.json("show", "mood")
    assert shown["why"] == "'mood' is installed in the store, from hub someone/mood"
    assert (shown["rank"], shown["modules"], shown["register"]) == ([4], 4, "emotion")
    assert line("verify", "mood") == 0
    assert line("rm", "mood", "-y") == 0
    assert all(row["name"] != "mood" for row in line.json("list"))


def test_rm_asks_and_where_nobody_can_answer_it_refuses(line: Line) -> None:
    line("pull", REPO)
    assert line("rm", "mood") == 1
    assert "lora-rt rm mood -y" in line.err
    assert _row(line, "mood")


def test_a_failure_is_one_line_and_the_next_step(line: Line) -> None:
    for words, says in [
        (["show", "moood"], "there is no adapter 'moood'"),
        (["pull", "no/where"], "the Hub has no no/where"),
        (["rm", "nothing", "-y"], "the store has no adapter 'nothing'"),
        (["verify", "nothing"], "there is no adapter 'nothing'"),
        (["verify", "./nothing"], "look at a folder with: lora-rt show ./nothing"),
        (["sync"], "there is no lora-rt.lock here. Run: lora-rt lock"),
        (["push", "nothing", "a/b"], "there is no adapter 'nothing'"),
    ]:
        assert line(*words) == 1
        assert line.out == ""
        assert line.err.startswith("error: ")
        assert says in line.err
        assert line.err.count("\n") == 1


@pytest.mark.slow
def test_verify_names_a_changed_byte_a_moved_tag_and_what_to_do(line: Line, registry: Registry, hub: LocalHub) -> None:
    line("pull", f"{REPO}@v1")
    hub.commit(REPO, adapter_files(seed=1), tag="v1")
    assert line("verify", "--json") == 1
    (verdict,) = [item for item in json.loads(line.out) if item["name"] == "mood"]
    assert "v1 of someone/mood moved" in verdict["problems"][0]
    assert line("verify", "--offline") == 0
    folder = registry.store.installed()[0].folder
    (folder / "adapter_config.json").write_bytes(b"{}")
    assert line("verify", "--offline", "--json") == 1
    (verdict,) = [item for item in json.loads(line.out) if item["name"] == "mood"]
    assert verdict["problems"] == ["adapter_config.json has other bytes"]
    assert verdict["todo"] == "lora-rt pull someone/mood@v1 --as mood"


def test_lock_and_sync(line: Line, registry: Registry, hub: LocalHub) -> None:
    (registry.folder / "lora-rt.toml").write_text(f'[adapters]\nmood = "{REPO}@v1"\n')
    assert line("lock", "--check") == 1
    assert "there is no lora-rt.lock" in line.err
    assert line.json("lock") == {"changed": True, "adapters": ["mood"], "compositions": []}
    assert line("lock", "--check") == 0
    hub.requests.clear()
    (row,) = line.json("sync", "--frozen", "--offline")["adapters"]
    assert row["revision"] == hub.repos[REPO].refs["v1"]
    assert hub.requests == []
    assert "locked to" in line.json("show", "mood")["why"]


def test_search_shows_what_the_hub_has(line: Line) -> None:
    assert [item["repo"] for item in line.json("search", "mood")] == [REPO]
    assert line("search", "absent") == 0
    assert "--all" in line.err


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
def test_push_says_where_it_went(line: Line, monkeypatch: pytest.MonkeyPatch, registry: Registry) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    write_adapter(registry.folder / "mine")
    assert line.json("push", "./mine", "tester/mine")["repo"] == "tester/mine"


@pytest.mark.slow
def test_doctor_names_left_overs_and_removes_them_when_asked(line: Line, registry: Registry) -> None:
    line("pull", REPO)
    write_adapter(registry.store.objects / ("0" * 64))
    checks = {check["name"]: check for check in line.json("doctor")}
    assert checks["left-overs"]["todo"] == "lora-rt doctor --clean"
    assert checks["adapter mood"]["status"] == "ok"
    assert str(registry.store.root.parent) in checks["home"]["detail"]
    assert {"torch", "cpu", "hub", "bases", "mode output-only"} <= set(checks)
    checks = {check["name"]: check for check in line.json("doctor", "--clean")}
    assert checks["left-overs"]["detail"] == "1 removed"
    assert not (registry.store.objects / ("0" * 64)).exists()


def test_doctor_ends_with_1_where_something_is_broken(line: Line, registry: Registry) -> None:
    line("pull", REPO)
    Path(registry.store.installed()[0].folder, "register.json").unlink()
    assert line("doctor") == 1
    assert "lora-rt verify mood" in line.out.replace("\n", " ") or "verify" in line.out


def test_what_a_stranger_wrote_cannot_paint_the_terminal(line: Line, hub: LocalHub) -> None:
    files = adapter_files()
    files["register.json"] = files["register.json"].replace(b'"emotion"', b'"[bold red]emotion[/]"')
    hub.commit("someone/paint", files)
    assert line("pull", "someone/paint") == 0
    assert line("show", "paint") == 0
    assert "[bold red]emotion[/]" in line.out


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
def test_commits_and_digests_are_shown_whole_where_they_are_compared(
    line: Line, registry: Registry, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    line("pull", REPO)
    item = registry.store.installed()[0]
    assert f"@{item.revision}, sha256 {item.sha256}\n" in line.out
    (registry.folder / "lora-rt.toml").write_text(f'[adapters]\nmood = "{REPO}"\n')
    line("lock")
    line("sync", "--frozen")
    assert f"sha256 {item.sha256}\n" in line.out
    assert line("push", item.name, "me/mood") == 0, line.err
    assert re.fullmatch(r"pushed mood to me/mood@[0-9a-f]{40}\n", line.out)
    line("rm", item.name, "-y")
    assert f"sha256 {item.sha256})\n" in line.out
