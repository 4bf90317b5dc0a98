"""Named compositions are verified, locked, put back, shown and removed like what they are used as."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from lora_rt.registry import durable
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.errors import ChangedAdapterError, ProjectError, UnknownAdapterError
from lora_rt.registry.files import sha256_bytes
from lora_rt.registry.health import registry_checks
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.lock import read_locked_compositions
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved
from lora_rt.registry.sync import check_lock, make_lock, sync
from lora_rt.registry.verify import Verdict, verify
from support.adapters import BASE, adapter_files, write_adapter
from support.cli import Cli
from support.hub import LocalHub

pytestmark = pytest.mark.slow

REPO = "someone/mood"


def publish(registry: Registry, name: str, seed: int = 0) -> Resolved:
    with registry.store.staging() as staged:
        write_adapter(staged, adapter_files(seed=seed))
        return registry.store.publish(staged, name, source="trained here", revision=None)


def named_composition(name: str, *adapters: Resolved, weight: float = 0.5) -> NamedComposition:
    terms = tuple(NamedTerm(reference=item.name, sha256=item.sha256, layers=(weight, 1.0)) for item in adapters)
    return NamedComposition(name=name, base=str(BASE["id"]), terms=terms, metrics={"nll_before": 2.0, "nll_after": 1.0})


def verdict(registry: Registry, name: str = "blend") -> Verdict:
    return next(item for item in verify(registry, [name], offline=True) if item.source.startswith("composition"))


@pytest.fixture
def blend(registry: Registry) -> NamedComposition:
    """A composition of two adapters in the store."""
    mix = named_composition("blend", publish(registry, "dawn", 1), publish(registry, "dusk", 2))
    registry.compositions.save(mix)
    return mix


@pytest.fixture
def project(registry: Registry, hub: LocalHub) -> Registry:
    """A project with an adapter of the Hub and a composition with it."""
    hub.commit(REPO, adapter_files(), tag="v1")
    toml = f'compositions = ["blend"]\n[adapters]\nmood = "{REPO}@v1"\n'
    (registry.folder / "lora-rt.toml").write_text(toml)
    registry.compositions.save(named_composition("blend", registry.resolve("mood")))
    return registry


def test_a_composition_is_verified_by_name_and_among_all(registry: Registry, blend: NamedComposition) -> None:
    assert verdict(registry).problems == ()
    assert verdict(registry).source == "composition dawn:0.75 dusk:0.75"
    assert "blend" in [item.name for item in verify(registry, offline=True)]


def test_a_term_that_was_removed_and_one_that_changed_are_both_named(
    registry: Registry, blend: NamedComposition
) -> None:
    registry.store.remove("dawn")
    publish(registry, "dusk", 3)
    gone, other = verdict(registry).problems
    assert gone.startswith("dawn: there is no adapter 'dawn'")
    assert other.startswith("dusk: is ")
    assert f"was tuned as {blend.terms[1].sha256[:12]}" in other


def test_a_term_whose_bytes_changed_is_named(registry: Registry, blend: NamedComposition) -> None:
    (registry.resolve("dawn").folder / "README.md").write_text("other")
    (problem,) = verdict(registry).problems
    assert problem == "dawn: adapter 'dawn' in the store is damaged"


@pytest.mark.parametrize("content", ["", '{"name": "to', "[]", '{"name": "blend", "base": "b", "terms": []}'])
def test_a_damaged_file_is_named_and_hides_nothing(
    registry: Registry, blend: NamedComposition, cli: Cli, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(registry.folder)
    (registry.compositions.folder / "blend.json").write_text(content)
    assert verdict(registry).problems == ("the composition 'blend' in the store is damaged",)
    checks = {check.name: check for check in registry_checks(registry)}
    assert (checks["composition blend"].status, checks["adapter dawn"].status) == ("broken", "ok")
    rows = {row["name"]: row for row in json.loads(cli("list", "--json").out)}
    assert rows["blend"]["source"] == "damaged; see: lora-rt verify blend"
    assert "dawn" in rows
    assert cli("rm", "blend", "-y").code == 0
    assert "blend" not in registry.compositions.names()


def test_doctor_notes_an_adapter_that_a_composition_hides(registry: Registry, blend: NamedComposition) -> None:
    publish(registry, "blend", 4)
    checks = {check.name: check for check in registry_checks(registry)}
    assert checks["composition blend"].status == "note"
    assert "has the same name; the composition is used" in checks["composition blend"].detail


def test_the_lock_holds_the_composition_and_frozen_puts_it_back(project: Registry) -> None:
    entries, _ = make_lock(project)
    assert [entry.name for entry in entries] == ["mood"]
    assert make_lock(project) == (entries, False)
    (locked,) = read_locked_compositions(project.folder)
    here = project.compositions.get("blend")
    assert here is not None
    assert (locked.terms, locked.sha256) == (here.terms, here.sha256)
    shutil.rmtree(project.store.root)
    sync(project, frozen=True)
    again = project.compositions.get("blend")
    assert again is not None
    assert again.sha256 == here.sha256


def decided(project: Registry, tensors: bytes) -> NamedComposition:
    """The composition of the project with a mode that has learned something."""
    facts = {"mode": "router", "card": {"gate": "top1"}, "state": sha256_bytes(tensors)}
    return named_composition("blend", project.resolve("mood")).model_copy(update=facts)


def test_the_lock_holds_what_the_mode_of_a_composition_has_learned(project: Registry) -> None:
    tensors = bytes(range(256)) * 40
    project.compositions.save(decided(project, tensors), tensors)
    here = project.compositions.get("blend")
    make_lock(project)
    assert make_lock(project)[1] is False
    shutil.rmtree(project.store.root)
    sync(project, frozen=True)
    again = project.compositions.get("blend")
    assert here is not None
    assert again is not None
    assert (again.sha256, again.mode_card) == (here.sha256, here.mode_card)
    assert project.compositions.state(again) == tensors
    assert "tensors" not in again.document()


@pytest.mark.parametrize("change", ["tensors", "too large"])
def test_tensors_that_are_others_or_too_many_are_refused(project: Registry, change: str) -> None:
    tensors = b"x" * (800_000 if change == "too large" else 30)
    project.compositions.save(decided(project, tensors), tensors)
    if change == "too large":
        with pytest.raises(ProjectError, match="larger than 1 MB") as error:
            make_lock(project)
        assert error.value.problems == ("blend: 800,000 bytes of tensors",)
        assert not (project.folder / "lora-rt.lock").exists()
        return
    make_lock(project)
    path = project.folder / "lora-rt.lock"
    path.write_text(path.read_text().replace('tensors = "eHh4', 'tensors = "eHh5'))
    with pytest.raises(ProjectError) as error:
        read_locked_compositions(project.folder)
    assert error.value.problems == ("composition 1 ('blend'): the tensors of its mode 'router' are others",)


def test_a_composition_that_ships_is_locked_where_the_project_names_it_and_only_there(
    registry: Registry, hub: LocalHub
) -> None:
    shipped = registry.compositions.look_up("registers")
    assert shipped is not None
    hub.commit(REPO, adapter_files())
    registry.compositions.save(named_composition("mine", pull(registry.store, Reference.parse(REPO))))
    make_lock(registry)
    assert [mix.name for mix in read_locked_compositions(registry.folder)] == ["mine"]
    (registry.folder / "lora-rt.toml").write_text('compositions = ["registers"]\n[adapters]\n')
    make_lock(registry)
    (locked,) = read_locked_compositions(registry.folder)
    assert (locked.sha256, sha256_bytes(locked.tensors)) == (shipped.sha256, shipped.state)


def test_frozen_names_a_composition_that_is_another_here_and_changes_nothing(project: Registry) -> None:
    make_lock(project)
    other = named_composition("blend", project.resolve("mood"), weight=0.25)
    project.compositions.save(other)
    (problem,) = check_lock(project)
    assert problem.startswith(f"the composition blend is {other.sha256[:12]} here, locked is ")
    with pytest.raises(ProjectError, match="--frozen"):
        sync(project, frozen=True)
    assert project.compositions.get("blend") == other
    sync(project)
    assert [mix.sha256 for mix in read_locked_compositions(project.folder)] == [other.sha256]


def test_sync_names_adapters_that_a_locked_composition_misses(project: Registry) -> None:
    own = publish(project, "dawn", 1)
    project.compositions.save(named_composition("blend", own, project.resolve("mood")))
    make_lock(project)
    shutil.rmtree(project.store.root)
    with pytest.raises(ChangedAdapterError) as error:
        sync(project, frozen=True)
    (problem,) = error.value.problems
    assert problem.startswith("blend: dawn: there is no adapter 'dawn'")


def test_a_composition_that_is_nowhere_or_broken_can_not_be_locked(project: Registry) -> None:
    project.compositions.remove("blend")
    with pytest.raises(ProjectError) as error:
        make_lock(project)
    assert error.value.problems == ("blend: there is no such composition here",)
    project.compositions.save(named_composition("blend", publish(project, "dawn", 1)))
    project.store.remove("dawn")
    with pytest.raises(ProjectError, match="blend: dawn: there is no adapter"):
        make_lock(project)


def test_without_a_project_compositions_of_pulled_adapters_are_locked_and_no_others(
    registry: Registry, hub: LocalHub, blend: NamedComposition
) -> None:
    hub.commit(REPO, adapter_files(seed=5))
    registry.compositions.save(named_composition("moody", pull(registry.store, Reference.parse(REPO))))
    make_lock(registry)
    assert [mix.name for mix in read_locked_compositions(registry.folder)] == ["moody"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("weight = 1.0", "weight = 2.0", "does not follow from its terms"),
        ('name = "blend"', 'name = "../x"', "not a name"),
        ("layers = [0.5, 1.0]", 'layers = ["a"]', "terms.0.layers.0"),
        ("[[composition]]", "[composition]", "composition 1"),
    ],
)
def test_a_damaged_entry_of_the_lock_is_named(project: Registry, old: str, new: str, says: str) -> None:
    make_lock(project)
    path = project.folder / "lora-rt.lock"
    text = path.read_text().replace(old, new)
    path.write_text(text.replace("[[composition.terms]]", "[composition.terms]") if new == "[composition]" else text)
    with pytest.raises(ProjectError) as error:
        check_lock(project)
    assert says in str(error.value)


def test_compositions_of_a_project_that_are_no_names_are_named(registry: Registry) -> None:
    for line in ("compositions = 7", 'compositions = ["../x"]', "compositions = [7]"):
        (registry.folder / "lora-rt.toml").write_text(line + "\n")
        with pytest.raises(ProjectError) as error:
            make_lock(registry)
        assert "compositions" in str(error.value)


@pytest.mark.slow
def test_commands_show_lock_and_sync_a_composition(
    project: Registry, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.folder)
    assert json.loads(cli("lock", "--json").out) == {"changed": True, "adapters": ["mood"], "compositions": ["blend"]}
    assert json.loads(cli("sync", "--frozen", "--json").out)["compositions"] == ["blend"]
    assert "blend composition mood:0.75" in cli("sync").out
    shown = json.loads(cli("show", "blend", "--json").out)
    assert (shown["mode"], shown["problems"], shown["terms"][0]["layers"]) == ("composition", [], [0.5, 1.0])
    assert "mood:1, 2 layers from 0.500 to 1.000" in cli("show", "blend").out
    row = next(row for row in json.loads(cli("list", "--json").out) if row["name"] == "blend")
    assert row["sha256"] == shown["sha256"]
    assert cli("verify", "blend", "--offline").code == 0
    project.store.remove(REPO)
    Path(project.folder / "lora-rt.toml").unlink()
    Path(project.folder / "lora-rt.lock").unlink()
    assert cli("verify", "blend", "--offline").code == 1


def test_a_composition_is_not_pushed_and_the_reason_is_said(
    registry: Registry, blend: NamedComposition, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(registry.folder)
    done = cli("push", "blend", "a/b")
    assert done.code == 1
    assert "'blend' is a composition, and here an adapter is needed. lora-rt show blend lists its adapters" in done.err
    with pytest.raises(UnknownAdapterError, match="is a composition"):
        registry.resolve("blend")


def test_a_composition_finds_its_adapter_behind_another_of_that_name(tmp_path: Path) -> None:
    """It was tuned over the register that ships, and stays so when a user calls one of their own `logic`."""
    registry = Registry(home=tmp_path / "home", project=tmp_path)
    term = NamedTerm(reference="logic", sha256=registry.resolve("logic").sha256)
    mix = NamedComposition(name="mix", base="HuggingFaceTB/SmolLM2-135M-Instruct", terms=(term,))
    publish(registry, "logic")
    assert registry.resolve("logic").source == "trained here"
    assert registry.composition_problems(mix) == []
    gone = term.model_copy(update={"sha256": "0" * 64})
    (problem,) = registry.composition_problems(mix.model_copy(update={"terms": (gone,)}))
    assert "was tuned as 000000000000" in problem


def test_ones_own_composition_comes_before_one_that_ships(tmp_path: Path) -> None:
    registry = Registry(home=tmp_path / "home", project=tmp_path)
    own = named_composition("registers", registry.resolve("logic"))
    registry.compositions.save(own)
    assert registry.compositions.get("registers") == own
    assert registry.compositions.source("registers") == "tuned here"
    assert registry.compositions.remove("registers")
    assert registry.compositions.source("registers").startswith("shipped")
    assert not registry.compositions.remove("registers")


def test_what_ships_can_not_be_removed_and_is_not_locked(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("rm", "registers", "-y")
    assert done.code == 1
    assert "'registers' is a composition shipped with lora-rt" in done.err
    assert cli("show", "registers", "--json").code == 0


@pytest.mark.parametrize("fails", ["write_bytes", "write_text", "replace"])
def test_a_save_that_is_cut_off_leaves_the_old_composition_or_the_new_one(
    project: Registry, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    old, new = b"o" * 30, b"n" * 40
    compositions = project.compositions
    compositions.save(decided(project, old), old)

    def full(*_given: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path if fails == "replace" else durable, fails, full)
        with pytest.raises(OSError):
            compositions.save(decided(project, new), new)
    kept = compositions.own("blend")
    assert kept is not None
    assert compositions.state(kept) == (new if fails == "replace" else old)
    compositions.save(decided(project, new), new)
    assert sorted(path.name for path in compositions.folder.glob("blend*")) == ["blend.json", "blend.safetensors"]
    compositions.remove("blend")
    assert not list(compositions.folder.glob("blend*"))
