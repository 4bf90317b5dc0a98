"""Tests for a mode, by its author. Needs pytest, and neither a network nor a real base.

One line in a test file makes a class of tests that every mode has to pass: that it loads, trains a step, is saved and
read back, that a row of a batch equals the row alone, that decoding with a cache equals one pass over the whole text,
and that mistakes of its user are explained:

    from lora_rt.plugins.testing import conformance

    TestFadeIn = conformance("fade-in", options={"tokens": "4"}, static_at_start=False)

`conformance` takes the name of an installed mode, or the module itself. What the class is made of can be used alone:
`host_of(module)` (the loaded modes, with yours among them), `tiny_base(folder)` (a random Llama of two layers), and
`gate_context`, `compose_context`, `scene_context` and `objective_context` (what the hooks receive). The fixtures in
`lora_rt.plugins.testing.fixtures` come with `pytest_plugins = ["lora_rt.plugins.testing.fixtures"]` in a conftest.py.
"""

import pytest

pytest.register_assert_rewrite("lora_rt.plugins.testing.conformance")

from lora_rt.plugins.testing.conformance import Conformance, conformance  # noqa: E402  # after the rewrite is asked for
from lora_rt.plugins.testing.contexts import (  # noqa: E402
    base_facts,
    compose_context,
    gate_context,
    objective_context,
    scene_context,
)
from lora_rt.plugins.testing.hosts import InlinePoint, host_of  # noqa: E402
from lora_rt.plugins.testing.tiny import tiny_base  # noqa: E402

__all__ = [
    "Conformance",
    "InlinePoint",
    "base_facts",
    "compose_context",
    "conformance",
    "gate_context",
    "host_of",
    "objective_context",
    "scene_context",
    "tiny_base",
]
