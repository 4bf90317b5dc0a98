"""A project's names hold in its folder, the store's change by the user's word only, a damaged one means nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.errors import StoreError
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.shipped import shipped
from lora_rt.registry.sync import make_lock, sync
from lora_rt.registry.verify import verify
from support.adapters import adapter_files, write_adapter
from support.cli import Cli
from support.hub import LocalHub

pytestmark = pytest.mark.slow

EVIL = "evil/feelings"


@pytest.fixture
def cloned(registry: Registry, hub: LocalHub) -> Registry:
    """A stranger's project that calls its adapter by a name of ours."""
    hub.commit(EVIL, adapter_files(card=False))
    (registry.folder / "lora-rt.toml").write_text(f'[adapters]\nemotion = "{EVIL}"\n')
    return registry


@pytest.fixture
def elsewhere(registry: Registry, tmp_path: Path) -> Registry:
    """Another folder of the same user."""
    (tmp_path / "elsewhere").mkdir()
    return Registry(registry.store.root.parent, tmp_path / "elsewhere")


def _own(registry: Registry, name: str = "emotion", seed: int = 9) -> str:
    with registry.store.staging() as staged:
        write_adapter(staged, adapter_files(card=False, seed=seed))
        return registry.store.publish(staged, name, source="trained here", revision=None).sha256


def _record(registry: Registry, name: str = "emotion") -> Path:
    return next((registry.store.root / "names" / name).glob("*.json"))


def test_a_name_of_a_project_means_that_in_its_folder_alone(cloned: Registry, elsewhere: Registry) -> None:
    assert cloned.resolve("emotion").source == f"hub {EVIL}"
    assert elsewhere.resolve("emotion").source.startswith("shipped with lora-rt")
    assert all(item.source.startswith("shipped") for item in elsewhere.installed() if item.name == "emotion")


@pytest.mark.parametrize("frozen", [True, False])
def test_sync_gives_no_name_outside_its_folder(cloned: Registry, elsewhere: Registry, frozen: bool) -> None:
    make_lock(cloned)
    (item,) = sync(cloned, frozen=frozen)[0]
    assert (item.name, item.source) == ("emotion", f"hub {EVIL}")
    (cloned.folder / "lora-rt.toml").unlink()  # the lock alone
    sync(cloned, frozen=frozen)
    assert cloned.resolve("emotion").sha256 == item.sha256
    assert elsewhere.resolve("emotion").source.startswith("shipped with lora-rt")


def test_a_locked_composition_is_one_in_its_folder_alone(cloned: Registry, elsewhere: Registry) -> None:
    found = cloned.resolve(EVIL)
    term = NamedTerm(reference=EVIL, sha256=found.sha256)
    cloned.compositions.save(NamedComposition(name="logic", base="org/smol", terms=(term,)))
    text = (cloned.folder / "lora-rt.toml").read_text()
    (cloned.folder / "lora-rt.toml").write_text('compositions = ["logic"]\n' + text)
    make_lock(cloned)
    cloned.compositions.remove("logic")
    sync(cloned, frozen=True)
    assert cloned.compositions.get("logic") is not None
    assert elsewhere.compositions.get("logic") is None
    assert "logic" not in elsewhere.compositions.names()


def test_a_repository_that_is_used_by_its_id_changes_no_name(hub: LocalHub, elsewhere: Registry) -> None:
    hub.commit("evil/emotion", adapter_files(card=False))
    assert elsewhere.resolve("evil/emotion").name == "emotion"
    assert elsewhere.resolve("emotion").source.startswith("shipped with lora-rt")


def test_what_a_lock_says_of_a_tag_holds_in_its_folder_alone(
    cloned: Registry, elsewhere: Registry, hub: LocalHub
) -> None:
    old = hub.commit("a/voice", adapter_files(card=False), tag="v1")
    (cloned.folder / "lora-rt.toml").write_text('[adapters]\nvoice = "a/voice@v1"\nmain = "a/voice"\n')
    make_lock(cloned)
    cloned.store.remove("a/voice")
    new = hub.commit("a/voice", adapter_files(card=False, seed=1), tag="v1")
    sync(cloned, frozen=True)
    assert [cloned.resolve(name).revision for name in ("voice", "main")] == [old, old]
    assert [elsewhere.resolve(text).revision for text in ("a/voice@v1", "a/voice")] == [new, new]


def test_a_pull_is_the_users_word_and_takes_the_name_in_every_folder(cloned: Registry, elsewhere: Registry) -> None:
    cloned.resolve("emotion")
    pull(cloned.store, Reference.parse(EVIL), name="emotion")
    assert elsewhere.resolve("emotion").source == f"hub {EVIL}"
    assert [record.name for record in cloned.store.records.all()] == ["emotion"]


