"""`lora-rt plan` tells a base's memory in a table and as JSON, and explains what it can't plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_rt.core.training import processes
from lora_rt.core.training.processes import Processes
from support.cli import Cli
from support.hub import LocalHub
from support.tiny import Zoo

SMALL = ["--batch", "2", "--seq", "16"]


@pytest.mark.slow
def test_the_table_has_every_precision_and_every_device(cli: Cli, zoo: Zoo) -> None:
    done = cli("plan", str(zoo.base("llama")), "--device", "cuda", *SMALL)
    assert done.code == 0
    for word in ("float32", "bfloat16", "float16", "int8", "int4", "KV cache", "24 GB:", "48 GB:", "80 GB:", "GiB"):
        assert word in done.out
    assert done.out.strip().splitlines()[-1].startswith("least: ")


@pytest.mark.slow
def test_the_parts_add_up_in_json(cli: Cli, zoo: Zoo) -> None:
    done = cli("plan", str(zoo.base("qwen3")), "--json", "--device", "cpu", "--precision", "int4", *SMALL)
    document = json.loads(done.out)
    assert list(document["precisions"]) == ["int4"]
    assert document["process"] > 50e6
    item = document["precisions"]["int4"]
    inference = dict(item["inference"])
    assert inference.pop("total") == sum(inference.values()) + document["process"]
    assert item["copies"] > 0
    training = dict(item["training"])
    assert training.pop("peak") == sum(training.values()) + document["process"]
    assert item["training_checkpointed"]["activations"] <= training["activations"]
    assert document["fits"]["24 GB"]["inference"]["precision"] == "int4"


@pytest.mark.slow
def test_processes_that_a_launcher_started_share_the_step_and_one_of_them_says_what_each_and_all_take(
    cli: Cli, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["plan", str(zoo.base("llama")), "--device", "cuda", "--precision", "float32", "--seq", "16"]
    half = json.loads(cli(*given, "--json", "--batch", "2").out)["precisions"]["float32"]
    shared = json.loads(cli(*given, "--json", "--batch", "4", "--processes", "2").out)["precisions"]["float32"]
    assert shared["training"] == half["training"]
    assert shared["inference"]["kv_cache"] == 2 * half["inference"]["kv_cache"]

    monkeypatch.setattr(processes, "told", lambda: Processes(0, 2, sharded=True))
    said = cli(*given, "--batch", "4").out
    assert "each of 2 processes 2 x 16 tokens" in said
    assert "all*" in said
    cut = json.loads(cli(*given, "--json", "--batch", "4").out)["precisions"]["float32"]["training"]
    assert 0.5 * half["training"]["weights"] < cut["weights"] < 0.8 * half["training"]["weights"], "head and embedding"
    monkeypatch.setattr(processes, "told", lambda: Processes(1, 2))
    assert cli(*given).out == ""


@pytest.mark.slow
def test_on_a_cuda_device_adapters_take_the_base_s_dtype_and_the_optimizer_is_paged(cli: Cli, zoo: Zoo) -> None:
    common = [str(zoo.base("llama")), "--json", "--precision", "bfloat16", "--r", "32", *SMALL]
    cpu = json.loads(cli("plan", *common, "--device", "cpu").out)
    cuda = json.loads(cli("plan", *common, "--device", "cuda").out)
    plans = [document["precisions"]["bfloat16"] for document in (cpu, cuda)]
    assert plans[0]["inference"]["adapters"] == 2 * plans[1]["inference"]["adapters"]
    assert cuda["workload"]["optimizer"] == "paged-adamw-8bit"
    assert cuda["process"] == 0


@pytest.mark.slow
def test_of_a_repository_the_configuration_alone_is_fetched(cli: Cli, zoo: Zoo, hub: LocalHub) -> None:
    hub.commit("org/base", {"config.json": (zoo.base("llama") / "config.json").read_bytes()})
    assert cli("plan", "org/base", "--precision", "int4", *SMALL).code == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--target-modules", "q_porj"], "the nearest is 'q_proj'"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--precision", "int3"], "no precision 'int3'"),
        (["--batch", "0", "--seq", "1"], "batch is 0"),
        (["--seq", "9" * 17], f"seq is {'9' * 17}; it must be at most 16777216"),
        (["--batch", "3", "--processes", "2"], "batch is 3, which 2 processes can't share evenly"),
        (["--batch", "65536", "--seq", "16777216"], "batch x seq is 1099511627776; it must be at most 1073741824"),
    ],
)
def test_what_cannot_be_planned_is_explained(cli: Cli, zoo: Zoo, arguments: list[str], named: str) -> None:
    done = cli("plan", str(zoo.base("llama")), "--precision", "int4", *arguments)
    assert done.code == (1 if "q_proj" in named else 2)
    assert named in done.err


def test_an_unknown_repository_and_a_folder_of_something_else_are_explained(
    cli: Cli, hub: LocalHub, tmp_path: Path
) -> None:
    assert "no model org/none on the Hub" in cli("plan", "org/none").err
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    done = cli("plan", str(tmp_path))
    assert (done.code, "can't be read" in done.err) == (1, True)
