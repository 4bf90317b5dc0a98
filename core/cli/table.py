"""The table of commands: where each stands, and its line in the help.

Nothing is imported for a name: the help is written from this table, and a command's module is imported when the command
is called. So the modules of commands import what they need at their top; only torch and what stands on it is imported
later, inside the command, after whatever can be wrong with the input has been said.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer

COMMANDS = {
    "compose": "Answer a prompt with a weighted composition of registers, or chat with it.",
    "train": "Train an adapter on examples and keep it under the name REGISTER.",
    "eval": "Measure how well the base and compositions predict data sets: negative log-likelihood per response token.",
    "tune": "Learn the weights of a composition from examples, with base and adapters frozen.",
    "export": "Write a composition as one adapter for PEFT, vLLM, llama.cpp or Ollama, or as a merged model.",
    "convert": "Turn a pickled adapter, or one that changed its base, into a plain LoRA in safetensors.",
    "explain": "Show how much each register adds to the base, layer by layer.",
    "scene": "Show which scene types a text is recognized as, with the share of each.",
    "serve": "Serve OpenAI's API with compositions as models: every request its own, all in one batch.",
    "list": "List the adapters that can be used by name.",
    "show": "Show where an adapter or a named composition is and what it holds, or the layers of a base.",
    "pull": "Pull an adapter from the Hub, pinned to a full commit and checked before it is installed.",
    "push": "Push an adapter to the Hub together with a model card.",
    "search": "Search the Hub for adapters.",
    "rm": "Remove an adapter (for all bases) or a named composition from the store.",
    "verify": "Check that adapters and named compositions are sound, and unchanged since they were installed.",
    "lock": "Pin the project's adapters to full commits and the sha256 of each file, and its compositions.",
    "sync": "Install exactly the adapters and compositions of the lock; without --frozen, first bring it up to date.",
    "plugins": "List the installed plugins, and what is wrong with those that can't be used.",
    "install": "Install plugin packages with pip, and say which modes and adapters they brought.",
    "uninstall": "Uninstall plugin packages with pip, and say which modes and adapters went.",
    "bench": "Measure lora-rt beside the base alone, PEFT and llama.cpp: "
    "the same base, prompts and adapters, interleaved.",
    "plan": "Estimate the memory that a base takes, from its configuration alone: "
    "weights, adapters, KV cache, training.",
    "doctor": "Check versions, devices, the home, bases, plugins and adapters, and look for left-over files.",
}
"""Each command and the first sentence of its docstring, in the order of `--help`."""

PLACES = {
    "compose": "compose.command:compose",
    "eval": "eval:evaluate",
    "list": "list:list_adapters",
    "bench": "bench:commands",
}
"""Where those are that are not at `name:name`: a module within this package, and in it a function or a group."""


def load(name: str) -> Any:
    """The command, built: its module is imported now.

    Args:
        name: one of `COMMANDS`.
    """
    module_name, _, attribute = PLACES.get(name, f"{name}:{name}").partition(":")
    module = importlib.import_module(f"lora_rt.core.cli.{module_name}")
    found = getattr(module, attribute)
    built = typer.Typer(rich_markup_mode="rich", add_completion=False)
    if isinstance(found, typer.Typer):
        built.add_typer(found, name=name)
    else:
        built.command(name, context_settings=getattr(module, "SETTINGS", None))(found)
        built.callback()(lambda: None)  # with one command alone typer would make no group
    return typer.main.get_group(built).commands[name]
