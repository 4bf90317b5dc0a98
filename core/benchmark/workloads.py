"""What is measured and on which base, as plain data that another process can be told."""

from __future__ import annotations

import difflib
import fnmatch
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from lora_rt.core.base.default import gguf_file
from lora_rt.errors import LoraRtError

Kind = Literal["decode", "prefill", "change", "cold", "memory", "training"]
DECODING: tuple[Kind, ...] = ("decode", "prefill")

Mix = tuple[tuple[str, float], ...]
"""One row's composition: resident name and weight of each term; empty is the base alone."""

SAMPLED: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
SYSTEMS = {
    "base": "base",
    "generate": "base\ngenerate",
    "ours": "lora-rt",
    "peft-set": "PEFT\nset",
    "peft-cat": "PEFT\ncat",
    "peft-mixed": "PEFT\nmixed",
    "peft-trainer": "PEFT\nTrainer",
    "llama.cpp": "llama\n.cpp",
}
"""The columns of the table in their order, with their heads."""


class BenchmarkError(LoraRtError):
    """A name that nobody knows, a process that failed, or a system that did not do its work."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The options --base, --precision and --device, or the size of a random base."""

    base: str = "default"
    precision: str = "int4"
    device: str = "auto"
    random: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table.

    `kind` is what is timed. "decode": the steps behind the prompt. "prefill": the prompt and the first token. "change":
    the way from one composition to the next. "cold": a process from its start to its first token. "memory": no time,
    but the peak of a process that decodes. "training": a short run.
    """

    name: str  # for options
    title: str  # for people
    kind: Kind = "decode"
    rows: int = 1
    resident: int = 4  # adapters in memory
    active: int = 4  # of them in each row
    distinct: bool = False  # every row has a composition of its own
    weighted: bool = True  # terms have weights; otherwise all are 1
    sampled: bool = False  # tokens are drawn, as SAMPLED says; otherwise the most likely one is taken
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    rank: int = 16
    prompt_tokens: int = 32  # of every row
    new_tokens: int = 32

    @property
    def residents(self) -> list[str]:
        """The names of the adapters in memory: reg00, reg01, ..."""
        return [f"reg{index:02d}" for index in range(self.resident)]

    @property
    def mixes(self) -> list[Mix]:
        """The composition of each row."""
        return [self.mix(row if self.distinct else 0) for row in range(self.rows)]

    @property
    def steps(self) -> int:
        """Forward passes: the first token comes out of the prompt, and only what follows is decoding."""
        return 1 if self.kind == "prefill" else self.new_tokens + 1

    def mix(self, number: int) -> Mix:
        """The number-th composition; the weights are around 1/active, in no two rows alike.

        The rows of a batch go round the residents. Changes draw theirs, so that hardly any set comes twice: what was
        laid out for a set is kept.
        """
        chosen = [self.residents[(number * self.active + term) % self.resident] for term in range(self.active)]
        if self.kind == "change" and self.active < self.resident:
            chosen = random.Random(number).sample(self.residents, self.active)
        shares = [0.5 + (0.618 * (number * self.active + term + 1)) % 1.0 for term in range(self.active)]  # 0.5 to 1.5
        weights = [round(share / self.active, 4) if self.weighted else 1.0 for share in shares]
        return tuple(zip(chosen, weights, strict=True))


def text_of(mix: Iterable[tuple[str, float]]) -> str | None:
    """The text of a composition."""
    return " ".join(f"{name}:{weight}" for name, weight in mix) or None


DEFAULT = (
    Workload("base-only", "decode 1 row, no adapter active", active=0),
    Workload("row1-k2", "decode 1 row, 2 of 4 active", active=2),
    Workload("row1-k4", "decode 1 row, 4 active"),
    Workload("rows16-single", "decode 16 rows, one adapter each", rows=16, active=1, distinct=True, weighted=False),
    Workload("rows16-mixes", "decode 16 rows, 16 compositions", rows=16, distinct=True),
    Workload("rows16-sampled", "decode 16 compositions, sampled", rows=16, distinct=True, sampled=True),
    Workload("rows16-k64", "decode 16 rows, 2 of 64 each", rows=16, resident=64, active=2, distinct=True),
    Workload("prefill", "prefill 4 x 512 tokens, 4 active", kind="prefill", rows=4, prompt_tokens=512),
    Workload("change-weights", "new weights, 4 active", kind="change"),
    Workload("change-adapters", "other adapters, 4 of 64", kind="change", resident=64),
    Workload("cold", "process start to first token", kind="cold", resident=2, active=2),
    Workload("memory", "peak memory, 16 rows", kind="memory", rows=16),
    Workload("training", "training steps", kind="training"),
)

QUICK = (
    Workload("quick-row1", "decode 1 row, 2 of 4 active", active=2, new_tokens=8),
    Workload("quick-rows4", "decode 4 rows, 4 compositions", rows=4, distinct=True, new_tokens=8),
    Workload("quick-prefill", "prefill 2 x 64 tokens, 4 active", kind="prefill", rows=2, prompt_tokens=64),
    Workload("quick-change", "new weights, 4 active", kind="change"),
)


def reason(system: str, workload: Workload, origin: Origin) -> str | None:
    """Why a system can't do a workload over a base, in a few words; None where it can."""
    kind, decodes, differs = workload.kind, workload.kind in DECODING, len(set(workload.mixes)) > 1
    if kind in ("cold", "training") and origin.random is not None:
        return "a random base is not on disk"
    without_a_mix = kind in ("cold", "training") or not workload.active
    reasons = {
        "base": {"has no composition": kind == "change", "trains nothing": kind == "training"},
        "generate": {"as the base": not decodes},
        # What is the state of PEFT's model holds for all rows.
        "peft-set": {"cannot mix weights in a batch": differs, "trains by the Trainer": kind == "training"},
        "peft-cat": {"one mix for all rows": differs, "as set_adapter": without_a_mix},
        "peft-mixed": {
            "an argument, without weights": kind == "change",
            "as set_adapter": without_a_mix,
            "one adapter per row, no weights": workload.active > 1 or workload.weighted,
        },
        "peft-trainer": {"trains alone": kind != "training"},
        "llama.cpp": {
            "xllamacpp is not installed": find_spec("xllamacpp") is None,
            "no GGUF file of this base here": origin.random is not None or gguf_file(origin.base) is None,
            "measured greedily alone": workload.sampled,
            "scales are a part of each request": kind == "change",
            "not measured": not decodes,
        },
    }
    return next((why for why, holds in reasons.get(system, {}).items() if holds), None)


def choose_workloads(wanted: Sequence[str], default: Sequence[Workload] = DEFAULT) -> list[Workload]:
    """The workloads of these names or patterns, in their own order; the default set for none.

    Raises:
        BenchmarkError: as `fitting`.
    """
    known = {workload.name: workload for workload in (*DEFAULT, *QUICK)}
    return [known[name] for name in fitting("workload", wanted, list(known))] or list(default)


def fitting(what: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that fit a wanted one or a pattern (`rows16-*`), in their own order.

    Raises:
        BenchmarkError: a name or pattern that fits none; all of them are named, each with the nearest.
    """
    problems = []
    for name in wanted:
        if not fnmatch.filter(known, name):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            problems.append(f"no {what} is called {name!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
    if problems:
        raise BenchmarkError("; ".join(problems), problems=problems, next_step=f"There are: {', '.join(known)}")
    return [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
