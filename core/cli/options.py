"""Options that several commands share: each has one name, one explanation and one check.

What a person typed wrong is a usage error (exit code 2), whatever part of lora-rt finds it: see `usage` of `failures`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_rt.core.base.choices import check_wish
from lora_rt.core.cli.console import printing_aside
from lora_rt.core.cli.failures import usage as usage
from lora_rt.core.cli.session import session
from lora_rt.core.requests.composition import Composition, quoted
from lora_rt.errors import UsageError
from lora_rt.plugins.contract import cli as contract
from lora_rt.plugins.contract.cli import Base as Base
from lora_rt.plugins.contract.cli import Device as Device
from lora_rt.plugins.contract.cli import Precision as Precision
from lora_rt.plugins.contract.cli import SpecialTokens as SpecialTokens
from lora_rt.plugins.contract.cli import Temperature as Temperature
from lora_rt.plugins.contract.cli import TemplateVar as TemplateVar
from lora_rt.plugins.contract.cli import TopK as TopK
from lora_rt.plugins.contract.cli import spread as spread
from lora_rt.registry.reference import is_path


def _alone(context: typer.Context, wanted: bool) -> bool:
    if wanted and not context.resilient_parsing:
        context.with_resource(printing_aside())
    return wanted


Json = Annotated[bool, typer.Option("--json", help=contract.JSON_HELP, callback=_alone)]


def source_of(given: Sequence[str] | None, option: str) -> Path | None:
    """The one source of data that an option names; of several the last would be taken, without a word.

    Raises:
        UsageError: there are several, or its name is empty.
    """
    if not given:
        return None
    if len(given) > 1:
        text = f"{option} is given {len(given)} times, and one source is read"
        raise UsageError(text, next_step="Put the files into a folder, and give that")
    if not given[0].strip():
        raise UsageError(f"{option} is empty", next_step="Give a file, a folder or a data set of the Hub")
    return Path(given[0])


def composition_of(specs: Sequence[str]) -> Composition:
    """The composition that the arguments spell.

    Raises:
        UsageError: naming every bad term.
    """
    return Composition.parse(" ".join(map(as_written, specs)))


def as_written(spec: str) -> str:
    """An argument as it stands in the text of a composition: there, the path of a folder with blanks is in quotes."""
    path, colon, weight = spec.rpartition(":")
    for folder, rest in ((spec, ""), (path, colon + weight)):
        if is_path(folder) and os.path.isdir(os.path.expanduser(folder)):
            return quoted(folder) + rest
    return spec


def mode_options(pairs: Sequence[str]) -> dict[str, str]:
    """What `--option KEY=VALUE` gave.

    Raises:
        UsageError: one is not of that form.
    """
    wrong = [pair for pair in pairs if not pair.partition("=")[0] or "=" not in pair]
    if wrong:
        raise UsageError(f"--option {wrong[0]!r} is not an option of a mode", next_step="Write it as KEY=VALUE")
    return {key: value for key, _, value in (pair.partition("=") for pair in pairs)}


def piped() -> str | None:
    """What is piped into the command, or None where a person sits at a terminal."""
    return None if sys.stdin.isatty() else sys.stdin.read().removesuffix("\n")


def text_format(template_var: Sequence[str] | None, special_tokens: bool, *texts: str) -> dict[str, Any]:
    """What `Runtime.load` is told of reading texts; the texts of the command line are looked at as well.

    Raises:
        UsageError: a variable without a value, or what is not Unicode.
    """
    from lora_rt.core.generation import messages, prompts

    with usage():
        for text in texts:
            messages.check_text(text, "the prompt")
        return {"template_variables": prompts.template_variables(template_var or ()), "special_tokens": special_tokens}


Normalize = Annotated[
    float | None,
    typer.Option("--normalize", metavar="S", help="Scale the weights down where the sum of |weight| is above S."),
]


def _adapter_names(incomplete: str) -> list[str]:
    """For the shell's completion: adapters and named compositions that are here."""
    from lora_rt.registry.registry import Registry

    registry = Registry()
    names = {item.name for item in registry.installed()} | set(registry.compositions.names())
    return sorted(name for name in names if name.startswith(incomplete))


def _allow_base_mismatch(allowed: bool) -> bool:
    """Told to the session, whose registry hands out the adapters."""
    if allowed:
        session().allow_base_mismatch = True
    return allowed


def _multiply(wish: str | None) -> str | None:
    """Told to the session, which loads the base."""
    with usage():
        session().multiply = check_wish(wish)
    return wish


Specs = Annotated[
    list[str],
    typer.Argument(
        metavar="SPEC",
        help="Adapters and weights, for instance emotion:0.7 logic:0.3.",
        autocompletion=_adapter_names,
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A name in the store.", autocompletion=_adapter_names)]
Scene = Annotated[
    str | None,
    typer.Option("--scene", help="The scene type, for modes that gate by it; recognized from the prompt if left out."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed gives the same result.")]
Offline = Annotated[bool, typer.Option("--offline", help="Make no request over the network.")]
AllowBaseMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", callback=_allow_base_mismatch, help=contract.ALLOW_BASE_MISMATCH)
]


@dataclasses.dataclass(frozen=True)
class OverBase(contract.OverBase):
    """The options of a command of ours that loads a base: see `spread`."""

    allow_base_mismatch: AllowBaseMismatch = False

    def text(self, *texts: str) -> dict[str, Any]:
        """`text_format` of these options."""
        return text_format(self.template_var, self.special_tokens, *texts)


Multiply = Annotated[
    str | None,
    typer.Option(
        "--multiply",
        callback=_multiply,
        help="How int4 and int8 are multiplied on a CPU: packed, dequantize, dense or auto (the fastest, the default).",
    ),
]
Data = Annotated[
    list[str], typer.Option("--data", metavar="DATA", help="Scene and text, or messages, or instruction and output.")
]

# How a prompt is put to the base.
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message before the prompt.")]

# How an answer is chosen.
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="The longest answer, in tokens.")]
