"""Fits the composition `registers` over the four adapters that ship, as it ships, into registry/shipped/registers.

Its gates are fitted over a float32 base, where a step is fastest on most processors; they do not depend on the
precision. Its classifier does: four bits shift the states that it reads, so it is fitted over int4, where most will use
it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from data import make
from report import uniform
from safetensors.torch import load, save

import lora_rt
from lora_rt import Registry

SHIPPED = Path(__file__).parents[2] / "registry" / "shipped" / "registers"
EPOCHS = {"float32": 0.3, "int4": 0.01}


def fit(name: str, data: Path, seed: int = 0) -> None:
    """Keep the composition under a name in the store; `data` is the folder that data.py makes."""
    compositions = Registry().compositions
    found, states = {}, {}
    for precision, epochs in EPOCHS.items():
        fitted: Any = lora_rt.tune(
            uniform(0.25), data / "prompts.jsonl", prompts=data / "everyday.jsonl", per="scene",
            name=f"{name}-{precision}", precision=precision, epochs=epochs, learning_rate=0.12, seed=seed,
        )  # fmt: skip
        found[precision], states[precision] = fitted, load(compositions.state(fitted))
        compositions.remove(fitted.name)
    state = save({**states["float32"], "registrar": states["int4"]["registrar"]})
    metrics = {**found["float32"].metrics, "registered": found["int4"].metrics["registered"]}
    told = {"name": name, "metrics": metrics, "state": hashlib.sha256(state).hexdigest()}
    compositions.save(found["float32"].model_copy(update=told), state)


def main() -> None:
    """Fit it and put it where the package has it."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    compositions = Registry().compositions
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        fit("registers", Path(scratch))
    found = compositions.own("registers")
    assert found is not None
    SHIPPED.mkdir(parents=True, exist_ok=True)
    (SHIPPED / "mode.safetensors").write_bytes(compositions.state(found))
    (SHIPPED / "composition.json").write_text(json.dumps(found.document(), indent=2) + "\n")
    compositions.remove("registers")


if __name__ == "__main__":
    main()
