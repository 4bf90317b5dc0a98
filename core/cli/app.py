"""The typer application: our commands and those of plugins, and how a failure of any of them ends."""

from __future__ import annotations

import os
import sys

import typer

from lora_rt.core.base.progress import plain_wanted
from lora_rt.core.base.silence import silence_this_process
from lora_rt.core.cli.console import hear_notes
from lora_rt.core.cli.failures import explain
from lora_rt.core.cli.group import CommandGroup
from lora_rt.version import __version__

app = typer.Typer(
    name="lora-rt",
    cls=CommandGroup,
    help="One quantized base model, several LoRA registers composed over it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"lora-rt {__version__}")
        raise typer.Exit


def run() -> None:
    """Run the command line and exit: 0 success, 1 an explained failure, 2 usage."""
    # Xet's transfers do not go through Python, where the Hub's other requests get their limits.
    for name, value in (("CONNECT_TIMEOUT", "10s"), ("READ_TIMEOUT", "30s"), ("RETRY_MAX_DURATION", "60s")):
        os.environ.setdefault(f"HF_XET_CLIENT_{name}", value)
    # bitsandbytes hands functions to torch.compile while it is imported, which costs a second and is never used here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # pydantic and torch look through all installed packages for plugins of theirs, and fail with a damaged one; here
    # none of those is used.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    if sys.stdout is None:  # closed by the caller (`>&-`): what is printed goes nowhere
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.argv[1:2] and sys.argv[1] in ("--show-completion", "--install-completion") and sys.argv[2:]:
        # Typer takes the shell that it finds itself in, unless it is told not to look; then it takes the one named.
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    if plain_wanted():
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # the help has a console of its own
    silence_this_process()
    hear_notes()
    try:
        code = app(prog_name="lora-rt", standalone_mode=False)  # what goes wrong comes here, to be said in one way
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit:
        raise
    except BaseException as error:
        code = explain(error)
        if code is None:
            raise
        sys.exit(code)
