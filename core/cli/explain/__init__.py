"""`lora-rt explain`: which register acted where, as a heat map in the terminal, as JSON, and as a picture."""

from lora_rt.core.cli.explain.command import explain

__all__ = ["explain"]
