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

import pytest
import torch
from safetensors.torch import load_file

from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.core.training import processes
from lora_rt.core.training.prepare import prepare
from lora_rt.core.training.processes import Processes
from lora_rt.core.training.run import train
from lora_rt.plugins.manager import load_modes

Make = Callable[..., TrainSettings]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--cpu"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]


def command(settings: TrainSettings, out: Path, port: int, *further: str) -> list[str]:
    given = ["--data", str(settings.data), "--base", settings.base, "--precision", "float32", "--r", "4"]
    given += ["--alpha", "8", "--lr", "0.02", "--epochs", str(settings.epochs), "--batch-size", "4", "--dropout", "0"]
    whole = [*LAUNCH, "--main_process_port", str(port), "-m", "lora_rt", "train", "letters"]
    return [*whole, *given, "--out", str(out), *further]


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_train_the_adapter_that_one_trains(settings: Make, tmp_path: Path) -> None:
    chosen = settings(dropout=0.0)
    alone = train(chosen, load_modes(), tmp_path / "one")
    done = subprocess.run(command(chosen, tmp_path / "two", free_port()), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained ") == 1
    card = json.loads((tmp_path / "two" / "register.json").read_text())
    for name, loss in (("held_out_nll_before", alone.loss_before), ("held_out_nll_after", alone.loss_after)):
        assert card["metrics"][name] == pytest.approx(loss, abs=1e-3)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[key].float(), two[key].float(), atol=2e-2) for key in one)
    # And what only one of them can get wrong is said once.
    wrong = subprocess.run(
        command(chosen, tmp_path / "two", free_port(), "--early-stop", "0"), capture_output=True, text=True, check=False
    )
    assert wrong.returncode != 0
    assert wrong.stderr.count("early stop is 0") == 1


@pytest.mark.slow
def test_ctrl_c_leaves_one_checkpoint_from_which_two_processes_go_on(settings: Make, tmp_path: Path) -> None:
    chosen = settings(dropout=0.0, epochs=40)
    given = command(chosen, tmp_path / "two", free_port())
    with subprocess.Popen(given, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if re.match(r"step \d+/", line):
                os.killpg(run.pid, signal.SIGINT)
                break
        said = run.stderr.read()
    assert run.returncode != 0
    assert said.count("the checkpoint is kept") == 1
    assert not (tmp_path / "two").exists()
    again = command(chosen, tmp_path / "two", free_port(), "--resume")
    done = subprocess.run(again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "240 steps" in done.stdout
    assert "step 24/240" not in done.stderr


@pytest.mark.slow
def test_fsdp_from_a_file_of_accelerate_trains_the_adapter_that_one_process_trains(
    settings: Make, tmp_path: Path
) -> None:
    chosen = settings(dropout=0.0, epochs=1)
    alone = train(chosen, load_modes(), tmp_path / "one")
    file = tmp_path / "accelerate.yaml"
    how = {"distributed_type": "FSDP", "use_cpu": True, "num_processes": 2, "num_machines": 1, "machine_rank": 0}
    how |= {"mixed_precision": "no", "fsdp_config": {"fsdp_version": 2}, "main_process_port": free_port()}
    file.write_text(json.dumps(how))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    given = command(chosen, tmp_path / "two", 0)[len(LAUNCH) + 2 :]
    done = subprocess.run([*launch, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("FSDP: each of 2 processes keeps its part") == 1
    card = json.loads((tmp_path / "two" / "register.json").read_text())
    for name, loss in (("held_out_nll_before", alone.loss_before), ("held_out_nll_after", alone.loss_after)):
        assert card["metrics"][name] == pytest.approx(loss, abs=1e-3)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key].float(), two[key].float(), atol=2e-2) for key in one)


def test_who_would_have_nothing_to_do_takes_an_idle_part_where_all_have_to_pass() -> None:
    parts = ["a", "b", "c"]
    apart = [Processes(rank, 2).mine(parts, "idle") for rank in range(2)]
    assert apart == [["a", "c"], ["b"]]
    together = [Processes(rank, 2, sharded=True).mine(parts, "idle") for rank in range(2)]
    assert together == [["a", "c"], ["b", "idle"]]


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
