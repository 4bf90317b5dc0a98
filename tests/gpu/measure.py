"""One part of examples/gpu/measure.sh: figures of lora-rt, PEFT and the plain base, as JSON and as a table.

Decoding, prefill and changes of composition are workloads of `lora-rt bench`, run by its own session: the same random
weights, adapters and prompts for everybody, interleaved. Training steps and the choice of tokens are timed here. It
stands with the tests, since it takes the engine apart: graphs switched off, a training step alone, a choice alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.base.machine import machine, now, versions
from lora_rt.core.base.random_base import random_base
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.results import Measured, row
from lora_rt.core.benchmark.session import measure
from lora_rt.core.benchmark.systems import LOADERS, System, chooser, runtime_of, system_over
from lora_rt.core.benchmark.workloads import SAMPLED, Origin, Workload
from lora_rt.core.generation.choosing import RowSampler, choose
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.memory.training import plan_training
from lora_rt.core.step.adapter import checkpointed, with_adapter
from lora_rt.core.step.loss import label_nll
from lora_rt.core.step.settings import TrainSettings

RESIDENT, RANK, TARGETS = 16, 16, ("q_proj", "k_proj", "v_proj", "o_proj")
SEQUENCE, LABELS = 1024, 512


def main() -> None:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["machine", "7b", "13b", "train-7b", "train-13b", "sampling", "table"])
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"))
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU")
    given = parser.parse_args()
    book = Book(given.out, given.part, tiny=given.tiny)
    if given.part == "machine":
        book.write({"machine": machine(book.device), "versions": versions()})
    elif given.part == "table":
        print(table(given.out))
    elif given.part == "sampling":
        sampling(book)
    elif given.part.startswith("train-"):
        training(book, given.part.removeprefix("train-"))
    else:
        decoding(book, given.part)


class Book:
    """Where figures go, one line of JSON each, at once; and the device."""

    def __init__(self, folder: Path, part: str, *, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() and not tiny else "cpu")
        self._file = folder / f"{part}.jsonl"
        if part != "table":
            folder.mkdir(parents=True, exist_ok=True)
            self._file.write_text("")

    def name(self, size: str) -> str:
        """What the base is called in the figures."""
        return "tiny" if self.tiny else size

    def write(self, figure: dict[str, Any]) -> None:
        """Keep a figure, and show it."""
        with self._file.open("a") as file:
            file.write(json.dumps(figure) + "\n")
        print(json.dumps(figure), flush=True)


@contextmanager
def unrecorded(lab: Lab, workload: Workload) -> Iterator[dict[str, System]]:
    """lora-rt without CUDA graphs: every step is a pass launched from Python."""
    with runtime_of(lab, workload) as runtime:
        runtime.parts.lm.steps = None
        yield {"ours, no graphs": system_over(runtime, lab, workload)}


def decoding(book: Book, size: str) -> None:
    """Rows, prefill, first tokens and changes of composition, over a base of that size at int4."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Origin(precision="int4", device=str(book.device), random="tiny" if book.tiny else size), Path(folder))
        seconds = lab.now() - start
        book.write(
            {"base": book.name(size), "built in s": round(seconds, 1), "gib": round(allocated(book.device) / 2**30, 2)}
        )
        loaders = {**LOADERS, "ours, no graphs": unrecorded}
        systems = ["base", "ours", "peft-set", "peft-mixed", "ours, no graphs"]

        def report(_done: int, what: str) -> None:
            print("#", what)

        for measured in measure(lab, list(workloads(book.tiny)), systems, 2, report, loaders):
            write_before(book, size, measured)
        write_before(book, size, None)
        if book.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            book.write({"base": book.name(size), "peak of all systems, GiB": round(peak, 2)})


_pending: list[Measured] = []


def write_before(book: Book, size: str, following: Measured | None) -> None:
    """A workload is whole when the next one begins."""
    for item in _pending:
        for system in [*item.samples, *item.reasons]:
            found = row(item, system)
            kept = ("workload", "system", "tokens_per_s", "ratio_to_base", "seconds", "spread", "reason")
            book.write({"base": book.name(size), "title": item.workload.title} | {key: found[key] for key in kept})
    _pending[:] = [] if following is None else [following]


def workloads(tiny: bool) -> Iterator[Workload]:
    """With few tokens each: a step takes the same time every time."""
    new, prompt = (6, 8) if tiny else (32, 32)
    common = {"resident": RESIDENT, "active": 2, "distinct": True, "rank": RANK, "targets": TARGETS}
    size = {"prompt_tokens": prompt, "new_tokens": new}
    yield Workload("row1", "decode 1 row, 2 of 16 adapters", **{**common, **size, "distinct": False})  # type: ignore[arg-type]
    for rows in (4, 8) if tiny else (16, 64):
        title = f"decode {rows} rows, {rows} compositions of 2 of 16"
        yield Workload(f"rows{rows}", title, rows=rows, **common, **size)  # type: ignore[arg-type]
    single = {**common, "active": 1, "weighted": False}
    yield Workload("rows16-single", "decode 16 rows, one adapter each", rows=4 if tiny else 16, **single, **size)  # type: ignore[arg-type]
    for rows, tokens in ((1, 512), (4, 512)):
        shape = {"prompt_tokens": 16 if tiny else tokens, "rows": rows, "kind": "prefill"}
        title = "time to first token, 1 x 512" if rows == 1 else "prefill 4 x 512, one mix"
        yield Workload(f"prefill{rows}", title, **{**common, **shape, "distinct": False})  # type: ignore[arg-type]
    yield Workload("change", "change of composition, 2 of 16", kind="change", **{**common, "distinct": False})  # type: ignore[arg-type]


