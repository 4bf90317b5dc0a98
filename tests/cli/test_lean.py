"""What a command that speaks imports, and that the rest of an application's world stays as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from support.cli import Cli
from support.tiny import Zoo

pytestmark = pytest.mark.slow  # the quick tests themselves import as lean as that

NEEDLESS = (
    "torch._dynamo.eval_frame", "torch._inductor.compile_fx", "torch.distributed.tensor", "torch.distributed.fsdp",
    "torch.onnx", "networkx", "peft", "scipy", "sklearn", "pandas",
    "transformers.trainer", "transformers.modeling_gguf_pytorch_utils", "gguf", "matplotlib", "fastapi",
)  # fmt: skip

AFTERWARDS = f"""
import sys
import lora_rt.core.cli
try:
    lora_rt.core.cli.main()
except SystemExit as end:
    print("CODE", end.code, "NEEDLESS", sorted(set({NEEDLESS!r}) & set(sys.modules)))
import torch, transformers.masking_utils
assert torch.compile.__module__ == "torch" and torch.distributed.is_available()
assert transformers.masking_utils.TransformGetItemToIndex().__module__.startswith("torch._dynamo.")
assert torch._dynamo.is_compiling() is False
import torch._dynamo.config
print("COMPILER", torch._dynamo.eval_frame.__name__, sys.modules["torch._dynamo"].__spec__.name)
"""


def test_a_second_answer_imports_no_compiler_and_nothing_for_many_processes_until_asked_for(cli: Cli, zoo: Zoo) -> None:
    options = ["-p", "ab", "--base", str(zoo.base("llama")), "--precision", "int4", "--max-new-tokens", "2"]
    asked = ["compose", str(zoo.adapter("llama", seed=1)), *options]
    assert cli(*asked).code == 0
    done = subprocess.run([sys.executable, "-c", AFTERWARDS, *asked], capture_output=True, text=True, check=False)
    assert "CODE 0 NEEDLESS []" in done.stdout, done.stdout + done.stderr
    assert "COMPILER torch._dynamo.eval_frame torch._dynamo" in done.stdout, done.stderr


def test_a_command_that_an_application_calls_leaves_its_libraries_alone(cli: Cli, zoo: Zoo) -> None:
    options = ["--base", str(zoo.base("llama")), "--precision", "float32", "--max-new-tokens", "2"]
    assert cli("compose", str(zoo.adapter("llama", seed=1)), "-p", "ab", *options).code == 0
    from transformers.utils import is_torch_distributed_available

    assert is_torch_distributed_available() is torch.distributed.is_available()
    assert "Later" not in type(sys.modules.get("torch._dynamo")).__name__
