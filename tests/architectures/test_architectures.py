"""A dozen architectures of other kinds, tiny and random, against PEFT's own model with its tensors in memory."""

from __future__ import annotations

import pytest

from support.architectures.checks import findings

pytestmark = pytest.mark.slow

KINDS = (
    "minicpm3",  # latent attention, whose layers get (rows, 1, tokens, n)
    "gpt_bigcode",  # one projection for queries, keys and values
    "mpt",
    "mamba",  # no attention
    "recurrent_gemma",  # a recurrence that padding would enter
    "mixtral",  # fused experts, and a router that is a parameter
    "bart",  # positions that can't be given
)
CHECKS = ("load", "all-linear", "attention", "mixed rows", "left padding", "generate", "text")


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_computes_what_peft_computes(kind: str) -> None:
    found = list(findings(kind, CHECKS))
    assert [one for one in found if one.result not in ("exact", "not by PEFT")] == []
    assert any(one.result == "exact" for one in found)
