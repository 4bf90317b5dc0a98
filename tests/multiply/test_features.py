"""Where a processor has what a kernel needs, the kernel is there.

One that gives what it should not, or does not compile, is passed over, and its tests leave themselves out.
"""

from __future__ import annotations

import pytest

from lora_rt.core.engine import tiled_factors
from lora_rt.core.multiply import four_bit, many, tiled
from support.features import lacks

pytestmark = pytest.mark.slow
binding = pytest.importorskip("llvmlite.binding")


def test_a_processor_with_avx2_multiplies_weights_in_four_bits() -> None:
    features = binding.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma")):
        pytest.skip(lacks("AVX2"))
    assert four_bit.are_there()


def test_a_processor_with_tiles_multiplies_by_them() -> None:
    if not four_bit.could_be_tiles():  # it may have them, and the system not let this process use them
        pytest.skip(lacks("AMX"))
    assert tiled.are_there()
    assert tiled_factors.are_there()
    assert many.are_there()
    assert many.are_there(dense=True)
