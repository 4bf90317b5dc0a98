"""Nothing hostile gets in: every bad adapter is refused by name, quickly, in little memory, and leaves no trace."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.errors import ChangedAdapterError, RejectedAdapterError
from lora_rt.registry.inspection import InspectedAdapter, inspect_adapter
from lora_rt.registry.registry import Registry
from support.adapters import BASE, CONFIG, LINEARS, adapter_files, write_adapter
from support.hostile import CASES, FOLDERS, Change, config, value

IN_USE = BaseIdentity(**BASE)


def _inspect(folder: Path, name: str = "good") -> InspectedAdapter:
    return inspect_adapter(folder, name=name, linears=LINEARS, base=IN_USE)


def _refusal(folder: Path) -> RejectedAdapterError:
    with pytest.raises(RejectedAdapterError) as first:
        _inspect(folder)
    tracemalloc.start()
    try:
        with pytest.raises(RejectedAdapterError):
            _inspect(folder)
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()
    return first.value


def test_the_good_adapter_passes(tmp_path: Path) -> None:
    found = _inspect(write_adapter(tmp_path / "good"))
    assert [module.module for module in found.modules] == [m for m in LINEARS if m.endswith(("q_proj", "v_proj"))]
    assert {(module.rank, module.scaling) for module in found.modules} == {(4, 2.0)}
    assert found.mode == "output-only"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_bad_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, says = CASES[name]
    files = adapter_files()
    change(files)
    error = _refusal(write_adapter(tmp_path / "bad", files))
    assert error.problems
    assert any(_matches(says, problem) for problem in error.problems), error.problems
    assert all(problem.isprintable() and len(problem) < 500 for problem in error.problems)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, says = FOLDERS[name]
    folder = write_adapter(tmp_path / "bad")
    change(folder)
    error = _refusal(folder)
    assert any(_matches(says, problem) for problem in error.problems), error.problems


def test_a_known_other_kind_is_named_in_one_line(tmp_path: Path) -> None:
    files = adapter_files()
    config(peft_type="IA3", r=None, feedforward_modules=["down_proj"], init_ia3_weights=True)(files)
    (line,) = [problem for problem in _refusal(write_adapter(tmp_path / "bad", files)).problems if "config" in problem]
    assert line == "adapter_config.json: IA3, not LoRA"


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    files = adapter_files()
    value("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", float("nan"))(files)
    config(r=0, peft_type="EVIL", use_qalora=True, rank_pattern={"(b+)+$": -1})(files)
    files["register.json"] = b"{"
    text = str(_refusal(write_adapter(tmp_path / "bad", files)))
    for part in ("r is 0", "EVIL", "QA-LoRA", "(b+)+$", "-1", "register.json", "NaN or infinite"):
        assert part in text


@pytest.mark.parametrize("name", ["/abs", "../x", "..", "a/b/c", "a\\b", "", "a\nb", "a" * 200, ".hidden", "-x"])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path, registry: Registry) -> None:
    folder = write_adapter(tmp_path / "good")
    with pytest.raises(RejectedAdapterError, match="not a name"):
        _inspect(folder, name=name)
    with registry.store.staging() as staged, pytest.raises(Exception, match="not a name"):
        registry.store.publish(write_adapter(staged), name, source="test", revision=None)
    assert registry.store.installed() == []


def test_a_linked_folder_that_points_outside_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "elsewhere" / "adapter")
    (tmp_path / "project").mkdir()
    link = tmp_path / "project" / "adapter"
    link.symlink_to(tmp_path / "elsewhere" / "adapter")
    with pytest.raises(RejectedAdapterError, match="points outside"):
        _inspect(link)


def test_a_refusal_leaves_store_and_working_directory_as_they_were(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with registry.store.staging() as staged:
        registry.store.publish(write_adapter(staged), "good", source="test", revision=None)
    for number, (change, _) in enumerate(CASES.values()):
        files = adapter_files()
        change(files)
        write_adapter(tmp_path / "bad" / str(number), files)
    before = _tree(tmp_path)
    for folder in (tmp_path / "bad").iterdir():
        with pytest.raises(RejectedAdapterError):
            _inspect(folder)
    assert _tree(tmp_path) == before


@pytest.mark.slow
def test_nothing_of_a_bad_adapter_can_be_published(registry: Registry) -> None:
    for change, _ in CASES.values():
        files = adapter_files()
        change(files)
        with registry.store.staging() as staged:
            write_adapter(staged, files)
            if _is_bad_without_a_base(staged):
                with pytest.raises(RejectedAdapterError):
                    registry.store.publish(staged, "bad", source="test", revision=None)
    assert registry.store.installed() == []
    assert registry.store.orphans() == []


def test_a_body_of_the_right_size_with_a_wrong_byte_is_found_at_load(registry: Registry) -> None:
    with registry.store.staging() as staged:
        found = registry.store.publish(write_adapter(staged), "good", source="test", revision=None)
    weights = found.folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ChangedAdapterError, match="other bytes"):
        registry.resolve("good")
    with pytest.raises(ChangedAdapterError, match="changed"):
        inspect_adapter(found.folder, name="good", linears=LINEARS, sha256=found.sha256)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(q|q)*_proj", ".*" * 30 + "x", ".*(?:a|)" * 6 + "x", "(?:.*|a)" * 6 + "x", "(", "(?P<x>.)(?P=x)"],
)
def test_a_pattern_that_could_hang_is_never_matched_and_the_tensors_say_what_is_adapted(
    field: str, pattern: str, tmp_path: Path
) -> None:
    files = adapter_files()
    config(**{field: pattern})(files)
    assert len(_inspect(write_adapter(tmp_path / "good", files)).modules) == 4


@pytest.mark.parametrize(
    "change",
    [
        config(target_modules=r".*self_attn\.(q|v)_proj"),
        config(target_modules=r"model\.layers\.\d+\.self_attn\.(?:q_proj|v_proj)"),
        config(target_modules=["self_attn.q_proj", "self_attn.v_proj"], exclude_modules=["o_proj"]),
        config(rank_pattern={"q_proj": 4, r"^model\.layers\.0\.self_attn\.v_proj": 4}),
        config(init_lora_weights="gaussian", use_rslora=True, fan_in_fan_out=True, peft_version="9.9"),
        config(base_model_name_or_path="/somewhere/on/a/disk"),
        config(auto_mapping={"base_model_class": "X", "parent_library": "transformers.models.llama.modeling_llama"}),
        lambda files: files.pop("register.json"),
        lambda files: files.update({"adapter_config.json": b"\xef\xbb\xbf" + files["adapter_config.json"]}),
        lambda files: files.update({"other.bin": b"never read"}),
    ],
)
def test_what_others_make_and_is_sound_passes(change: Change, tmp_path: Path) -> None:
    files = adapter_files()
    change(files)
    assert len(_inspect(write_adapter(tmp_path / "good", files)).modules) == 4


def test_another_base_without_a_card_is_told_by_hub_id_and_forms_of_one_model_are_one(tmp_path: Path) -> None:
    files = adapter_files(card=False)
    for stated, passes in (("x/Tiny-Base-bnb-4bit", True), ("tests/tiny-base", True), ("tests/other-base", False)):
        files["adapter_config.json"] = json.dumps(CONFIG | {"base_model_name_or_path": stated}).encode()
        folder = write_adapter(tmp_path / stated.replace("/", "-"), files)
        if passes:
            _inspect(folder)
        else:
            assert "states the base 'tests/other-base'" in str(_refusal(folder))


def _matches(says: str, problem: str) -> bool:
    import re

    return re.search(says, problem) is not None


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _is_bad_without_a_base(folder: Path) -> bool:
    try:
        inspect_adapter(folder, name="bad")
    except RejectedAdapterError:
        return True
    return False
