"""The root of every error that lora-rt raises.

An error is data plus a next step: `message` says what is wrong in one line, `next_step` what to do or type, and
`problems` lists everything that was found wrong when there is more than one thing.
"""

from __future__ import annotations

from collections.abc import Sequence


class LoraRtError(Exception):
    """A refusal or failure that is explained.

    Args:
        message: one line, no full stop at the end.
        next_step: what the reader can do about it, an imperative sentence or a command; empty if there is nothing.
        problems: every single finding, where the check found several.
    """

    def __init__(self, message: str, *, next_step: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.problems = tuple(problems)

    def __str__(self) -> str:
        text = self.message
        if self.next_step:
            text = f"{text}{'' if text.endswith(('?', '.', '!')) else '.'} {self.next_step}"
        return "\n".join([text, *(f"  - {problem}" for problem in self.problems if problem not in self.message)])

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments: without this, an error that crosses a process boundary would lose its next step.
        return (_rebuild, (type(self), self.message, self.next_step, self.problems))


class UsageError(LoraRtError):
    """What a person typed makes no sense, whatever this machine holds: the command line ends with 2, not with 1."""


class SettingsError(LoraRtError):
    """A setting of a run that makes no sense, or does not fit the model."""


def _rebuild(kind: type[LoraRtError], message: str, next_step: str, problems: tuple[str, ...]) -> LoraRtError:
    return kind(message, next_step=next_step, problems=problems)
