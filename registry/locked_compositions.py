"""The named compositions in `lora-rt.lock`: whole, so that another machine can put them into its store.

[[composition]]
name = "my-mix"
base = "HuggingFaceTB/SmolLM2-135M-Instruct"
sha256 = "51d0..."

[[composition.terms]]
reference = "emotion"
sha256 = "9b1c..."
weight = 0.61
layers = []
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.errors import ProjectError
from lora_rt.registry.project import LOCK_FILE, read_toml
from lora_rt.registry.reference import is_name
from lora_rt.registry.strict_json import shown

KEY = "composition"


def read_locked_compositions(folder: Path) -> list[NamedComposition]:
    """The compositions of a project's lock, by name; none where there is no lock.

    Raises:
        ProjectError: `problems` names every entry that is wrong.
    """
    document = read_toml(folder / LOCK_FILE) or {}
    entries = document.get(KEY, [])
    if not isinstance(entries, list):
        entries = [None]
    found = [_read(number, entry) for number, entry in enumerate(entries, 1)]
    problems = [item for item in found if isinstance(item, str)]
    if problems:
        raise ProjectError(f"{LOCK_FILE} is damaged", next_step="Make it anew: lora-rt lock", problems=problems)
    return sorted((item for item in found if isinstance(item, NamedComposition)), key=lambda mix: mix.name)


def tables(mixes: Sequence[NamedComposition]) -> list[dict[str, Any]]:
    """What the lock says of these compositions, in a stable order."""
    return [
        {
            "name": mix.name,
            "base": mix.base,
            "sha256": mix.sha256,
            "terms": [term.model_dump(mode="json") for term in mix.terms],
        }
        for mix in sorted(mixes, key=lambda mix: mix.name)
    ]


def _read(number: int, entry: Any) -> NamedComposition | str:
    try:
        mix = NamedComposition.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{KEY} {number} is none: {shown(place)}: {first['msg']}"
    if not is_name(mix.name):
        return f"{KEY} {number} ({shown(mix.name)}): that is not a name"
    if entry.get("sha256") != mix.sha256:
        return f"{KEY} {number} ({shown(mix.name)}): its sha256 does not follow from its terms"
    return mix
