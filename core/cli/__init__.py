"""The command line, one file per command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations


def main() -> None:
    """Entry point of `lora-rt`."""
    from lora_rt.core.cli import app, lean

    lean.process_is_ours = True
    app.run()
