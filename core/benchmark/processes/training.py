"""Training: our own run, and what a user writes by the manuals of PEFT and transformers, on the same data and settings.

Each repeat is a new process: a base that has made a forward pass for inference does not train (see
`lora_rt.core.base.repacking`).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.processes.child import answer_of
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload

_EXAMPLES = 64
_BATCH = 8
_WORDS = "the old house by river keeps its light on while a slow train goes past and nobody there says what they saw"


def training_repeat(lab: Lab, workload: Workload, how: str) -> Repeat:
    """One epoch in a new process; `how` is "ours" or "plain"."""
    data, held_out = _write_data(lab.folder)
    question = {
        "how": how,
        "data": str(data),
        "held_out": str(held_out),
        "base": str(lab.base.folder),
        "precision": lab.base.precision,
        "device": str(lab.device),
        "rank": workload.rank,
        "targets": list(workload.targets),
        "batch_size": _BATCH,
    }

    def repeat() -> Sample:
        answer = answer_of(__name__, question, lab.folder)
        return Sample(answer["seconds"], answer["tokens"])

    return repeat


def _write_data(folder: Path) -> tuple[Path, Path]:
    """64 pairs whose texts have 20 to 80 words, and one held-out pair."""
    files = folder / "train.jsonl", folder / "held-out.jsonl"
    dice = random.Random(0)
    for file, count in zip(files, (_EXAMPLES, 1), strict=True):
        pairs = [{"scene": _text(dice, 4), "text": _text(dice, dice.randint(20, 80))} for _ in range(count)]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return files


def _text(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(_WORDS.split(), k=words))


def train_ours(question: dict[str, Any], folder: Path) -> tuple[float, int]:
    """Seconds and tokens of the training loop of `lora-rt train`."""
    from lora_rt.core.step.settings import TrainSettings
    from lora_rt.core.training.run import train
    from lora_rt.plugins.manager import load_modes

    settings = TrainSettings(
        register="bench",
        mode="output-only",
        data=Path(question["data"]),
        held_out=Path(question["held_out"]),
        base=question["base"],
        precision=question["precision"],
        device=question["device"],
        r=question["rank"],
        target_modules=tuple(question["targets"]),
        epochs=1,
        batch_size=question["batch_size"],
    )
    speed = train(settings, load_modes(), folder).tokens_per_second
    tokens = sum(len(ids) for ids, _ in sequences(question))
    return tokens / speed, tokens


def train_plain(question: dict[str, Any], folder: Path) -> tuple[float, int]:
    """Seconds and tokens of `get_peft_model` and the Trainer: padding to the batch's longest, the default sampler."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from lora_rt.core.base.precision import check_precision, compute_dtype

    dtype = compute_dtype(check_precision(question["precision"]))
    device = torch.device(question["device"])
    model = AutoModelForCausalLM.from_pretrained(question["base"], dtype=dtype, device_map={"": device})
    rank = question["rank"]
    torch.manual_seed(0)
    lora = LoraConfig(
        r=rank, lora_alpha=32, target_modules=question["targets"], lora_dropout=0.05, task_type="CAUSAL_LM"
    )
    tokenizer = AutoTokenizer.from_pretrained(question["base"])
    examples = [
        {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)} for ids, labels in sequences(question)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=question["batch_size"],
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
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    seconds: float = trainer.train().metrics["train_runtime"]
    return seconds, sum(len(example["input_ids"]) for example in examples)


def sequences(question: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every example: the scene through the chat template without loss, the text with it."""
    from lora_rt.core.base.reading import whole_tokenizer
    from lora_rt.core.generation.prompts import answer_ids, prompt_ids
    from lora_rt.plugins.contract import IGNORE

    tokenizer = whole_tokenizer(question["base"])
    pairs = [json.loads(line) for line in Path(question["data"]).read_text().splitlines()]
    found = []
    for pair in pairs:
        prompt, answer = prompt_ids(tokenizer, pair["scene"]), answer_ids(tokenizer, pair["text"])
        found.append(([*prompt, *answer], [IGNORE] * len(prompt) + answer))
    return found


def main() -> None:
    """Answers one question, given as JSON."""
    import tempfile

    question = json.loads(sys.argv[1])
    run = {"ours": train_ours, "plain": train_plain}[question["how"]]
    with tempfile.TemporaryDirectory(prefix="lora-rt-bench-") as folder:
        seconds, tokens = run(question, Path(folder))
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
