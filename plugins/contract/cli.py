"""Options that commands share, ours and plugins': each has one name, one explanation and one check.

Not imported by the contract itself, since it needs typer.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from lora_rt.errors import UsageError
from lora_rt.plugins.contract.options import PRECISIONS as PRECISIONS
from lora_rt.plugins.contract.options import check_precision
from lora_rt.plugins.contract.options import known_device as known_device


def _temperature(value: float) -> float:
    if not 0 <= value < 100:
        text = f"temperature is {value:g}; it must be from 0 (greedy) to below 100"
        raise UsageError(text, next_step="Use 0.7, for instance, or 0 for the likeliest token each time")
    return value


Base = Annotated[str, typer.Option("--base", help='"default", a folder, a .gguf file, or a hub id\\[@revision].')]
Precision = Annotated[
    str, typer.Option("--precision", callback=check_precision, help="float32, bfloat16, float16, int8 or int4.")
]
Device = Annotated[str, typer.Option("--device", callback=known_device, help="auto, cpu, cuda or cuda:N.")]
JSON_HELP = "Print one JSON document on standard output, and nothing else."
Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]

ALLOW_BASE_MISMATCH = "Use adapters that state another base, if their shapes fit."
AllowBaseMismatch = Annotated[bool, typer.Option("--allow-base-mismatch", help=ALLOW_BASE_MISMATCH)]

# How a prompt is put to the base.
TemplateVar = Annotated[
    list[str] | None,
    typer.Option(
        "--template-var",
        metavar="KEY=VALUE",
        help="Set a variable of the chat template: enable_thinking=false. Repeatable.",
    ),
]
SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--special-tokens", help="Read <|im_end|> and the like in texts as control tokens; otherwise they are text."
    ),
]

# How an answer is chosen.
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", callback=_temperature, help="How freely tokens are drawn; 0 takes the likeliest one each time."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", min=0, max=1, help="Draw among the likeliest tokens that make up this share of the probability."
    ),
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw among this many of the likeliest tokens; 0 is off.")]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", min=0, help="Make tokens that the answer has used less likely; 1 is off."),
]


@dataclasses.dataclass(frozen=True)
class OverBase:
    """The options of every command that loads a base; as an argument of a command they are options of it: `spread`."""

    base: Base = "default"
    precision: Precision = "int4"
    device: Device = "auto"
    allow_base_mismatch: AllowBaseMismatch = False
    template_var: TemplateVar = None
    special_tokens: SpecialTokens = False


def spread(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command of which one argument is a dataclass of options, as typer takes it: with these options one by one.

    def speak(text: str, over: OverBase, as_json: Json = False) -> None: ...

    app.command()(spread(speak))
    """
    hints = get_type_hints(command, include_extras=True)
    own = dict(inspect.signature(command).parameters)
    (group,) = (name for name in own if dataclasses.is_dataclass(hints.get(name)))
    fields = {field.name: field.default for field in dataclasses.fields(hints[group])}
    shared = get_type_hints(hints[group], include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, kind, default=default, annotation=shared[name]) for name, default in fields.items()
    ]
    mine = [parameter.replace(kind=kind, annotation=hints[name]) for name, parameter in own.items() if name != group]

    @functools.wraps(command)
    def spreading(**given: Any) -> Any:
        rest = {name: value for name, value in given.items() if name not in fields}
        return command(**rest, **{group: hints[group](**{name: given[name] for name in fields})})

    last = [parameter for parameter in mine if parameter.name == "as_json"]
    listed = [*(parameter for parameter in mine if parameter not in last), *options, *last]
    vars(spreading).pop("__wrapped__")
    vars(spreading)["__signature__"] = inspect.Signature(listed)
    spreading.__annotations__ = {parameter.name: parameter.annotation for parameter in listed}
    return spreading
