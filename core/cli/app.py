"""The typer application: the table of commands, and how a failure of any of them ends."""

from __future__ import annotations

import logging
import os
import sys

import typer

from lora_rt.core.cli import (
    bench,
    bridge,
    compose,
    doctor,
    export,
    install,
    lock,
    plan,
    plugins,
    pull,
    push,
    rm,
    scene,
    search,
    show,
    sync,
    train,
    tune,
    uninstall,
    verify,
)
from lora_rt.core.cli import eval as eval_command
from lora_rt.core.cli import explain as explain_command
from lora_rt.core.cli import list as list_command
from lora_rt.core.cli.failures import explain
from lora_rt.core.cli.plugin_commands import CommandGroup

app = typer.Typer(
    name="lora-rt",
    cls=CommandGroup,
    help="One quantized base model, several LoRA registers composed over it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# One line per command, in the order of --help; each command lives in the file of its name.
app.command("compose")(compose.compose)
app.command("train")(train.train)
app.command("eval")(eval_command.evaluate)
app.command("tune")(tune.tune)
app.command("export")(export.export)
app.command("explain")(explain_command.explain)
app.command("scene")(scene.scene)
app.add_typer(bridge.app, name="bridge")
app.command("list")(list_command.list_adapters)
app.command("show")(show.show)
app.command("pull")(pull.pull)
app.command("push")(push.push)
app.command("search")(search.search)
app.command("rm")(rm.rm)
app.command("verify")(verify.verify)
app.command("lock")(lock.lock)
app.command("sync")(sync.sync)
app.command("plugins")(plugins.plugins)
app.command("install", context_settings=install.SETTINGS)(install.install)
app.command("uninstall")(uninstall.uninstall)
app.command("bench")(bench.bench)
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
    if version:
        from lora_rt.version import __version__

        typer.echo(f"lora-rt {__version__}")
        raise typer.Exit


def run() -> None:
    """Run the command line and exit: 0 success, 1 an explained failure, 2 usage."""
    # The Hub's client speaks of every retry; what came of them is our line to say.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # bitsandbytes hands functions to torch.compile while it is imported, which costs a second and is never used here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # pydantic and torch look through all installed packages for plugins of theirs, and fail with a damaged one; here
    # none of those is used.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    if sys.stdout is None:  # closed by the caller (`>&-`): what is printed goes nowhere
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        app()
    except BaseException as error:
        code = explain(error)
        if code is None:
            raise
        sys.exit(code)
