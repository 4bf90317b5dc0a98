"""The table of commands: where each stands, and its line in the help.

Nothing is imported for a name: the help is written from this table, and a command's module is imported when the command
is called. So the modules of commands import what they need at their top; only torch and what stands on it is imported
later, inside the command, after whatever can be wrong with the input has been said.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import typer


class Entry(NamedTuple):
    """One command of ours."""

    place: str
    """"module:name" within this package; the name is a function, or a typer application for a group of commands."""
    help: str
    """The first sentence of the function's docstring."""


COMMANDS = {
    "compose": Entry("compose.command:compose", "Let a weighted composition of registers speak."),
    "train": Entry("train:train", "Train an adapter for REGISTER on JSON lines and publish it with its card."),
    "eval": Entry(
        "eval:evaluate",
        "Mean negative log-likelihood per response token of every data set, under the base and every composition.",
    ),
    "tune": Entry("tune:tune", "Learn from examples how much each adapter should say, with base and adapters frozen."),
    "export": Entry(
        "export:export",
        "Write a composition as one adapter for PEFT, vLLM, llama.cpp or Ollama, or as a merged model.",
    ),
    "convert": Entry(
        "convert:convert", "Make a plain LoRA in safetensors of a pickle, or of an adapter that changed its base."
    ),
    "explain": Entry("explain.command:explain", "Show how much each register adds to the base, layer by layer."),
    "scene": Entry("scene:scene", "Show the distribution over scene types that the gates would see."),
    "serve": Entry(
        "serve:serve",
        "Serve OpenAI's API, in which `model` is a composition: every request its own, all in one batch.",
    ),
    "list": Entry("list:list_adapters", "List the adapters that can be used by name."),
    "show": Entry(
        "show:show",
        "Show an adapter or a named composition, where it is and what it holds; or what a base has for adapters.",
    ),
    "pull": Entry(
        "pull:pull",
        "Pull an adapter from the Hub, pinned to a full commit and checked before it is installed.",
    ),
    "push": Entry("push:push", "Push an adapter to the Hub together with a model card."),
    "search": Entry("search:search", "Search the Hub for adapters."),
    "rm": Entry("rm:rm", "Remove an adapter, for all bases, or a named composition from the store."),
    "verify": Entry(
        "verify:verify",
        "Check files against their digests, adapters against the whole check, compositions against their adapters.",
    ),
    "lock": Entry(
        "lock:lock",
        "Pin every adapter of the project to a full commit and the sha256 of each file, and its compositions.",
    ),
    "sync": Entry(
        "sync:sync",
        "Install exactly the adapters and compositions of the lock; without --frozen, first bring it up to date.",
    ),
    "plugins": Entry("plugins:plugins", "List the installed modes and what became of them."),
    "install": Entry(
        "install:install", "Install plugin packages with pip, and say which modes and adapters they brought."
    ),
    "uninstall": Entry(
        "uninstall:uninstall", "Uninstall plugin packages with pip, and say which modes and adapters went."
    ),
    "bench": Entry(
        "bench:commands",
        "Measure lora-rt beside the base alone, PEFT and llama.cpp: the same base, prompts and adapters, interleaved.",
    ),
    "plan": Entry(
        "plan:plan",
        "Estimate the memory that a base takes, from its configuration alone: weights, adapters, KV cache, training.",
    ),
    "doctor": Entry("doctor:doctor", "Look at versions, devices, the home, bases, plugins, adapters and left-overs."),
}
"""In the order of `--help`."""


def load(name: str) -> Any:
    """The command, built: its module is imported now.

    Args:
        name: one of `COMMANDS`.
    """
    module_name, _, attribute = COMMANDS[name].place.partition(":")
    module = importlib.import_module(f"lora_rt.core.cli.{module_name}")
    found = getattr(module, attribute)
    built = typer.Typer(rich_markup_mode="rich", add_completion=False)
    if isinstance(found, typer.Typer):
        built.add_typer(found, name=name)
    else:
        built.command(name, context_settings=getattr(module, "SETTINGS", None))(found)
        built.callback()(lambda: None)  # with one command alone typer would make no group
    return typer.main.get_group(built).commands[name]
