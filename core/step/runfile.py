"""A run as a file: every option of `lora-rt train` in YAML, and the card of an adapter read as the run that made it.

    register: sea
    data: sea.jsonl
    target-modules: all-linear
    lr: 1e-3

Options are called as on the command line, or as the fields of `TrainSettings`.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WrapValidator, create_model

from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.registry.models import problems_of

OPTIONS: Mapping[str, str] = {
    "learning_rate": "lr",
    "options": "option",
    "template_variables": "template_var",
}
"""Fields of `TrainSettings` whose option is called otherwise."""

_RUN: Mapping[str, Any] = {"out": Path | None, "resume": bool, "dry_run": bool}


@dataclass(frozen=True, slots=True)
class RunFile:
    """What a file says: the values that can be read, by the field's name, and everything that is wrong with it."""

    values: Mapping[str, Any]
    problems: tuple[str, ...] = ()


def read_run(path: Path) -> RunFile:
    """Read a YAML file, or an adapter's `register.json`.

    Raises:
        SettingsError: the file can't be read, or is no YAML.
    """
    document = _document(path)
    if "schema_version" in document and isinstance(document.get("training"), dict):
        document = _of_card(document)
    problems: list[str] = []
    given: dict[str, Any] = {}
    names = {name: name for name in _model().model_fields} | {option: name for name, option in OPTIONS.items()}
    for key, value in document.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            near = difflib.get_close_matches(str(key).replace("_", "-"), [n.replace("_", "-") for n in names], 1)
            problems.append(f"there is no option {str(key)[:80]!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
        elif name in given:
            problems.append(f"{str(key)!r}: it is given twice")
        else:
            given[name] = value
    try:
        read = _model().model_validate(given)
    except ValidationError as error:
        problems += [_as_options(problem) for problem in problems_of(error)]
        wrong = {item["loc"][0] for item in error.errors()}
        read = _model().model_validate({name: value for name, value in given.items() if name not in wrong})
    return RunFile(read.model_dump(exclude_unset=True), tuple(problems))


def written(settings: TrainSettings, **further: Any) -> str:
    """Settings as such a file, every option by the name that the command has for it."""
    import yaml

    plain = {OPTIONS.get(f.name, f.name): _plain(getattr(settings, f.name)) for f in fields(settings)}
    plain |= {name: _plain(value) for name, value in further.items()}
    named = {name.replace("_", "-"): value for name, value in plain.items()}
    return str(yaml.safe_dump(named, sort_keys=False, allow_unicode=True))


def _as_options(problem: str) -> str:
    """A finding, by the name that the option has."""
    name = problem.partition(":")[0].partition(".")[0]
    return problem.replace(name, OPTIONS.get(name, name).replace("_", "-"), 1)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return ",".join(value)
    return dict(value) if isinstance(value, Mapping) else value


def _document(path: Path) -> dict[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Which says so where a key stands twice (the last one would win), and takes yes, no, on and off as texts."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            letter: [(tag, form) for tag, form in known if not tag.endswith(":bool") or letter in "tTfF"]
            for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return dict(loader.construct_mapping(node, deep=True))

    # Where a dot is missing ("1e-3") YAML's own rules see a text; pydantic reads it as the number that it is.
    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        document = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror}", next_step="Give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        where = f", line {place.line + 1}" if place is not None else ""
        why = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise SettingsError(
            f"{path} is not YAML{where}: {why}", next_step="Write one option a line: lr: 1e-3"
        ) from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        text = f"{path} holds a {type(document).__name__}, not options with their values"
        raise SettingsError(text, next_step="Write one option a line: lr: 1e-3")
    return document


def _of_card(card: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run that left this card."""
    recorded = dict(card["training"])
    options = {key.removeprefix("option "): recorded.pop(key) for key in list(recorded) if key.startswith("option ")}
    if "template_variables" in recorded:
        recorded["template_variables"] = json.loads(recorded["template_variables"])
    recorded = {key: value for key, value in recorded.items() if key in _model().model_fields}
    stated = {key: card[key] for key in ("register", "mode", "scene_types", "seed", "licence") if key in card}
    return {**recorded, **stated, "options": options}


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("it is not a number")
    return value


def _kept(value: Any, read: Callable[[Any], float]) -> Any:
    """A card that says 8 is written as 8 again, and not as 8.0."""
    number = read(value)
    return value if isinstance(value, int) else number


def _path(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, str) else value


def _words(value: Any) -> Any:
    return tuple(word.strip() for word in value.split(",") if word.strip()) if isinstance(value, str) else value


def _texts(value: Any) -> Any:
    """The values of a mode's options, which it reads as texts."""
    if not isinstance(value, dict):
        return value
    scalar = {key: isinstance(v, str | int | float) for key, v in value.items()}
    return {str(k): str(v).lower() if isinstance(v, bool) else str(v) if scalar[k] else v for k, v in value.items()}


@cache
def _model() -> type[BaseModel]:
    """The fields of the settings as pydantic reads them from what people write."""
    kinds: dict[Any, Any] = {
        int: Annotated[int, BeforeValidator(_number)],
        float: Annotated[float, BeforeValidator(_number), WrapValidator(_kept)],
        Path: Annotated[Path, BeforeValidator(_path)],
        Path | None: Annotated[Path | None, BeforeValidator(_path)],
        int | None: Annotated[int | None, BeforeValidator(_number)],
        tuple[str, ...]: Annotated[tuple[str, ...], BeforeValidator(_words)],
        Mapping[str, str]: Annotated[dict[str, str], BeforeValidator(_texts)],
        Mapping[str, Any]: dict[str, Any],
    }
    hints = {f.name: get_type_hints(TrainSettings)[f.name] for f in fields(TrainSettings)} | dict(_RUN)
    made: dict[str, Any] = {name: (kinds.get(hint, hint), None) for name, hint in hints.items()}
    with warnings.catch_warnings():  # BaseModel's metaclass has a `register`, which has nothing to do with ours
        warnings.simplefilter("ignore", UserWarning)
        return create_model("Run", __config__=ConfigDict(extra="forbid"), **made)
