"""Which adapter a name means, in which order it is looked for, and what is said when it means none."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.errors import (
    ChangedAdapterError,
    RejectedAdapterError,
    StoreError,
    UnknownAdapterError,
    WrongBaseError,
)
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved
from lora_rt.registry.shipped import Shipped, shipped
from support.adapters import adapter_files, write_adapter
from support.hub import LocalHub

SMOL = BaseIdentity("org/smol", None, "a1")
QWEN = BaseIdentity("org/qwen", None, "b2")


def _base(identity: BaseIdentity) -> dict[str, object]:
    return {"id": identity.id, "revision": identity.revision, "digest": identity.digest}


def _publish(registry: Registry, name: str, base: BaseIdentity = SMOL, seed: int = 0) -> Resolved:
    with registry.store.staging() as staged:
        write_adapter(staged, adapter_files(base=_base(base), seed=seed))
        return registry.store.publish(staged, name, source="trained here", revision=None)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that ships the adapter `emotion`, and says that importing it would be noticed."""
    site = tmp_path / "site"
    facts = site / "moods-1.2.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: moods\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(
        "[lora_rt.adapters]\nemotion = moods.adapters.emotion\nmissing = moods.adapters.missing\n../up = moods.x\n"
    )
    (site / "moods").mkdir()
    (site / "moods" / "__init__.py").write_text("raise SystemExit('imported')\n")
    write_adapter(site / "moods" / "adapters" / "emotion", adapter_files(base=_base(SMOL), seed=7))
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    importlib.invalidate_caches()
    return site


def test_the_project_comes_before_the_store_and_that_before_what_is_shipped(
    registry: Registry, package: Path, tmp_path: Path
) -> None:
    assert registry.resolve("emotion", SMOL).source == "shipped with moods 1.2"
    _publish(registry, "emotion")
    assert registry.resolve("emotion", SMOL).source == "trained here"
    write_adapter(registry.folder / "mine", adapter_files(base=_base(SMOL)))
    (registry.folder / "lora-rt.toml").write_text('[adapters]\nemotion = "./mine"\n')
    found = registry.resolve("emotion", SMOL)
    assert (found.name, found.source) == ("emotion", "./mine")
    assert found.why == "'emotion' is ./mine in lora-rt.toml"


def test_sources_of_plugins_come_last_and_get_the_base(registry: Registry, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "elsewhere", adapter_files(base=_base(SMOL)))
    asked: list[object] = []

    def find(name: str, base: BaseIdentity | None) -> Path | None:
        asked.append(base)
        return folder if name == "mood" else None

    with_source = Registry(registry.store.root.parent, registry.folder, sources=[("shelf", find)])
    found = with_source.resolve("mood", SMOL)
    assert found.source == "plugin shelf"
    assert asked == [SMOL]
    with pytest.raises(UnknownAdapterError):
        with_source.resolve("other", SMOL)


def test_the_base_in_use_decides_between_adapters_of_one_name(registry: Registry) -> None:
    for_smol, for_qwen = _publish(registry, "reason", SMOL, 1), _publish(registry, "reason", QWEN, 2)
    assert registry.resolve("reason", SMOL).sha256 == for_smol.sha256
    assert registry.resolve("reason", QWEN).sha256 == for_qwen.sha256
    renamed = BaseIdentity("/home/me/smol", None, "a1")
    assert registry.resolve("reason", renamed).sha256 == for_smol.sha256


def test_a_mismatch_says_which_bases_exist(registry: Registry) -> None:
    _publish(registry, "reason", SMOL, 1)
    _publish(registry, "reason", QWEN, 2)
    with pytest.raises(WrongBaseError, match="'reason' is for org/qwen, org/smol, in use is org/other"):
        registry.resolve("reason", BaseIdentity("org/other", None, ""))
    with pytest.raises(WrongBaseError, match="in use is org/smol of ffff") as error:
        registry.resolve("reason", BaseIdentity(SMOL.id, None, "ffff"))
    assert f"{SMOL.id} of {SMOL.digest}" in error.value.message


def test_a_shipped_adapter_for_this_base_is_found_behind_an_installed_one_for_another(
    registry: Registry, package: Path
) -> None:
    _publish(registry, "emotion", QWEN)
    assert registry.resolve("emotion", SMOL).source == "shipped with moods 1.2"


