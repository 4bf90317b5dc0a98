"""Training on the same data and settings: our own run, and what a user writes by the manuals of PEFT and transformers.

Each repeat is a new process: a base that has made a forward pass for inference does not train (see
`lora_rt.core.base.repacking`).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from lora_rt.core.base.choices import check_precision
from lora_rt.core.base.precision import compute_dtype
from lora_rt.core.base.reading import whole_tokenizer
from lora_rt.core.benchmark.results import Sample
from lora_rt.core.benchmark.workloads import Origin, Workload
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.programs import train
from lora_rt.plugins.contract import IGNORE

_EXAMPLES, _BATCH = 64, 8
_WORDS = "the old house by river keeps its light on while a slow train goes past and nobody there says what they saw"


def train_ours(origin: Origin, workload: Workload, folder: Path, examples: int = _EXAMPLES) -> Sample:
    """The training loop of `lora-rt train`: one epoch over the pairs; `folder` is an empty one."""
    data, held_out = folder / "train.jsonl", folder / "held-out.jsonl"
    lines = [json.dumps(pair) + "\n" for pair in pairs(examples + 1)]
    data.write_text("".join(lines[:-1]))
    held_out.write_text(lines[-1])
    trained = train(
        "bench",
        data,
        out=folder / "adapter",
        held_out=held_out,
        base=origin.base,
        precision=origin.precision,
        device=origin.device,
        r=workload.rank,
        target_modules=workload.targets,
        epochs=1,
        batch_size=_BATCH,
    )
    tokens = sum(len(ids) for ids, _ in sequences(origin, examples))
    return Sample(tokens / trained.tokens_per_second, tokens)


def train_plainly(origin: Origin, workload: Workload, folder: Path, examples: int = _EXAMPLES) -> Sample:
    """`get_peft_model` and the Trainer: padding to the batch's longest, the default sampler."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    dtype, found = compute_dtype(check_precision(origin.precision)), sequences(origin, examples)
    model = AutoModelForCausalLM.from_pretrained(origin.base, dtype=dtype, device_map={"": origin.device})
    torch.manual_seed(0)
    shape = {"r": workload.rank, "lora_alpha": 32, "target_modules": list(workload.targets), "lora_dropout": 0.05}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=_BATCH,
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=origin.device == "cpu",
    )
    trainer = Trainer(
        model=get_peft_model(model, LoraConfig(**shape, task_type="CAUSAL_LM")),
        args=arguments,
        train_dataset=[{"input_ids": i, "labels": labels, "attention_mask": [1] * len(i)} for i, labels in found],
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(origin.base)),
    )
    return Sample(trainer.train().metrics["train_runtime"], sum(len(ids) for ids, _ in found))


def pairs(count: int) -> list[dict[str, str]]:
    """So many, always the same ones; their texts have 20 to 80 words."""
    dice, words = random.Random(0), _WORDS.split()
    drawn = ((dice.choices(words, k=4), dice.choices(words, k=dice.randint(20, 80))) for _ in range(count))
    return [{"scene": " ".join(scene), "text": " ".join(text)} for scene, text in drawn]


def sequences(origin: Origin, examples: int = _EXAMPLES) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of every example: the scene through the chat template without loss, the text with it."""
    text = TextFormat(whole_tokenizer(origin.base))
    read = [(text.prompt_ids(pair["scene"]), text.answer_ids(pair["text"])) for pair in pairs(examples)]
    return [([*prompt, *answer], [IGNORE] * len(prompt) + answer) for prompt, answer in read]
