"""What an export raises."""

from __future__ import annotations

from lora_rt.errors import LoraRtError


class ExportError(LoraRtError):
    """A composition that has no equivalent in the wanted format."""