def test_a_pull_that_hides_a_shipped_name_says_so_once(
    hub: LocalHub, cli: Cli, monkeypatch: pytest.MonkeyPatch, elsewhere: Registry
) -> None:
    monkeypatch.chdir(elsewhere.folder)
    hub.commit("someone/emotion", adapter_files(card=False))
    assert "the one shipped with lora-rt" in cli("pull", "someone/emotion").err
    assert cli("show", "emotion").err == ""


def test_hiding_a_name_is_said_on_one_line_each_time(
    cloned: Registry, elsewhere: Registry, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cloned.folder)
    for hidden in ("the one shipped with lora-rt", "your own (trained here)"):
        for _ in range(2):
            done = cli("show", "emotion", "--json")
            assert done.code == 0
            assert len(done.err.splitlines()) == 1
            assert EVIL in done.err
            assert hidden in done.err
        _own(cloned)
    monkeypatch.chdir(elsewhere.folder)
    assert cli("show", "emotion").err == ""


def test_what_a_project_alone_has_hides_nothing_and_nothing_is_said(
    cloned: Registry, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cloned.folder / "lora-rt.toml").write_text(f'[adapters]\nmood = "{EVIL}"\n')
    monkeypatch.chdir(cloned.folder)
    assert cli("show", "mood").err == ""


def test_a_fetched_repository_is_listed_and_removed_by_its_id(
    cloned: Registry, cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cloned.resolve("emotion")
    monkeypatch.chdir(tmp_path)
    assert EVIL in [row["name"] for row in json.loads(cli("list", "--json").out)]
    assert cli("rm", EVIL, "-y").code == 0
    assert cloned.store.records.all() == []
    assert cloned.store.orphans() == []


def test_another_package_does_not_change_what_our_own_names_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "aaa-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: aaa\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[lora_rt.adapters]\nemotion = aaa.emotion\n")
    write_adapter(tmp_path / "aaa" / "emotion")
    monkeypatch.syspath_prepend(str(tmp_path))
    packages = [item.package for item in shipped() if item.name == "emotion"]
    assert packages[0].startswith("lora-rt ")
    assert packages[1] == "aaa 1"


DAMAGE = {
    "empty": "",
    "cut off": '{"name": "emo',
    "a list": "[]",
    "nested": "[" * 5000 + "]" * 5000,
    "other types": '{"name": 7, "base": [], "source": null, "revision": 1, "requested": 2, "sha256": 3, "files": 4}',
}


@pytest.mark.parametrize("kind", [*DAMAGE, "another name", "a folder", "a link", "a path as digest"])
def test_a_damaged_record_of_ones_own_is_an_error_not_the_shipped_adapter(
    elsewhere: Registry, cli: Cli, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(elsewhere.folder)
    _own(elsewhere)
    path = _record(elsewhere)
    text = path.read_text()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link":
        path.symlink_to("/dev/null")
    elif kind == "another name":
        path.write_text(text.replace('"emotion"', '"logic"'))
    elif kind == "a path as digest":
        path.write_text(json.dumps({**json.loads(text), "sha256": "../../x"}))
    else:
        path.write_text(DAMAGE[kind])
    with pytest.raises(StoreError, match="the record of 'emotion' in the store is damaged") as error:
        elsewhere.resolve("emotion", BaseIdentity("org/smol", None, ""))
    assert str(path) in error.value.message
    assert "lora-rt rm emotion" in error.value.next_step
    for command in (["show", "emotion"], ["verify", "emotion", "--offline"], ["verify", "--offline"]):
        assert cli(*command).code == 1
    rows = [row for row in json.loads(cli("list", "--json").out) if row["name"] == "emotion"]
    assert rows[-1]["source"] == "damaged; see: lora-rt verify emotion"
    assert elsewhere.resolve("logic").source.startswith("shipped")  # the others are as they were
    assert cli("rm", "emotion", "-y").code == 0
    assert elsewhere.resolve("emotion").source.startswith("shipped")


def test_verify_says_where_a_damaged_record_lies_and_what_to_do(elsewhere: Registry) -> None:
    _own(elsewhere)
    _record(elsewhere).write_text("{}")
    verdict = next(item for item in verify(elsewhere, ["emotion"], offline=True) if item.source == "store")
    assert str(_record(elsewhere)) in verdict.problems[0]
    assert verdict.todo.startswith("lora-rt rm emotion")


def test_names_that_can_not_be_read_are_not_taken_for_none(elsewhere: Registry) -> None:
    _own(elsewhere)
    folder = elsewhere.store.root / "names"
    folder.rename(folder.with_name("away"))
    folder.touch()
    with pytest.raises(StoreError, match="can not be read"):
        elsewhere.resolve("emotion")
