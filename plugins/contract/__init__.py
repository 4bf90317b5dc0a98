"""The contract between the runtime and a mode: hook specifications and the plain types that hooks receive and return.

Modes stand on this package alone. Nothing here imports torch at run time, so that a plugin loads in milliseconds; a
mode should do the same and import torch inside its hooks.
"""

from importlib import import_module
from typing import Any

from lora_rt.errors import LoraRtError, UsageError
from lora_rt.plugins.contract.composing import ComposeContext, Mixture, MixtureContext, TermFacts
from lora_rt.plugins.contract.facts import (
    AdapterView,
    BaseFacts,
    Registration,
    SceneContext,
    ScenePrediction,
    SceneType,
)
from lora_rt.plugins.contract.gating import Gate, GateContext, JointGateContext
from lora_rt.plugins.contract.hooks import LORA_RT_API, hookimpl, hookspec
from lora_rt.plugins.contract.objective import IGNORE, Encoded, Example, Objective, ObjectiveContext, SceneToText
from lora_rt.plugins.contract.options import OptionError, check_depth, read_options
from lora_rt.plugins.contract.services import AdapterFiles, Services

__all__ = [
    "IGNORE",
    "LORA_RT_API",
    "AdapterFiles",
    "AdapterView",
    "BaseFacts",
    "ComposeContext",
    "Encoded",
    "Example",
    "Gate",
    "GateContext",
    "JointGateContext",
    "LoraRtError",
    "Mixture",
    "MixtureContext",
    "Objective",
    "ObjectiveContext",
    "OptionError",
    "Registration",
    "SceneContext",
    "ScenePrediction",
    "SceneToText",
    "SceneType",
    "Services",
    "TermFacts",
    "UsageError",
    "check_depth",
    "hookimpl",
    "hookspec",
    "read_options",
]

_OF_THE_BRIDGE = ("DIRECTIONS", "Direction", "direction_of", "prompt_for")


def __getattr__(name: str) -> Any:
    """What stood here before the bridge had a home of its own; modes that were written then still find it."""
    if name not in _OF_THE_BRIDGE:
        raise AttributeError(f"module 'lora_rt.plugins.contract' has no attribute {name!r}")
    return getattr(import_module("lora_rt.plugins.modes.bridge.directions"), name)