def test_an_unknown_name_gets_the_nearest_ones(registry: Registry) -> None:
    _publish(registry, "melancholy")
    with pytest.raises(UnknownAdapterError, match="no adapter 'melancoly'; did you mean 'melancholy'") as error:
        registry.resolve("melancoly")
    assert error.value.next_step == "See: lora-rt list"


def test_a_revision_of_a_name_is_the_beginning_of_its_digest(registry: Registry) -> None:
    found = _publish(registry, "reason")
    assert registry.resolve(f"reason@{found.sha256[:10]}").sha256 == found.sha256
    with pytest.raises(UnknownAdapterError, match="no revision '0000000' of 'reason'; there is"):
        registry.resolve("reason@0000000")


def test_a_path_is_used_where_it_lies(registry: Registry) -> None:
    folder = write_adapter(registry.folder / "mine")
    found = registry.resolve("./mine")
    assert (found.name, found.folder.resolve()) == ("mine", folder.resolve())
    assert registry.store.installed() == []


def test_a_path_that_leads_nowhere_is_said(registry: Registry) -> None:
    (registry.folder / "empty").mkdir()
    for text in ("./nothing", "./empty"):
        with pytest.raises(UnknownAdapterError):
            registry.resolve(text)


def test_shipped_adapters_are_found_without_importing_anything(package: Path) -> None:
    found = {item.name: item for item in shipped() if item.package == "moods 1.2"}
    assert found["emotion"] == Shipped("emotion", "moods 1.2", package / "moods" / "adapters" / "emotion", "")
    assert found["missing"].folder is None
    assert "adapter_config.json" in found["missing"].reason
    assert "not a name" in found["../up"].reason
    assert "moods" not in sys.modules


def test_two_names_that_differ_by_case_are_not_both_installed(registry: Registry) -> None:
    _publish(registry, "reason")
    with pytest.raises(StoreError, match="differs only by case"):
        _publish(registry, "Reason")


def test_a_missing_file_is_found_at_load(registry: Registry) -> None:
    found = _publish(registry, "reason")
    (found.folder / "register.json").unlink()
    with pytest.raises(ChangedAdapterError) as error:
        registry.resolve("reason")
    assert error.value.problems == ("register.json is missing",)


def test_a_file_that_was_added_is_found_at_load(registry: Registry) -> None:
    found = _publish(registry, "reason")
    (found.folder / "mode.safetensors").write_bytes(b"x")
    with pytest.raises(ChangedAdapterError) as error:
        registry.resolve("reason")
    assert error.value.problems == ("mode.safetensors is new",)


def test_publishing_again_repairs_a_damaged_object(registry: Registry) -> None:
    found = _publish(registry, "reason")
    (found.folder / "register.json").write_text("{}")
    _publish(registry, "reason")
    assert registry.resolve("reason").sha256 == found.sha256


def test_removing_a_name_removes_its_files_unless_another_name_has_them(registry: Registry) -> None:
    found = _publish(registry, "reason")
    _publish(registry, "thought")
    registry.store.remove("reason")
    assert registry.resolve("thought").folder == found.folder
    registry.store.remove("thought")
    assert not found.folder.exists()


def test_the_first_load_of_a_broken_adapter_of_the_project_is_refused(registry: Registry) -> None:
    write_adapter(registry.folder / "mine", adapter_files() | {"register.json": b"{"})
    (registry.folder / "lora-rt.toml").write_text('[adapters]\nreason = "./mine"\n')
    with pytest.raises(RejectedAdapterError, match="card"):
        registry.resolve("reason")


def test_one_broken_adapter_does_not_hide_the_others(registry: Registry, package: Path) -> None:
    _publish(registry, "thought")
    (package / "moods" / "adapters" / "emotion" / "register.json").write_text("{")
    write_adapter(registry.folder / "mine", adapter_files() | {"register.json": b"{"})
    (registry.folder / "lora-rt.toml").write_text('[adapters]\nlogic = "./mine"\ngone = "./gone"\n')
    names = [item.name for item in registry.installed() if not item.source.startswith("shipped with lora-rt")]
    assert names == ["thought"]


def test_a_name_of_the_project_may_be_a_repository(registry: Registry, hub: LocalHub) -> None:
    hub.commit("someone/voice", adapter_files(), tag="v1")
    (registry.folder / "lora-rt.toml").write_text('[adapters]\nreason = "someone/voice@v1"\n')
    found = registry.resolve("reason")
    assert (found.name, found.source, found.requested) == ("reason", "hub someone/voice", "v1")
