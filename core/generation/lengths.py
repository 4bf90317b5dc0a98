"""More tokens than a model takes, whichever engine counts them: known without torch."""

from __future__ import annotations

from lora_rt.errors import LoraRtError


class LengthError(LoraRtError):
    """More tokens than the model's context holds."""
