"""What a training run is told, and which of a model's layers its adapter acts on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from lora_rt.core.base.choices import check_device, check_precision
from lora_rt.core.base.identity import known_linears
from lora_rt.core.base.roles import resolved
from lora_rt.core.base.source import BaseSource, parse_base
from lora_rt.core.generation.numbers import of_other_kinds
from lora_rt.errors import LoraRtError
from lora_rt.errors import SettingsError as SettingsError
from lora_rt.registry.card import parse_card
from lora_rt.registry.files import CARD
from lora_rt.registry.inspection.config import read_config
from lora_rt.registry.reference import composed, new_name_problem

Optimizer = Literal["adamw", "paged-adamw-8bit"]
LOGGERS = ("tensorboard", "wandb", "trackio")
"""Where the figures of a run can go: names of packages."""
_MOST_OF_A_PATH = 300  # characters that a card has room for
_KINDS = {
    "a whole number": ("r", "batch_size", "seed", "accumulation", "early_stop"),
    "a number": ("alpha", "dropout", "learning_rate", "epochs"),
    "true or false": ("special_tokens", "gradient_checkpointing"),
    "a text": ("register", "mode"),
    "a list of texts": ("target_modules", "scene_types", "log_to"),
    "a mapping": ("options", "template_variables"),
}
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """One run. The defaults are those of the source document (r 16, alpha 32, q_proj and v_proj, dropout 0.05).

    `learning_rate` is the peak of a cosine schedule with 5% warm-up; `batch_size` counts sequences per optimizer step.
    `held_out` is a file of examples that are not trained on; without one, a tenth of the data is set aside.
    `optimizer`, `gradient_checkpointing` and `accumulation` (the number of parts in which the sequences of a step are
    run, one after the other) are picked by the run where they are None. `template_variables` are the chat template's;
    with `special_tokens`, `<|im_end|>` and the like in the data are tokens and not text. With `early_stop` the run ends
    when so many epochs in a row were no better on the held-out examples than the best one, whose weights are published.
    `log_to` names trackers (`LOGGERS`).
    """

    register: str
    mode: str
    data: Path
    base: str = "default"
    precision: str = "int4"
    device: str = "auto"
    r: int = 16
    alpha: float = 32
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.05
    learning_rate: float = 1e-3
    epochs: float = 3
    batch_size: int = 8
    seed: int = 0
    held_out: Path | None = None
    licence: str = ""
    scene_types: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    optimizer: str | None = None
    gradient_checkpointing: bool | None = None
    accumulation: int | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: bool = False
    early_stop: int | None = None
    log_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "register", composed(self.register))

    def check(self) -> None:
        """What is known without data, base and mode.

        Raises:
            SettingsError: with everything that is out of range, or that no adapter can be published with.
            LoraRtError: there is no such precision, device or base.
        """
        if problems := of_other_kinds(self, _KINDS, ("accumulation", "early_stop", "gradient_checkpointing")):
            raise SettingsError("these settings can't train", problems=problems, next_step="See: lora-rt train --help")
        problems += new_name_problem(self.register)
        if not 1 <= self.r <= 4096:
            problems.append(f"r is {self.r}; it must be from 1 to 4096")
        if not 0 < self.alpha < 1e6:
            problems.append(f"alpha is {self.alpha}; it must be above 0 and below a million")
        if not self.target_modules:
            problems.append("there are no target modules; name some, or all-linear")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}; it must be from 0 to below 1")
        if not 0 < self.learning_rate <= 1:
            problems.append(f"the learning rate is {self.learning_rate}; it must be above 0 and at most 1")
        if not 0 < self.epochs <= 10_000:
            problems.append(f"epochs is {self.epochs}; it must be above 0 and at most 10,000")
        if not 1 <= self.batch_size <= 4096:
            problems.append(f"the batch size is {self.batch_size}; it must be from 1 to 4096")
        if self.optimizer not in (None, *OPTIMIZERS):
            problems.append(f"there is no optimizer {self.optimizer!r}; there are: {', '.join(OPTIMIZERS)}")
        if self.accumulation is not None and (self.accumulation < 1 or self.batch_size % self.accumulation):
            problems.append(
                f"accumulation is {self.accumulation}; it must divide the batch size, {self.batch_size}, without a rest"
            )
        if not 0 <= self.seed < 2**32:
            problems.append(f"the seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if self.early_stop is not None and self.early_stop < 1:
            problems.append(f"early stop is {self.early_stop}; it must be at least 1 epoch")
        problems += _missing_loggers(self.log_to)
        problems += self._unpublishable() if not problems else []
        if problems:
            problems += _refusals(check_precision, self.precision) + _refusals(check_device, self.device)
            raise SettingsError("these settings can't train", problems=problems, next_step="See: lora-rt train --help")
        check_precision(self.precision)
        check_device(self.device)
        parse_base(self.base)

    def _unpublishable(self) -> list[str]:
        """What card and configuration of the adapter would be refused for, by the checks that refuse them."""
        unknown = {"id": "", "revision": None, "digest": ""}
        _, card = parse_card(json.dumps(self.card_facts() | {"base": unknown}).encode())
        lora = {"peft_type": "LORA", "r": self.r, "lora_alpha": self.alpha, "target_modules": ["x"]}
        _, config = read_config(json.dumps(lora).encode())
        return [problem.removeprefix(f"{CARD}: ") for problem in card] + config

    def card_facts(self) -> dict[str, Any]:
        """What the settings give to the adapter's card: enough for `lora-rt train --config register.json` to repeat it.

        What the run picks by itself and how it reads texts is added when it is published.
        """
        return {
            "register": self.register,
            "mode": self.mode,
            "scene_types": self.scene_types,
            "seed": self.seed,
            "licence": self.licence,
            "training": {
                "r": self.r,
                "alpha": self.alpha,
                "target_modules": ",".join(self.target_modules),
                "dropout": self.dropout,
                "learning_rate": self.learning_rate,
                "epochs": self.epochs,
                "batch_size": self.batch_size,
                "early_stop": self.early_stop,
                "precision": self.precision,
                "device": self.device,
                "base": _as_typed(self.base),
                "data": _as_typed(self.data),
                "held_out": None if self.held_out is None else _as_typed(self.held_out),
                **{f"option {key}": value for key, value in self.options.items()},
            },
        }

    def fingerprint(self, data_digest: str, optimizer: Optimizer = "adamw", *, base_digest: str = "") -> str:
        """Twelve hex digits that two runs share exactly if one can resume the other.

        What is computed must be the same, not in which portions: checkpointing and accumulation may differ. Nor does it
        count where base and data lie, only what they are.

        Args:
            data_digest: of the training data.
            optimizer: the one that the run came to.
            base_digest: of the base.
        """
        apart = ("data", "held_out", "base", "device", "licence", "gradient_checkpointing", "accumulation", "log_to")
        plain = {key: str(value) for key, value in asdict(self).items() if key not in apart} | {"optimizer": optimizer}
        facts = json.dumps([plain, data_digest, base_digest], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:12]


def _missing_loggers(names: Sequence[str]) -> list[str]:
    known = [name for name in names if name in LOGGERS]
    problems = [f"there is no logger {name!r}; there are: {', '.join(LOGGERS)}" for name in names if name not in known]
    missing = [name for name in known if find_spec(name) is None]
    return problems + [f"logging to {name} needs its package; install it with: pip install {name}" for name in missing]


def _refusals(check: Callable[[str], object], value: str) -> list[str]:
    try:
        check(value)
    except LoraRtError as error:
        return [error.message]
    return []


def _as_typed(place: str | Path) -> str:
    """A path as the user gave it, but without the name of the home that it may begin with: cards get published."""
    text, home = str(place), str(Path.home())
    text = f"~{text[len(home) :]}" if text.startswith(home + os.sep) else text
    return text if len(text) <= _MOST_OF_A_PATH else Path(text).name[-_MOST_OF_A_PATH:]


def check_targets(wanted: Sequence[str], base: BaseSource) -> None:
    """Refuse targets where the layers of a base can be told before it is fetched or loaded.

    Raises:
        TargetError: the base has no layers of these names.
    """
    if known := known_linears(base):
        resolved(wanted, known)
