"""lora-rt: one quantized base model, several LoRA registers composed over it, with weights that belong to the request.

    import lora_rt

    rt = lora_rt.Runtime.load("default", precision="int4")
    rt.generate(["rain, tin roof, unpaid bill"], "emotion:0.7 logic:0.3")

This is the whole public face. Names are imported on first use, so that `import lora_rt` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_rt.errors import LoraRtError
from lora_rt.version import __version__

if TYPE_CHECKING:
    from lora_rt.core.evaluation.matrix import TextLosses, ratio_interval, text_losses
    from lora_rt.core.export.run import Exporter, export
    from lora_rt.core.programs import evaluate, prepare, train, tune
    from lora_rt.core.requests.composition import Composition, Term
    from lora_rt.core.runtime import Runtime
    from lora_rt.core.step.settings import TrainSettings
    from lora_rt.plugins.modes.bridge.hyper import HyperBridge
    from lora_rt.registry.registry import Registry

__all__ = [
    "Composition",
    "Exporter",
    "HyperBridge",
    "LoraRtError",
    "Registry",
    "Runtime",
    "Term",
    "TextLosses",
    "TrainSettings",
    "__version__",
    "evaluate",
    "export",
    "prepare",
    "ratio_interval",
    "text_losses",
    "train",
    "tune",
]

_HOMES = {
    "Composition": "lora_rt.core.requests.composition",
    "Term": "lora_rt.core.requests.composition",
    "Exporter": "lora_rt.core.export.run",
    "HyperBridge": "lora_rt.plugins.modes.bridge.hyper",
    "Registry": "lora_rt.registry.registry",
    "Runtime": "lora_rt.core.runtime",
    "TextLosses": "lora_rt.core.evaluation.matrix",
    "TrainSettings": "lora_rt.core.step.settings",
    "evaluate": "lora_rt.core.programs",
    "export": "lora_rt.core.export.run",
    "prepare": "lora_rt.core.programs",
    "ratio_interval": "lora_rt.core.evaluation.matrix",
    "text_losses": "lora_rt.core.evaluation.matrix",
    "train": "lora_rt.core.programs",
    "tune": "lora_rt.core.programs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lora_rt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
