"""Which base a folder is: whatever changes what it computes makes it another, and nothing else does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_rt.core.base import default, identity
from lora_rt.core.base.identity import identify_base, identify_folder
from lora_rt.core.base.load import load_base
from lora_rt.core.base.precision import compute_dtype
from lora_rt.core.base.prepare import prepare_base
from lora_rt.core.base.source import parse_base
from support.tiny import Zoo


@pytest.fixture
def copy(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of a good folder, to be changed."""
    return Path(shutil.copytree(zoo.base("llama"), tmp_path / "copy"))


def flip(file: Path, at: int) -> None:
    """Change one byte, and put the time of modification back."""
    about = file.stat()
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def big(folder: Path) -> Path:
    """The folder with weights of several MiB, so that their middle is neither in the first nor in the last one."""
    tensors = load_file(folder / "model.safetensors")
    tensors["ignored"] = tensors["lm_head.weight"].repeat(80, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def test_a_byte_in_the_middle_of_the_weights_makes_it_another_base(copy: Path) -> None:
    weights = big(copy)
    before = identify_folder(copy).digest
    flip(weights, weights.stat().st_size // 2)
    assert identify_folder(copy).digest != before


def test_another_configuration_over_the_same_weights_is_another_base(copy: Path) -> None:
    before = identify_folder(copy).digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert identify_folder(copy).digest != before


@pytest.mark.slow
def test_what_is_quantized_of_a_changed_folder_is_the_changed_model(copy: Path) -> None:
    source = parse_base(str(copy))
    first = prepare_base(source, "int4")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    second = prepare_base(source, "int4")
    assert second.folder != first.folder
    kept = load_file(second.folder / "model.safetensors")["model.norm.weight"]
    assert kept.equal(tensors["model.norm.weight"].to(compute_dtype("int4")))


def test_a_second_start_does_not_read_the_weights_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.utime(copy / "model.safetensors", (1, 1))
    first = identify_folder(copy)
    monkeypatch.setattr(identity, "sha256_file", None)
    assert identify_folder(copy) == first


def test_a_base_is_told_without_reading_weights_that_take_long(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert identify_base("default") == default.IDENTITY
    assert identify_base(str(copy)) == identify_folder(copy)
    monkeypatch.setattr(identity, "_QUICK_BYTES", 10)
    flip(copy / "model.safetensors", -1 + (copy / "model.safetensors").stat().st_size)
    assert (identify_base(str(copy)).id, identify_base(str(copy)).digest) == ("copy", "")
    assert identify_base("someone/never-seen@v1").digest == ""


def test_a_folder_of_the_hubs_cache_is_called_by_its_repository(zoo: Zoo, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / commit
    blobs = tmp_path / "models--someone--tiny" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in zoo.base("llama").iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    base = load_base(str(snapshot), "float32", "cpu").identity
    assert (base.id, base.revision) == ("someone/tiny", commit)
    assert base.digest == identify_folder(zoo.base("llama")).digest


@pytest.mark.slow
@pytest.mark.parametrize("where", ["kept", "copied"])
def test_a_folder_that_was_prepared_is_the_base_that_it_was_made_of(
    zoo: Zoo, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare_base(parse_base(str(zoo.base("llama"))), "int4")
    folder = made.folder if where == "kept" else Path(shutil.copytree(made.folder, tmp_path / "elsewhere"))
    monkeypatch.setattr("lora_rt.core.base.prepare._quantize", None)
    again = load_base(str(folder), "int4", "cpu")
    assert (again.identity, again.folder) == (made.identity, folder.resolve())


def lengthen(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"\0")


def change(folder: Path) -> None:
    flip(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


@pytest.mark.parametrize("damage", [lengthen, change])
def test_a_prepared_folder_that_was_changed_is_not_what_its_manifest_says(
    zoo: Zoo, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    made = prepare_base(parse_base(str(zoo.base("llama"))), "int4")
    folder = Path(shutil.copytree(made.folder, tmp_path / "elsewhere"))
    damage(folder)
    assert identify_folder(folder).digest != made.identity.digest
