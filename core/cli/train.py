"""`lora-rt train`: trains one adapter and puts it into the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lora_rt.core.base.choices import check_device
from lora_rt.core.base.configuration import check_base
from lora_rt.core.base.identity import identify_base
from lora_rt.core.cli import options
from lora_rt.core.cli.console import compose_hint, err
from lora_rt.core.cli.console import out as console
from lora_rt.core.cli.session import session, starting
from lora_rt.core.step.runfile import read_run, written
from lora_rt.core.step.settings import TrainSettings, check_targets
from lora_rt.core.training.data import read_pairs
from lora_rt.core.training.destination import Destination
from lora_rt.core.training.processes import speaking_once
from lora_rt.core.training.run import train as run
from lora_rt.errors import LoraRtError, UsageError
from lora_rt.plugins.manager.record import OURS
from lora_rt.registry.records import Record, read
from lora_rt.registry.registry import Registry

if TYPE_CHECKING:
    from lora_rt.core.training.prepare import Prepared
    from lora_rt.core.training.rehearsal import Rehearsal
    from lora_rt.core.training.run import TrainResult


def train(
    context: typer.Context,
    register: Annotated[
        str | None,
        typer.Argument(metavar="REGISTER", help="The register that the adapter is to express; also its name."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="DATA", help="JSON lines, a list, Parquet, a folder of them, or a data set."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="RUN.yaml", help="Options from a file, or from an adapter's register.json."),
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="What the adapter is trained for; lora-rt plugins lists the modes.")
    ] = "output-only",
    held_out: Annotated[
        list[str] | None,
        typer.Option("--held-out", metavar="DATA", help="Examples to measure on; a tenth of the data if left out."),
    ] = None,
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    r: Annotated[int, typer.Option("--r", help="Rank.")] = 16,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Scale: what the adapter adds is multiplied by alpha/r.")
    ] = 32,
    target_modules: Annotated[
        str, typer.Option("--target-modules", help="Layer names, roles (attention, mlp) or all-linear.")
    ] = "q_proj,v_proj",
    dropout: Annotated[
        float, typer.Option("--dropout", help="Share of an adapter's inputs that training leaves out at random.")
    ] = 0.05,
    learning_rate: Annotated[float, typer.Option("--lr", help="Peak learning rate of a cosine schedule.")] = 1e-3,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 3,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences per step.")] = 8,
    accumulation: Annotated[
        int | None,
        typer.Option(
            "--accumulation", help="Run a step's sequences in this many parts; picked by the free memory if left out."
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Compute activations twice instead of keeping them; picked by the free memory.",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            "--optimizer", help="adamw or paged-adamw-8bit; if left out, the latter on CUDA and the former elsewhere."
        ),
    ] = None,
    seed: options.Seed = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the mode; may be given several times."),
    ] = None,
    scene_types: Annotated[
        str, typer.Option("--scene-types", help="Scene types the adapter is for, comma-separated.")
    ] = "",
    template_var: options.TemplateVar = None,
    special_tokens: options.SpecialTokens = False,
    licence: Annotated[str, typer.Option("--licence", help="The adapter's licence, e.g. Apache-2.0.")] = "",
    early_stop: Annotated[
        int | None,
        typer.Option(
            "--early-stop", help="End after this many epochs without a better held-out loss; the best one is kept."
        ),
    ] = None,
    log_to: Annotated[
        str, typer.Option("--log-to", help="tensorboard, wandb or trackio; several, comma-separated.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show tokens, steps, memory and time; train nothing, write nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the same run.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Put the adapter there instead of into the store.")
    ] = None,
) -> None:
    """Train an adapter on examples and keep it under the name REGISTER."""
    given: dict[str, Any] = dict(locals())  # the settings have the names of their options, but those that differ below
    for name in ("context", "config", "option", "template_var"):
        del given[name]
    given |= {
        "data": options.source_of(data, "--data"),
        "held_out": options.source_of(held_out, "--held-out"),
        "target_modules": tuple(_words(target_modules)),
        "options": options.mode_options(option or []),
        "scene_types": tuple(_words(scene_types)),
        "log_to": tuple(_words(log_to)),
        **options.text_format(template_var, special_tokens),
    }
    with speaking_once():
        _train(given, config, context)


def _train(given: dict[str, Any], config: Path | None, context: typer.Context) -> None:
    with _all_at_once() as attempt:
        if config is not None:
            given |= _of_file(config, context, attempt)
        out, resume, dry_run = (given.pop(name) for name in ("out", "resume", "dry_run"))
        _check(given, out, attempt)
    settings = TrainSettings(**given)
    with starting():
        from lora_rt.core.training.rehearsal import rehearse

    def show(prepared: Prepared) -> None:
        if config is not None or dry_run:
            further = {"out": out, "resume": resume}
            err.print(escape(written(prepared.resolved, **further).rstrip()), highlight=False, soft_wrap=True)

    if dry_run:
        _report_rehearsal(rehearse(settings, session().modes, show))
    else:
        if out is None:
            _say_what_goes(settings.register, settings.base)
        _report(run(settings, out=out, resume=resume, ready=show), settings, out)


def _say_what_goes(name: str, base: str) -> None:
    """An adapter of that name and base is replaced at the end of a run, which whoever reads this may still stop."""
    registry, own = session().registry, identify_base(base).id
    records = [read(path) for path in registry.store.records.paths_of(name)]
    if not any(isinstance(record, Record) and record.base in (None, "", own) for record in records):
        return
    users = registry.compositions.with_adapter(name)
    broken = f"; compositions that were tuned with it have to be tuned anew: {', '.join(users)}" if users else ""
    err.print(f"{escape(name)} is in the store already, and will be replaced{escape(broken)}", soft_wrap=True)


Attempt = Callable[[Callable[[], object]], None]


@contextmanager
def _all_at_once() -> Iterator[Attempt]:
    """Gives what runs a check and keeps its refusal; at the end one error tells them all.

    Raises:
        LoraRtError: the refusal, or one with all of them.
    """
    found: dict[str, LoraRtError] = {}

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except LoraRtError as error:
            found.setdefault(str(error), error)

    yield attempt
    errors = list(found.values())
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [line for error in errors for line in (error.problems or (error.message,))]
        kind = UsageError if any(isinstance(error, UsageError) for error in errors) else LoraRtError
        raise kind("this run can't start", problems=problems, next_step=errors[0].next_step)


def _of_file(file: Path, context: typer.Context, attempt: Attempt) -> Mapping[str, Any]:
    """What the file says and the command line does not."""

    def whole() -> None:
        if found.problems:
            text = f"{file} has {'a problem' if len(found.problems) == 1 else f'{len(found.problems)} problems'}"
            raise UsageError(text, problems=found.problems, next_step="Its options are those of: lora-rt train --help")

    with options.usage():
        found = read_run(file)
    attempt(whole)
    typed = {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") != "DEFAULT"}
    spelled = {"options": "option", "template_variables": "template_var"}
    return {name: value for name, value in found.values.items() if spelled.get(name, name) not in typed}


def _check(given: Mapping[str, Any], out: Path | None, attempt: Attempt) -> None:
    """What can be said before torch is imported, which takes seconds, and before a base is loaded."""
    for name, spelled in (("register", "REGISTER"), ("data", "--data")):
        if given[name] is None:
            attempt(lambda spelled=spelled: _missing(spelled))  # type: ignore[misc]
    settings = TrainSettings(
        **{
            **given,
            "register": "x" if given["register"] is None else given["register"],
            "data": given["data"] or Path(),
        }
    )

    def base() -> None:
        source = check_base(settings.base, settings.precision)
        check_device(settings.device)
        check_targets(settings.target_modules, source)

    def in_range() -> None:
        with options.usage():
            settings.check()
        if given["register"]:
            Destination(Registry(), settings.register, out).check()

    def mode() -> None:
        with nullcontext() if modes.listed(settings.mode) else options.usage():
            modes.require(settings.mode)

    attempt(base)
    attempt(in_range)
    modes = session().modes
    attempt(mode)
    # Which fields a stranger's mode reads is known only when it has seen the base; ours read these.
    ours = any(record.package == OURS for record in modes.listed(settings.mode))
    for path in (given["data"], settings.held_out):
        if path is not None:
            attempt(lambda path=path: read_pairs(path, ("scene", "text") if ours else (), chats=True))  # type: ignore[misc]


def _missing(spelled: str) -> None:
    raise UsageError(f"{spelled} is missing", next_step="See: lora-rt train --help")


def _report_rehearsal(found: Rehearsal) -> None:
    for name, text in found.lines():
        console.print(f"{name.ljust(10)}{escape(text)}", soft_wrap=True, highlight=False)
    console.print("nothing was trained and nothing was written")


def _report(result: TrainResult, settings: TrainSettings, out: Path | None) -> None:
    loss = f"held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f} nats per token"
    speed = f"{result.steps} steps, {result.tokens_per_second:.0f} tokens/s"
    console.print(f"trained [bold]{escape(result.where)}[/]: {loss}, {speed}", soft_wrap=True)
    hint = compose_hint(out or settings.register, settings.base)
    console.print(escape(hint), soft_wrap=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
