"""`lora-rt bridge`: scene <-> text from the command line."""

from lora_rt.core.cli.bridge.commands import app

__all__ = ["app"]
