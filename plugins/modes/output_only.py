"""output-only: scene -> text. The adapter learns to speak; at inference its weight is the user's, its gate always 1.

The objective: the scene is the user's message through the base's chat template, the text is the answer, and only the
answer's tokens (with the end of turn) carry loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_rt.plugins.contract import Objective, ObjectiveContext, SceneToText, hookimpl, read_options

LORA_RT_API = 1
LORA_RT_FIELDS = ("scene", "text")


@dataclass(frozen=True)
class Options:
    """There are none: an option that is given is a mistake, and is answered as one."""


@hookimpl
def lora_rt_objective(context: ObjectiveContext) -> Objective:
    """The objective of one output-only training run."""
    read_options(context.options, Options)
    return SceneToText(context)
