"""The lock pins a project; sync installs exactly that, and nothing else under its names."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tomllib

import pytest

from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.errors import ChangedAdapterError, HubError, ProjectError, UnknownAdapterError
from lora_rt.registry.files import combined
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.lock import Locked, read_lock, render, write_lock
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.sync import check_lock, make_lock, sync
from lora_rt.registry.verify import verify
from support.adapters import adapter_files, write_adapter
from support.cli import Cli
from support.hub import LocalHub

pytestmark = pytest.mark.slow

REPO = "someone/emotion"


@pytest.fixture
def project(registry: Registry, hub: LocalHub) -> Registry:
    """A project with a repository at a tag and a folder."""
    hub.commit(REPO, adapter_files(), tag="v1")
    write_adapter(registry.folder / "mine", adapter_files(seed=2))
    (registry.folder / "lora-rt.toml").write_text(f'[adapters]\nmood = "{REPO}@v1"\nmine = "./mine"\n')
    return registry


def _forget(registry: Registry) -> None:
    """Another machine: an empty home and an empty cache, the same project."""
    shutil.rmtree(registry.store.root, ignore_errors=True)
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def test_the_lock_pins_full_commits_and_every_file(project: Registry, hub: LocalHub) -> None:
    make_lock(project)
    document = tomllib.loads((project.folder / "lora-rt.lock").read_text())
    mine, mood = document["adapter"]
    assert (mood["name"], mood["source"]) == ("mood", f"{REPO}@v1")
    assert mood["revision"] == hub.repos[REPO].refs["v1"]
    assert sorted(mood["files"]) == sorted(mine["files"]) == sorted(adapter_files())


def test_the_lock_has_a_stable_order_and_is_not_rewritten_for_nothing(project: Registry) -> None:
    entries, changed = make_lock(project)
    assert changed
    assert render(list(reversed(entries))) == render(entries)
    assert make_lock(project) == (entries, False)


def test_sync_installs_exactly_the_lock_although_the_tag_moved(project: Registry, hub: LocalHub) -> None:
    entries, _ = make_lock(project)
    _forget(project)
    hub.commit(REPO, adapter_files(seed=5), tag="v1")
    found, changed = sync(project, frozen=True)
    assert not changed
    assert {item.name: item.sha256 for item in found} == {entry.name: entry.sha256 for entry in entries}


def test_a_locked_name_resolves_to_what_is_locked_whatever_the_store_has(project: Registry, hub: LocalHub) -> None:
    make_lock(project)
    locked = project.resolve("mood").sha256
    hub.commit(REPO, adapter_files(seed=5))
    pull(project.store, Reference.parse(REPO), name="mood")
    assert project.resolve("mood").sha256 == locked
    assert "locked to" in project.resolve("mood").why


def test_frozen_and_offline_make_no_request(project: Registry, hub: LocalHub) -> None:
    make_lock(project)
    hub.requests.clear()
    sync(project, frozen=True, offline=True)
    project.resolve("mood", offline=True)
    assert hub.requests == []


def test_frozen_and_offline_install_from_the_clients_cache(project: Registry, hub: LocalHub) -> None:
    entries, _ = make_lock(project)
    shutil.rmtree(project.store.root)
    hub.requests.clear()
    found, _ = sync(project, frozen=True, offline=True)
    assert {item.sha256 for item in found} == {entry.sha256 for entry in entries}
    assert hub.requests == []


def test_what_is_installed_is_used_from_a_home_that_can_not_be_written(
    project: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lock(project)
    opened = os.open

    def read_only(path: str, flags: int, *more: int, **facts: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *more, **facts)

    monkeypatch.setattr(os, "open", read_only)
    assert project.resolve("mood", offline=True).source == f"hub {REPO}"
    assert sorted(item.name for item in sync(project, frozen=True, offline=True)[0]) == ["mine", "mood"]


def test_offline_with_nothing_cached_says_what_to_do(project: Registry) -> None:
    make_lock(project)
    _forget(project)
    with pytest.raises(HubError, match="lora-rt pull"):
        sync(project, frozen=True, offline=True)


def test_frozen_refuses_a_lock_that_does_not_fit(project: Registry) -> None:
    make_lock(project)
    with open(project.folder / "lora-rt.toml", "a") as file:
        file.write('more = "someone/more"\n')
    before = (project.folder / "lora-rt.lock").read_text()
    with pytest.raises(ProjectError, match="--frozen") as error:
        sync(project, frozen=True)
    assert error.value.problems == ("more = 'someone/more' is not locked",)
    assert (project.folder / "lora-rt.lock").read_text() == before


def test_without_frozen_the_lock_follows_the_project(project: Registry, hub: LocalHub) -> None:
    make_lock(project)
    hub.commit("someone/more", adapter_files(seed=4))
    with open(project.folder / "lora-rt.toml", "a") as file:
        file.write('more = "someone/more"\n')
    found, changed = sync(project)
    assert changed
    assert [item.name for item in found] == ["mine", "mood", "more"]


def test_a_changed_folder_is_found_at_check_and_at_load(project: Registry) -> None:
    make_lock(project)
    assert check_lock(project) == []
    write_adapter(project.folder / "mine", adapter_files(seed=3))
    assert check_lock(project) == ["mine: adapter_model.safetensors has other bytes"]
    with pytest.raises(ChangedAdapterError, match=r"lora-rt\.lock"):
        project.resolve("mine")


@pytest.mark.parametrize("command", [["lock", "--check"], ["sync"], ["verify"], ["doctor"]])
def test_a_lock_that_means_the_home_of_nobody_is_explained(
    project: Registry, cli: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    make_lock(project)
    monkeypatch.chdir(project.folder)
    for file in (project.folder / "lora-rt.toml", project.folder / "lora-rt.lock"):
        file.write_text(file.read_text().replace("./mine", "~nobodyx/mine"))
    done = cli(*command)
    assert done.code in (1, 2)
    assert "~nobodyx" in done.out + done.err
    assert "Traceback" not in done.err


def test_without_a_project_what_was_pulled_is_locked(registry: Registry, hub: LocalHub) -> None:
    hub.commit(REPO, adapter_files())
    pull(registry.store, Reference.parse(REPO))
    make_lock(registry)
    _forget(registry)
    hub.commit(REPO, adapter_files(seed=5))
    found, _ = sync(registry)
    assert [item.name for item in found] == ["emotion"]
    assert registry.resolve("emotion").sha256 == found[0].sha256


def test_sync_never_takes_the_name_of_an_adapter_of_the_user(project: Registry) -> None:
    with project.store.staging() as staged:
        own = project.store.publish(
            write_adapter(staged, adapter_files(seed=9)), "mood", source="trained here", revision=None
        )
    make_lock(project)
    sync(project)
    assert project.store.records.named("mood")[0].sha256 == own.sha256
    assert project.resolve("mood").source == f"hub {REPO}"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("version = 1", "version = 9", "version"),
        ('name = "mood"', 'name = "../x"', "not a name"),
        ('revision = "', 'revision = "main', "not a full commit"),
        ('source = "someone/emotion@v1"', 'source = "a/b/c"', "org/repo"),
        ('"register.json"', '"../../register.json"', "never read"),
        ('sha256 = "', 'sha256 = "0', "does not follow"),
        ("[adapter.files]", "[adapter.other]", "files"),
    ],
)
def test_a_damaged_lock_is_named(project: Registry, old: str, new: str, says: str) -> None:
    make_lock(project)
    path = project.folder / "lora-rt.lock"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ProjectError) as error:
        read_lock(project.folder)
    assert says in str(error.value)


def test_a_lock_that_gives_a_name_two_meanings_is_refused(registry: Registry) -> None:
    """As git merges what two branches have locked."""
    none, other = combined({}), combined({"README.md": "0" * 64})
    twice = [
        Locked("mood", "b", "a/mood@v1", "1" * 40, none, {}),
        Locked("mood", "b", "a/mood@v2", "2" * 40, other, {"README.md": "0" * 64}),
    ]
    write_lock(registry.folder, [*twice, Locked("mood", "c", "a/mood@v1", "1" * 40, none, {}), twice[0]])
    for command in (registry.resolve, lambda _: check_lock(registry), lambda _: make_lock(registry)):
        with pytest.raises(ProjectError, match="two meanings") as error:
            command("mood")
        assert error.value.problems == ("mood for b: a/mood@v1 (111111111111) and a/mood@v2 (222222222222)",)
    terms = [NamedComposition(name="blend", base="b", terms=(NamedTerm(reference=name),)) for name in ("a", "c")]
    write_lock(registry.folder, [], terms)
    with pytest.raises(ProjectError, match=r"blend: a:1 .* and c:1 "):
        registry.compositions.names()


def test_a_project_that_gives_a_name_two_adapters_for_one_base_is_refused(registry: Registry, hub: LocalHub) -> None:
    hub.commit(REPO, adapter_files(), tag="v1")
    hub.commit(REPO, adapter_files(seed=1), tag="v2")
    (registry.folder / "lora-rt.toml").write_text(f'[adapters]\nmood = ["{REPO}@v1", "{REPO}@v2"]\n')
    for command in (registry.resolve, lambda _: make_lock(registry)):
        with pytest.raises(ProjectError, match=rf"(?s)lora-rt\.toml .*{REPO}@v1 .* and {REPO}@v2 "):
            command("mood")
    assert read_lock(registry.folder) is None


@pytest.mark.parametrize("file", ["lora-rt.toml", "lora-rt.lock"])
def test_a_conflict_that_git_left_is_to_be_resolved_not_thrown_away(registry: Registry, file: str) -> None:
    (registry.folder / file).write_text("version = 1\n<<<<<<< HEAD\na = 1\n=======\na = 2\n>>>>>>> theirs\n")
    with pytest.raises(ProjectError, match=rf"{file} holds a conflict .*<<<<<<< in line 2") as error:
        registry.resolve("mood")
    assert error.value.next_step.startswith("Resolve the conflict in ")


def test_all_wrong_lines_of_a_project_are_named_at_once(registry: Registry) -> None:
    (registry.folder / "lora-rt.toml").write_text('[adapters]\na = "x/y/z"\nb = 7\n"../c" = "a/b"\nd = "name"\n')
    with pytest.raises(ProjectError) as error:
        registry.resolve("a")
    assert len(error.value.problems) == 4


DAMAGE = {
    "not TOML": "version = ",
    "nested": "version = " + "[" * 20_000,
    "a number without end": "version = " + "9" * 5000,
}


@pytest.mark.parametrize("file", ["lora-rt.toml", "lora-rt.lock"])
@pytest.mark.parametrize("kind", [*DAMAGE, "a folder", "a link"])
def test_a_file_of_the_project_that_can_not_be_read_is_named_by_every_command(
    registry: Registry, cli: Cli, monkeypatch: pytest.MonkeyPatch, file: str, kind: str
) -> None:
    monkeypatch.chdir(registry.folder)
    if file != "lora-rt.lock":
        write_lock(registry.folder, [])
    if kind == "a folder":
        (registry.folder / file).mkdir()
    elif kind == "a link":
        (registry.folder / file).symlink_to("/dev/null")
    else:
        (registry.folder / file).write_text(DAMAGE[kind])
    for command in (["show", "emotion"], ["list"], ["verify", "--offline"], ["lock", "--check"], ["sync", "--frozen"]):
        done = cli(*command)
        assert done.code == 1
        assert len(done.err.splitlines()) == 1
        assert file in done.err
    assert any(check["name"] == "project" for check in json.loads(cli("doctor", "--json").out))
    assert cli("show", "./nothing").code == 1  # a path needs no project


def test_a_full_disk_keeps_the_old_lock_and_the_old_composition(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = combined({})
    write_lock(registry.folder, [Locked("a", "", "./here", "", none, {})])
    old = NamedComposition(name="blend", base="b", terms=(NamedTerm(reference="a"),))
    registry.compositions.save(old)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*lora-rt\.lock"):
        write_lock(registry.folder, [])
    with pytest.raises(OSError, match=r"No space left on device.*blend\.json"):
        registry.compositions.save(old.model_copy(update={"base": "c"}))
    assert [entry.name for entry in read_lock(registry.folder) or []] == ["a"]
    assert registry.compositions.get("blend") == old
    assert [path.name for path in registry.folder.iterdir()] == ["lora-rt.lock"]


def test_verify_compares_what_lies_in_the_project_with_the_lock(project: Registry) -> None:
    make_lock(project)
    assert [item.problems for item in verify(project, ["mine"])] == [()]
    write_adapter(project.folder / "mine", adapter_files(seed=3))
    (found,) = verify(project, ["mine"])
    assert found.problems == ("not what lora-rt.lock says: adapter_model.safetensors has other bytes",)
    assert found.todo == "lora-rt lock, if that was meant"


def test_verify_names_what_a_project_has_in_a_folder_that_is_not_there(project: Registry) -> None:
    shutil.rmtree(project.folder / "mine")
    for names in ([], ["mine"]):
        (found,) = [item for item in verify(project, names) if item.name == "mine"]
        assert found.problems == ("there is no such folder",)
        assert found.todo == "put it there, or take its line out of lora-rt.toml"


@pytest.mark.parametrize("content", ["", "version = 99", "[[["])
def test_whoever_is_told_to_make_the_lock_anew_can(project: Registry, cli: Cli, content: str) -> None:
    file = project.folder / "lora-rt.lock"
    file.write_text(content)
    with pytest.raises(ProjectError) as error:
        make_lock(project)
    assert error.value.next_step == "Delete lora-rt.lock, then run: lora-rt lock"
    file.unlink()
    make_lock(project)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[adapter]\nmine = "./a"', "adapter: there is nothing of this name; the nearest is 'adapters'"),
        ('composition = ["x"]', "composition: there is nothing of this name; the nearest is 'compositions'"),
        ("zzz = 1", "zzz: there is nothing of this name"),
        ('[adapters]\ncompositions = ["x"]', 'compositions: write compositions = ["my-mix"] above [adapters]'),
    ],
)
def test_a_word_of_a_project_that_means_nothing_is_named(registry: Registry, content: str, said: str) -> None:
    (registry.folder / "lora-rt.toml").write_text(content)
    with pytest.raises(ProjectError) as error:
        make_lock(registry)
    assert error.value.problems == (said,)


def test_the_mark_that_an_editor_puts_before_a_project_is_none_of_its(registry: Registry) -> None:
    write_adapter(registry.folder / "mine", adapter_files(seed=2))
    (registry.folder / "lora-rt.toml").write_text('[adapters]\nmine = "./mine"\n', encoding="utf-8-sig")
    assert registry.resolve("mine").source == "./mine"


@pytest.mark.parametrize("text", ["mine", "some/mine"])
def test_whoever_means_a_folder_is_told_how_it_is_written(
    registry: Registry, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_adapter(registry.folder / text, adapter_files(seed=2))
    with pytest.raises((HubError, UnknownAdapterError)) as error:
        registry.resolve(text, offline=True)
    assert error.value.next_step == f"There is an adapter in a folder of that name: write ./{text}"
    assert registry.resolve(f"./{text}").name == "mine"
