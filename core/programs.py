"""What the commands train, tune and eval do, for programs: the public face takes these names from here.

Every result has a `document()`: what the command prints with `--json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from lora_rt.core.base.choices import check_precision
from lora_rt.core.base.prepare import prepare_base
from lora_rt.core.base.source import parse_base, text_of
from lora_rt.core.generation.messages import one_per_row
from lora_rt.core.requests.composition import Composition, CompositionLike
from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training.data import check_examples, read_pairs
from lora_rt.core.training.run import TrainResult
from lora_rt.core.training.run import train as run
from lora_rt.core.tuning.settings import Per, settings_for
from lora_rt.errors import UsageError

if TYPE_CHECKING:
    from lora_rt.core.evaluation.matrix import Matrix
    from lora_rt.core.runtime import Runtime
    from lora_rt.core.tuning.session import Fitted
    from lora_rt.registry.compositions import NamedComposition

Examples = str | Path | Sequence[Mapping[str, Any]]
"""A JSONL file, or its examples."""


class TrainOptions(TypedDict, total=False):
    """The further keywords of `train`: the fields of `lora_rt.TrainSettings`.

    `target_modules`, `scene_types` and `log_to` may be one text, separated by commas, as on the command line.
    """

    base: str | PathLike[str]
    precision: str
    device: str
    r: int
    alpha: float
    target_modules: str | Sequence[str]
    dropout: float
    learning_rate: float
    epochs: float
    batch_size: int
    seed: int
    held_out: str | Path | None
    licence: str
    scene_types: str | Sequence[str]
    options: Mapping[str, str]
    optimizer: str | None
    gradient_checkpointing: bool | None
    accumulation: int | None
    template_variables: Mapping[str, Any]
    special_tokens: bool
    early_stop: int | None
    log_to: str | Sequence[str]


def train(
    register: str,
    data: str | Path,
    *,
    mode: str = "output-only",
    out: str | Path | None = None,
    resume: bool = False,
    **settings: Unpack[TrainOptions],
) -> TrainResult:
    """Train an adapter and publish it: into the store under the register's name, or into a folder.

    Args:
        register: what it is to express; also its name.
        data: a JSONL file.
        mode: what it is trained for.
        out: a new folder for the adapter; the store if left out.
        resume: go on from the newest checkpoint of the same run; if False, a run that has one is refused.
        settings: see `TrainOptions`; what is left out is as in `lora_rt.TrainSettings`.

    Raises:
        LoraRtError: settings, data, base or mode do not work out, the loss diverged, or the run was interrupted.
        TypeError: there is no such setting.
    """
    given: dict[str, Any] = dict(settings)
    if (held_out := given.get("held_out")) is not None:
        given["held_out"] = _path(held_out, "held_out")
    for key in ("target_modules", "scene_types", "log_to"):  # a text, as on the command line, or several
        if isinstance(given.get(key), str):
            given[key] = tuple(given[key].replace(",", " ").split())
        elif isinstance(given.get(key), Iterable):
            given[key] = tuple(given[key])
    chosen = TrainSettings(register=register, mode=mode, data=_path(data, "data"), **given)
    return run(chosen, out=None if out is None else _path(out, "out"), resume=resume)


def evaluate(
    compositions: Sequence[CompositionLike],
    data: Mapping[str, Examples],
    *,
    runtime: Runtime | None = None,
    base: str | PathLike[str] = "default",
    precision: str = "int4",
    device: str = "auto",
) -> Matrix:
    """The mean negative log-likelihood of every data set under the base and every composition, nats per token.

    Args:
        compositions: each in any of the forms that `Runtime.generate` takes.
        data: name -> JSONL file, or examples with "scene" and "text".
        runtime: a loaded one; otherwise `base`, `precision` and `device` say which is loaded.
        base: as in `Runtime.load`, like the two that follow.
        precision: of the base.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        LoraRtError: data, base or compositions can't be used.
    """
    wanted = one_per_row(compositions, "compositions")
    if not isinstance(data, Mapping):
        text = f"data is a {type(data).__name__}"
        raise UsageError(text, next_step='Give names with their files or examples: {"test": "test.jsonl"}')
    sets = {
        name: read_pairs(Path(given), ("scene", "text"), chats=True)
        if isinstance(given, str | PathLike)
        else check_examples(given, f"the data {name!r}")
        for name, given in data.items()
    }
    from lora_rt.core.evaluation.matrix import evaluate as measure
    from lora_rt.core.runtime import Runtime

    named = {one if isinstance(one, str) else str(Composition.of(one)): one for one in wanted}
    columns = {name: Composition.of(one) for name, one in named.items() if one is not None}
    if runtime is not None:
        return measure(runtime, sets, columns)
    with Runtime.load(base, precision=precision, device=device) as loaded:
        return measure(loaded, sets, columns)


def prepare(base: str | PathLike[str] = "default", *, precision: str = "bfloat16") -> Path:
    """The folder of a base that transformers and others load, converted or quantized first where that is needed; once.

    Args:
        base: as in `Runtime.load`.
        precision: of its weights; a folder or repository that is dense is given back as it is for dense precisions.

    Raises:
        LoraRtError: there is no such base, or it can't be converted.
    """
    return prepare_base(parse_base(base), check_precision(precision)).folder


def tune(
    composition: CompositionLike,
    data: str | Path,
    *,
    per: Per = "adapter",
    name: str | None = None,
    mode: str | None = None,
    mode_options: Mapping[str, str] | None = None,
    prompts: str | Path | None = None,
    out: str | Path | None = None,
    base: str | PathLike[str] = "default",
    precision: str = "int4",
    device: str = "auto",
    epochs: float = 3,
    learning_rate: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> NamedComposition | Fitted:
    """Learn weights per adapter, layer, token or scene type as a named composition, or gates of the adapters' own.

    Args:
        composition: the adapters; their weights are the start.
        data: a JSONL file; with `per="scene"` every line has a scene_type.
        per: what is learned.
        name: the composition's name, "my-mix" if left out; with `per="scene"`, keep the gates in it.
        mode: who decides in such a composition; "router" per token and "context" per scene type if left out.
        mode_options: the mode's own.
        prompts: a JSONL file of scene and scene_type: more prompts for the classifier (scene).
        out: a folder for the adapters instead of the store (scene).
        base: as in `Runtime.load`, like precision and device.
        precision: of the base.
        device: "auto", "cpu", "cuda" or "cuda:N".
        epochs: passes over the data.
        learning_rate: Adam's; 0.03 on weights and 0.1 on gates if left out.
        batch_size: examples per step.
        seed: of the order and of what is held out.

    Raises:
        LoraRtError: settings, data, base or adapters can't be used, or nothing was found that beats the start.
    """
    settings = settings_for(
        per,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        named=name is not None and out is None,
        mode=mode,
        mode_options=mode_options,
        prompts=prompts is not None,
        folder=out is not None,
    )
    given = Composition.of(composition)
    if given is None:
        raise UsageError("there is no composition", next_step="Give the adapters and the weights to start from")
    from lora_rt.core.tuning import session

    more = None if prompts is None else _path(prompts, "prompts")
    job = session.Job(given, _path(data, "data"), text_of(base), precision, device, prompts=more)
    name = "my-mix" if name is None else name
    return session.run(job, name, None if out is None else _path(out, "out"), settings, lambda _what, _loss: None)


def _path(value: Any, what: str) -> Path:
    """
    Raises:
        UsageError: it is no path.
    """
    try:
        return Path(value)
    except TypeError as error:
        text = f"{what} is a {type(value).__name__}"
        raise UsageError(text, next_step="Give the path of a file or a folder") from error
