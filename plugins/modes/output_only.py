"""output-only: scene -> text. The adapter learns to speak; at inference its weight is the user's, its gate always 1.

The objective: the scene is the user's message through the base's chat template, the text is the answer, and only the
answer's tokens (with the end of turn) carry loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_rt.plugins.contract import IGNORE, Encoded, Example, Objective, ObjectiveContext, hookimpl, read_options

LORA_RT_API = 1


@dataclass(frozen=True)
class Options:
    """There are none: an option that is given is a mistake, and is answered as one."""


class SceneToText(Objective):
    """Cross entropy of the text's tokens, given the scene."""

    fields = ("scene", "text")

    def __init__(self, context: ObjectiveContext) -> None:
        self.context = context

    def encode(self, example: Example) -> list[Encoded]:
        """One sequence: prompt(scene) + text, loss on the text alone."""
        prompt = self.context.prompt_ids(example["scene"])
        answer = self.context.answer_ids(example["text"])
        return [Encoded(input_ids=[*prompt, *answer], labels=[IGNORE] * len(prompt) + answer)]


@hookimpl
def lora_rt_objective(context: ObjectiveContext) -> Objective:
    """The objective of one output-only training run."""
    read_options(context.options, Options)
    return SceneToText(context)
