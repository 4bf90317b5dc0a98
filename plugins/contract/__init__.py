"""The contract between the runtime and a mode: hook specifications and the plain types that hooks receive and return.

Modes stand on this package alone. Nothing here imports torch at run time, so that a plugin loads in milliseconds; a
mode should do the same and import torch inside its hooks.
"""

from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract.composing import ComposeContext, TermFacts
from lora_rt.plugins.contract.directions import DIRECTIONS, Direction, direction_of, prompt_for
from lora_rt.plugins.contract.facts import BaseFacts, SceneType
from lora_rt.plugins.contract.gating import Gate, GateContext
from lora_rt.plugins.contract.hooks import LORA_RT_API, hookimpl, hookspec
from lora_rt.plugins.contract.objective import IGNORE, Encoded, Example, Objective, ObjectiveContext
from lora_rt.plugins.contract.options import OptionError, read_options
from lora_rt.plugins.contract.scenes import Registration, SceneContext, ScenePrediction

__all__ = [
    "DIRECTIONS",
    "IGNORE",
    "LORA_RT_API",
    "BaseFacts",
    "ComposeContext",
    "Direction",
    "Encoded",
    "Example",
    "Gate",
    "GateContext",
    "LoraRtError",
    "Objective",
    "ObjectiveContext",
    "OptionError",
    "Registration",
    "SceneContext",
    "ScenePrediction",
    "SceneType",
    "TermFacts",
    "direction_of",
    "hookimpl",
    "hookspec",
    "prompt_for",
    "read_options",
]
