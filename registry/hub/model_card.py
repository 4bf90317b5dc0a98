"""The README of a pushed adapter: front matter that the Hub renders and searches, and how to use it."""

from __future__ import annotations

from typing import Any

from lora_rt.registry.card import AdapterCard
from lora_rt.registry.hub import library
from lora_rt.registry.inspection import InspectedAdapter
from lora_rt.registry.reference import is_hub_id

TAG = "lora-rt"

# Licence ids that the Hub knows; others are written as `license: other` with their name.
_LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "creativeml-openrail-m", "gemma",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "unlicense",
}  # fmt: skip


def model_card(adapter: InspectedAdapter, repo: str) -> str:
    """The whole README.md, front matter first."""
    card = adapter.card
    facts: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": _tags(adapter),
        "model_name": repo.rpartition("/")[2],
        "eval_results": _results(card) or None,
        **_licence(card),
    }
    if card and is_hub_id(card.base.id):
        facts |= {"base_model": card.base.id, "base_model_relation": "adapter"}
    return f"---\n{library.ModelCardData(**facts).to_yaml()}\n---\n\n{_body(adapter, repo)}"


def _tags(adapter: InspectedAdapter) -> list[str]:
    tags = [TAG, "lora", f"mode:{adapter.mode}"]
    if adapter.card:
        tags.append(f"register:{adapter.card.register}")
    return tags


def _licence(card: AdapterCard | None) -> dict[str, str]:
    stated = card.licence if card else ""
    if not stated:
        return {}
    if stated.lower() in _LICENCES:
        return {"license": stated.lower()}
    return {"license": "other", "license_name": stated}


def _results(card: AdapterCard | None) -> list[library.EvalResult]:
    return [
        library.EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out scenes",
            metric_type=name,
            metric_value=value,
        )
        for name, value in sorted(card.metrics.items() if card else ())
    ]


def _body(adapter: InspectedAdapter, repo: str) -> str:
    card = adapter.card
    name = repo.rpartition("/")[2]
    ranks = sorted({module.rank for module in adapter.modules})
    rows = [("mode", adapter.mode), ("rank", ", ".join(map(str, ranks))), ("modules", str(len(adapter.modules)))]
    if card:
        at = f" @ {card.base.revision}" if card.base.revision else ""
        rows = [("register", card.register), ("base", card.base.id + at), *rows]
        rows += [(key, f"{value:g}") for key, value in sorted(card.metrics.items())]
    lines = [f"# {name}", "", f"A LoRA register adapter for lora-rt: {_what(card, adapter.mode)}.", ""]
    lines += ["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows)]
    lines += ["", "## Use", "", "```", f"lora-rt pull {repo}", f'lora-rt compose {name}:0.7 -p "..."', "```", ""]
    lines += ["It is a plain PEFT adapter too:", "", "```python", *_peft(card, repo), "```", ""]
    return "\n".join(lines)


def _what(card: AdapterCard | None, mode: str) -> str:
    return f"the register *{_cell(card.register)}*, mode *{mode}*" if card else f"mode *{mode}*"


def _peft(card: AdapterCard | None, repo: str) -> list[str]:
    base = card.base.id if card and is_hub_id(card.base.id) else "BASE"
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{repo}")',
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
