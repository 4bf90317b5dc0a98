"""The other end of `processes.py`: answers one question, given as JSON, in a process that holds nothing else.

The peak memory of one system; or training, our own run or what a user writes by the manuals of PEFT and transformers,
on the same data and settings. Each repeat of that is a new process: a base that has made a forward pass for inference
does not train (see `lora_rt.core.base.repacking`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_rt.core.base.precision import check_precision, compute_dtype
from lora_rt.core.base.reading import whole_tokenizer
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.results import Sample
from lora_rt.core.benchmark.session import make_systems, repeat_of
from lora_rt.core.benchmark.workloads import Origin, Workload
from lora_rt.core.generation.prompts import answer_ids, prompt_ids
from lora_rt.plugins.contract import IGNORE

_BATCH = 8


@dataclass(frozen=True, slots=True)
class Lesson:
    """What both trainings are told: one epoch over the pairs."""

    origin: Origin
    workload: Workload
    data: Path
    held_out: Path
    batch_size: int = _BATCH


def peak_of(system: str, origin: Origin, workload: Workload, folder: Path) -> Sample:
    """The most memory that a system took for the workload."""
    lab = Lab(origin, folder)
    (made,) = make_systems([system], lab)
    sample = repeat_of(lab, made, replace(workload, kind="decode"))()
    return Sample(sample.seconds, megabytes=round(peak_megabytes(lab.device), 1))


def peak_megabytes(device: torch.device) -> float:
    """The most memory so far, in MB: of a GPU what torch has allocated, else the process' resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def train_ours(lesson: Lesson, folder: Path) -> Sample:
    """The training loop of `lora-rt train`."""
    from lora_rt.core.step.settings import TrainSettings
    from lora_rt.core.training.run import train
    from lora_rt.plugins.manager import load_modes

    settings = TrainSettings(
        register="bench",
        mode="output-only",
        data=lesson.data,
        held_out=lesson.held_out,
        base=lesson.origin.base,
        precision=lesson.origin.precision,
        device=lesson.origin.device,
        r=lesson.workload.rank,
        target_modules=lesson.workload.targets,
        epochs=1,
        batch_size=lesson.batch_size,
    )
    speed = train(settings, load_modes(), folder).tokens_per_second
    tokens = sum(len(ids) for ids, _ in sequences(lesson))
    return Sample(tokens / speed, tokens)


def train_plainly(lesson: Lesson, folder: Path) -> Sample:
    """`get_peft_model` and the Trainer: padding to the batch's longest, the default sampler."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    base, device = lesson.origin.base, torch.device(lesson.origin.device)
    dtype = compute_dtype(check_precision(lesson.origin.precision))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, device_map={"": device})
    torch.manual_seed(0)
    targets = list(lesson.workload.targets)
    lora = LoraConfig(
        r=lesson.workload.rank, lora_alpha=32, target_modules=targets, lora_dropout=0.05, task_type="CAUSAL_LM"
    )
    examples = [
        {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)} for ids, labels in sequences(lesson)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=lesson.batch_size,
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
    )
    trainer = Trainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(base)),
    )
    seconds: float = trainer.train().metrics["train_runtime"]
    return Sample(seconds, sum(len(example["input_ids"]) for example in examples))


def sequences(lesson: Lesson) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every example: the scene through the chat template without loss, the text with it."""
    tokenizer = whole_tokenizer(lesson.origin.base)
    found = []
    for pair in map(json.loads, lesson.data.read_text().splitlines()):
        prompt, answer = prompt_ids(tokenizer, pair["scene"]), answer_ids(tokenizer, pair["text"])
        found.append(([*prompt, *answer], [IGNORE] * len(prompt) + answer))
    return found


def main() -> None:
    """Prints the sample as JSON."""
    asked = json.loads(sys.argv[1])
    workload = Workload(**{**asked["workload"], "targets": tuple(asked["workload"]["targets"])})
    origin = Origin(**asked["origin"])
    with tempfile.TemporaryDirectory(prefix="lora-rt-bench-") as name:
        if workload.kind == "memory":
            sample = peak_of(asked["system"], origin, workload, Path(name))
        else:
            train = train_ours if asked["system"] == "ours" else train_plainly
            sample = train(Lesson(origin, workload, Path(asked["data"]), Path(asked["held_out"])), Path(name))
    print(json.dumps({"seconds": sample.seconds, "tokens": sample.tokens, "megabytes": sample.megabytes}))


if __name__ == "__main__":
    main()