def training(book: Book, size: str) -> None:
    """A QLoRA step at r=16 on q and v, with and without checkpointing: ours beside PEFT as its manual has it."""
    settings = TrainSettings("measure", "output-only", Path(), r=RANK)
    base = random_base("tiny" if book.tiny else size, "int4", str(book.device))
    model = with_adapter(base.model, settings).train()
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    tokens, labelled = (64, 32) if book.tiny else (SEQUENCE, LABELS)
    for checkpointing in (False, True):
        if checkpointing:
            checkpointed(model)
        for rows in (1, 4):
            plan = plan_training(
                base.model.config,
                "int4",
                "cpu" if book.device.type == "cpu" else "cuda",
                settings,
                rows=rows,
                tokens=tokens,
                labels=labelled,
                optimizer="paged-adamw-8bit",
                checkpointing=checkpointing,
            )
            for system, loss in (("ours", our_loss), ("peft", plain_loss)):
                model.load_state_dict(fresh, strict=False)
                head = {"base": book.name(size), "title": f"training step {rows} x {tokens}", "system": system}
                planned = {"planned_gib": round(plan.peak / 2**30, 3)} if system == "ours" else {}
                figure = steps(book, model, rows, tokens, labelled, loss)
                book.write({**head, "checkpointing": checkpointing, **figure, **planned})


def steps(
    book: Book,
    model: Any,
    rows: int,
    tokens: int,
    labelled: int,
    loss_of: Callable[[Any, dict[str, Tensor]], Tensor],
) -> dict[str, Any]:
    """Five steps: the loss of the first and the last, tokens a second of the last three, the peak of all."""
    from bitsandbytes.optim import PagedAdamW8bit

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = book.device.type == "cuda"
    optimizer = PagedAdamW8bit(trained, lr=1e-3) if on_gpu else torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.randint(300, 1000, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(book.device)
    labels = ids.clone()
    labels[:, :-labelled] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for _ in range(5):
        start = now(book.device)
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(now(book.device) - start)
        losses.append(loss.item())
    speed = rows * tokens / statistics.median(times[2:])
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    return {
        "tokens_per_s": round(speed, 1),
        "peak_gib": round(peak / 2**30, 3),
        "losses": [round(losses[0], 3), round(losses[-1], 3)],
    }


def our_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """As `lora-rt train` has it."""
    sums, counts = label_nll(model, batch)
    return sums.sum() / counts.sum()


def plain_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model's own."""
    loss: Tensor = model(**batch).loss
    return loss


def sampling(book: Book) -> None:
    """Choosing tokens of 262,144 words: ours, and transformers' processors with one generator for all rows."""
    words = 2048 if book.tiny else 262_144
    for rows in (16, 64):
        logits = torch.randn((rows, words), generator=torch.Generator().manual_seed(0)).to(book.device) * 2
        workload = replace(next(workloads(book.tiny)), rows=rows, sampled=True)
        plainly = chooser(workload, book.device)
        said = torch.zeros((rows, 1), dtype=torch.long, device=book.device)
        ways: dict[str, Callable[[], Any]] = {"base": lambda d=plainly, s=said, x=logits: d(s, x.clone())}
        for name, settings in (("ours", Sampling(**SAMPLED)), ("ours, greedy", Sampling())):
            samplers = [RowSampler(settings, seed) for seed in range(rows)]
            ways[name] = lambda r=samplers, x=logits: choose(x.clone(), r)
        for name, way in ways.items():
            milliseconds = 1000 * median_of(book.device, way)
            book.write(
                {"title": f"choose a token, {rows} rows x {words}", "system": name, "ms": round(milliseconds, 3)}
            )


def median_of(device: torch.device, work: Callable[[], Any], repeats: int = 20) -> float:
    """Seconds."""
    found = []
    for _ in range(repeats + 3):
        start = now(device)
        work()
        found.append(now(device) - start)
    return statistics.median(found[3:])


def allocated(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def table(folder: Path) -> str:
    """What was written so far, as Markdown."""
    read = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")}
    lines = []
    for found in read.get("machine", []):
        facts, packages = found["machine"], found["versions"]
        lines.append(", ".join(str(facts[key]) for key in ("gpu", "driver", "cuda", "cpu") if key in facts))
        lines.append(", ".join(f"{name} {version}" for name, version in packages.items()))
    lines += ["", "| base | what | system | figure |", "|---|---|---|---|"]
    for part in ("7b", "13b", "train-7b", "train-13b", "sampling"):
        for figure in read.get(part, []):
            if "title" in figure:
                lines.append(f"| {figure.get('base', '')} | {figure['title']} | {figure['system']} | {shown(figure)} |")
    return "\n".join(lines)


def shown(figure: dict[str, Any]) -> str:
    """The numbers of one figure."""
    if figure.get("reason"):
        return f"({figure['reason']})"
    if "ms" in figure:
        return f"{figure['ms']} ms"
    if "peak_gib" in figure:
        how = ", checkpointed" if figure["checkpointing"] else ""
        planned = f", planned {figure['planned_gib']}" if "planned_gib" in figure else ""
        return (
            f"{figure['tokens_per_s']} tokens/s, peak {figure['peak_gib']} GiB{planned}{how}, loss {figure['losses']}"
        )
    if figure["tokens_per_s"] is None:
        return f"{figure['seconds'] * 1000:.2f} ms"
    ratio = "" if figure["ratio_to_base"] is None else f", {figure['ratio_to_base']:.2f} of the base"
    first = f", {figure['seconds'] * 1000:.0f} ms" if "prefill" in figure["workload"] else ""
    return f"{figure['tokens_per_s']:.0f} tokens/s{ratio}{first}"


if __name__ == "__main__":
    main()
