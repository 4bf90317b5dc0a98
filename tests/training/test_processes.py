"""Two processes make one run: the same losses as one process, one adapter, every message once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.core.training import processes
from lora_rt.core.training.prepare import prepare
from lora_rt.core.training.processes import Processes
from lora_rt.core.training.run import TrainResult, train
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import load_modes
from support.forks import Forks

Make = Callable[..., TrainSettings]


def arguments(settings: TrainSettings, out: Path, *further: str) -> list[str]:
    given = ["--data", str(settings.data), "--base", settings.base, "--precision", "float32", "--r", "4"]
    given += ["--alpha", "8", "--lr", str(settings.learning_rate), "--epochs", str(settings.epochs)]
    given += ["--batch-size", "4", "--dropout", "0"]
    return ["train", "letters", *given, "--out", str(out), *further]


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def told_by_a_launcher(port: int) -> list[dict[str, str]]:
    """What torchrun tells each of two processes."""
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [both | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def assert_trained_alike(folder: Path, alone: TrainResult) -> None:
    """The adapter in `two` has the losses and the weights of that in `one`."""
    card = json.loads((folder / "two" / "register.json").read_text())
    for name, loss in (("held_out_nll_before", alone.loss_before), ("held_out_nll_after", alone.loss_after)):
        assert card["metrics"][name] == pytest.approx(loss, abs=1e-3)
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key].float(), two[key].float(), atol=2e-2) for key in one)


@pytest.mark.slow
def test_two_processes_train_what_one_trains_even_if_ctrl_c_came_to_their_launcher_and_to_one_of_them(
    settings: Make, tmp_path: Path, warm: Forks
) -> None:
    chosen = settings(dropout=0.0, epochs=12)
    alone = train(chosen, load_modes(), tmp_path / "one")
    given = arguments(chosen, tmp_path / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    with subprocess.Popen(
        [*launch, "-m", "--", "lora_rt", *given], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if re.match(r"step \d+/", line):
                os.killpg(run.pid, signal.SIGINT)
                break
        said = run.stderr.read()
    assert run.returncode != 0
    assert said.count("the checkpoint is kept") == 1
    assert not (tmp_path / "two").exists()

    with warm.interrupting(1, "step 21/72"):
        both = warm.together([*given, "--resume"], told_by_a_launcher(free_port()))
    assert [run.code for run in both] == [1, 1], both[0].err + both[1].err
    assert "the checkpoint is kept" in both[0].err
    assert (both[1].out, both[1].err) == ("", "")
    assert not (tmp_path / "two").exists()

    first, second = warm.together([*given, "--resume"], told_by_a_launcher(free_port()))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out.count("trained ") == 1
    assert (second.out, second.err) == ("", "")
    assert "72 steps" in first.out
    assert "step 21/72" not in first.err, "it went on from the checkpoint"
    assert_trained_alike(tmp_path, alone)


@pytest.mark.slow
def test_what_only_one_of_two_processes_can_get_wrong_is_said_once(settings: Make, tmp_path: Path, warm: Forks) -> None:
    given = arguments(settings(), tmp_path / "two", "--early-stop", "0")
    both = warm.together(given, told_by_a_launcher(free_port()))
    assert all(run.code != 0 for run in both)
    assert sum(run.err.count("early stop is 0") for run in both) == 1


def told_by_accelerate(file: Path, how: dict[str, Any]) -> dict[str, str]:
    """What `accelerate launch --config_file` adds to the environment of each process, worked out by its own code."""
    file.write_text(json.dumps(how))
    asked = launch.launch_command_parser().parse_args(["--config_file", str(file), "-m", "lora_rt"])
    given, _, _ = launch._validate_launch_command(asked)
    told = prepare_multi_gpu_env(given)
    return {name: value for name, value in told.items() if os.environ.get(name) != value}


@pytest.mark.slow
def test_fsdp_from_a_file_of_accelerate_trains_the_adapter_that_one_process_trains(
    settings: Make, tmp_path: Path, warm: Forks
) -> None:
    # An epoch ends where a checkpoint is written, after 20 steps: what is measured there passes through the blocks too.
    chosen = settings(dropout=0.0, epochs=2, data=tmp_path / "more.jsonl", learning_rate=2e-3)
    chosen.data.write_text("\n".join((settings().data.read_text().splitlines() * 4)[:89]))
    alone = train(chosen, load_modes(), tmp_path / "one")
    how = {"distributed_type": "FSDP", "use_cpu": True, "num_processes": 2, "num_machines": 1, "machine_rank": 0}
    how |= {"mixed_precision": "no", "fsdp_config": {"fsdp_version": 2}}
    by_accelerate = told_by_accelerate(tmp_path / "accelerate.yaml", how)
    both = [by_accelerate | told for told in told_by_a_launcher(free_port())]
    first, second = warm.together(arguments(chosen, tmp_path / "two"), both)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.err.count("FSDP: each of 2 processes keeps its part") == 1
    assert_trained_alike(tmp_path, alone)


def test_who_would_have_nothing_to_do_takes_an_idle_part_where_all_have_to_pass() -> None:
    parts = ["a", "b", "c"]
    apart = [Processes(rank, 2).mine(parts, "idle") for rank in range(2)]
    assert apart == [["a", "c"], ["b"]]
    together = [Processes(rank, 2, sharded=True).mine(parts, "idle") for rank in range(2)]
    assert together == [["a", "c"], ["b", "idle"]]


def test_the_end_of_another_process_is_said_and_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_tensor: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:28817")

    monkeypatch.setattr(torch.distributed, "all_reduce", gone)
    with pytest.raises(LoraRtError, match="another process of this run has ended") as caught:
        Processes(0, 2).summed(torch.zeros(1))
    assert "--resume" in str(caught.value.next_step)


@pytest.mark.slow
def test_fsdp_over_packed_weights_is_refused_before_a_base_is_loaded(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_rt.core.training.prepare.joined", lambda: Processes(0, 2, sharded=True))
    with pytest.raises(SettingsError, match="FSDP cuts weights of 16 or 32 bits, and those of int4 are packed"):
        prepare(settings(precision="int4"), load_modes())


def test_a_launcher_that_wants_other_shards_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("ACCELERATE_USE_DEEPSPEED", "true")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="DeepSpeed cuts the base"):
        processes.told.__wrapped__()
