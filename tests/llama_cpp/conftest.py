"""A tiny base as a GGUF file in float32, whose words are bytes, and adapters over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_rt.core.base.byte_tokenizer import byte_tokenizer
from lora_rt.core.runtime import Runtime
from support.cli import Cli, command_line
from support.gguf import llama_arrays, write_llama
from support.tiny import SPECIAL, TEMPLATE, VOCAB, Zoo, dense_model


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("compose", "emotion", stdin="...")`."""
    return command_line(monkeypatch, capsys)


@pytest.fixture(scope="session")
def gguf(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The zoo's Llama. Its last byte has made room for a merged token, since a vocabulary without merges is none."""
    numbers = byte_tokenizer(SPECIAL).get_vocab()
    tokens = sorted(numbers, key=numbers.__getitem__)[: VOCAB - 1]
    model = dense_model(zoo.base("llama"), [])
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    merged = [*tokens, tokens[-2] + tokens[-1]]
    return write_llama(path, model.config, llama_arrays(model), merged, control=len(SPECIAL), template=TEMPLATE)


@pytest.fixture
def adapters(zoo: Zoo) -> tuple[str, str]:
    """Two of different ranks and layers."""
    mlp = ("gate_proj", "up_proj", "down_proj")
    return str(zoo.adapter("llama", seed=1, r=4)), str(zoo.adapter("llama", seed=4, r=2, targets=mlp))


@pytest.fixture
def torch_runtime(gguf: Path) -> Runtime:
    """The other engine over the same file."""
    return Runtime.load(str(gguf), precision="float32", device="cpu")
