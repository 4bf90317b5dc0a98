"""Whether an adapter belongs to the base in use: digests decide, names are hints."""

from __future__ import annotations

import pytest

from lora_rt.registry.bases import BaseIdentity, base_problems

ONE, OTHER = "1" * 64, "2" * 64


def base(name: str, digest: str = "") -> BaseIdentity:
    return BaseIdentity(name, None, digest)


def test_two_folders_of_one_name_are_two_bases() -> None:
    problems = base_problems(base("model", ONE), None, base("model", OTHER))
    assert len(problems) == 1
    assert ONE[:12] in problems[0]
    assert OTHER[:12] in problems[0]
    assert "--allow-base-mismatch" in problems[0]


def test_one_digest_is_one_base_whatever_it_is_called() -> None:
    assert base_problems(base("org/model", ONE), None, base("copy", ONE)) == []
    assert base_problems(base("org/model", ONE), None, base("org/other", ONE)) == []


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "unsloth/llama-3.1-8b-instruct-bnb-4bit",
        "unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit",
        "RedHatAI/Llama-3.1-8B-Instruct-FP8",
        "RedHatAI/Llama-3.1-8B-Instruct-FP8-dynamic",
        "neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w8a8",
        "hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4",
        "someone/Meta-Llama-3.1-8B-Instruct-Q4_K_M-GGUF",
        "someone/meta-llama_Llama-3.1-8B-Instruct-4.0bpw-exl2",
        "nvidia/Llama-3.1-8B-Instruct-NVFP4",
        "mlx-community/Llama-3.1-8B-Instruct-4bit",
        "/home/someone/models/final",
        "./checkpoint-100",
        "",
    ],
)
def test_a_model_is_itself_under_the_names_that_its_republishers_gave_it(name: str) -> None:
    used = base("meta-llama/Llama-3.1-8B-Instruct", ONE)
    assert base_problems(None, name, used) == []
    assert base_problems(base(name), None, used) == []


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-3B-Instruct", "org/final"])
def test_another_model_of_the_hub_is_another_base(name: str) -> None:
    used = base("meta-llama/Llama-3.1-8B-Instruct", ONE)
    assert len(base_problems(None, name, used)) == 1
    assert len(base_problems(base(name), None, used)) == 1
    assert len(base_problems(base(used.id, OTHER), name, used)) == 1


def test_where_nothing_is_known_of_the_base_nothing_is_refused() -> None:
    assert base_problems(base("org/model", ONE), None, None) == []
    assert base_problems(None, None, base("org/model", ONE)) == []
