"""The adapter card, `register.json`: what an adapter is for and what it was made of."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from lora_rt.registry import durable, strict_json
from lora_rt.registry.bases import BaseIdentity as BaseIdentity
from lora_rt.registry.errors import RejectedAdapterError
from lora_rt.registry.files import CARD, LIMITS, UnusableFileError, open_plain
from lora_rt.registry.models import Digest, Finite, Text, Word, problems_of

SCHEMA_VERSION = 1


class StateTensor(BaseModel):
    """One tensor of `mode.safetensors`: its safetensors dtype ("F32", "BF16", ...) and shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: tuple[Annotated[int, Field(ge=0)], ...]


# BaseModel's metaclass is an abstract base class's, whose `register` has nothing to do with the field of that name.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message='Field name "register" in "AdapterCard" shadows', category=UserWarning)

    class AdapterCard(BaseModel):
        """What `register.json` says.

        `hidden_layers` is after how many of the base's blocks the mode reads the early hidden state; a quarter of them
        where it is left out. `state` lists every tensor of `mode.safetensors`; it is empty where the mode keeps none.
        `training` holds the settings of the run. `metrics` are plain numbers by name, for instance
        `gain_nats_per_token`. `lora_rt` is the version that wrote it. Nothing here writes `created`: the same run then
        gives the same bytes, and one digest.
        """

        model_config = ConfigDict(frozen=True, extra="ignore")

        schema_version: Literal[1] = 1
        register: Text
        mode: Word
        base: BaseIdentity
        scene_types: tuple[Text, ...] = ()
        hidden_layers: Annotated[StrictInt, Field(ge=0)] | None = None
        data_sha256: Digest = ""
        seed: int | None = None
        metrics: dict[Text, Finite] = Field(default_factory=dict)
        licence: Text = ""
        state: dict[Text, StateTensor] = Field(default_factory=dict)
        training: dict[
            Text,
            Annotated[
                StrictBool | StrictInt | Annotated[Finite, Field(strict=True)] | Text | None,
                Field(union_mode="left_to_right"),
            ],
        ] = Field(default_factory=dict)
        created: Text = ""
        lora_rt: Text = ""


def read_card(folder: Path) -> AdapterCard | None:
    """The card of an adapter folder, or None where it has none.

    Raises:
        RejectedAdapterError: the file is there and is not a card.
    """
    try:
        with open_plain(folder / CARD, LIMITS[CARD]) as (file, _):
            content = file.read(LIMITS[CARD] + 1)
    except FileNotFoundError:
        return None
    except UnusableFileError as error:
        raise RejectedAdapterError(f"{folder.name}: {CARD} {error}", problems=[f"{CARD} {error}"]) from error
    card, problems = parse_card(content)
    if card is None:
        raise RejectedAdapterError(f"{folder.name}: {CARD} is not an adapter card", problems=problems)
    return card


def parse_card(content: bytes) -> tuple[AdapterCard | None, list[str]]:
    """A card from the bytes of `register.json`, or None and everything that is wrong with them."""
    try:
        document = strict_json.loads(content)
    except strict_json.InvalidJsonError as error:
        return None, [f"{CARD}: {error}"]
    if isinstance(document, dict) and document.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        version = strict_json.shown(document["schema_version"])
        return None, [f"{CARD}: schema_version is {version}; this lora-rt reads version {SCHEMA_VERSION}"]
    try:
        return AdapterCard.model_validate(document), []
    except ValidationError as error:
        return None, [f"{CARD}: {problem}" for problem in problems_of(error)]


def write_card(folder: Path, card: AdapterCard) -> None:
    """Write the card into the folder, whole or not at all."""
    text = json.dumps(card.model_dump(mode="json"), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    durable.write_text(folder / CARD, text)
