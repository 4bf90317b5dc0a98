"""The word that goes round a refusal: an adapter that states another base is used if its shapes fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from torch.testing import assert_close

from lora_rt.core.runtime import Runtime
from lora_rt.registry.card import AdapterCard, BaseIdentity, write_card
from lora_rt.registry.errors import RejectedAdapterError
from support.cli import Cli
from support.tiny import Zoo, dense_logits, some_ids

pytestmark = pytest.mark.slow  # PEFT makes the adapter, and needs of torch what the quick tests leave out


@pytest.fixture
def foreign(zoo: Zoo, tmp_path: Path) -> Path:
    """An adapter of the right shapes whose card has the digest of another base."""
    folder = Path(shutil.copytree(zoo.adapter("llama"), tmp_path / "foreign"))
    base = BaseIdentity(zoo.base("llama").name, None, "0" * 64)
    write_card(folder, AdapterCard(register="voice", mode="output-only", base=base))
    return folder


def test_an_adapter_of_another_base_of_that_name_is_refused_until_it_is_allowed(zoo: Zoo, foreign: Path) -> None:
    runtime = zoo.runtime("llama", fresh=True)
    with pytest.raises(RejectedAdapterError, match="--allow-base-mismatch"):
        runtime.load_adapter(str(foreign))
    name = runtime.load_adapter(str(foreign), allow_base_mismatch=True)
    ids = some_ids()
    wanted = dense_logits(zoo.base("llama"), [(foreign, 1.0)], ids)
    assert_close(runtime.logits(ids, compositions=name), wanted, rtol=1e-4, atol=1e-4)


def test_a_runtime_may_allow_it_for_all(zoo: Zoo, foreign: Path) -> None:
    base = str(zoo.base("llama"))
    with Runtime.load(base, precision="float32", device="cpu", allow_base_mismatch=True) as runtime:
        wanted = dense_logits(zoo.base("llama"), [(foreign, 1.0)], some_ids())
        assert_close(runtime.logits(some_ids(), compositions=str(foreign)), wanted, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused_all_the_same(zoo: Zoo, foreign: Path) -> None:
    runtime = zoo.runtime("llama", fresh=True, hidden_size=32)
    with pytest.raises(RejectedAdapterError, match="wrong"):
        runtime.load_adapter(str(foreign), allow_base_mismatch=True)


def test_the_command_line_says_the_word_and_takes_it(zoo: Zoo, foreign: Path, cli: Cli) -> None:
    command = ["compose", str(foreign), "--base", str(zoo.base("llama")), "--precision", "float32"]
    command += ["-p", "hello", "--max-new-tokens", "2", "--json"]
    refused = cli(*command)
    assert refused.code == 1
    assert "--allow-base-mismatch" in refused.err
    done = cli(*command, "--allow-base-mismatch")
    assert done.code == 0, done.err
    assert json.loads(done.out)["terms"]
