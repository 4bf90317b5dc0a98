"""A server over a tiny float32 base, on a free port of the loopback, and what it serves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_rt.core.base.load import load_base
from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.settings import ServeSettings
from lora_rt.registry.registry import Registry
from support.serving import ADMIN, CHANGES, Fading, Live, Raising, live
from support.tiny import Zoo, mode_host

if TYPE_CHECKING:
    import openai


@pytest.fixture(scope="package")
def project(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose names are two plain adapters, a third one, one gated by position, and one that can raise."""
    folder = tmp_path_factory.mktemp("project")
    plain: dict[str, dict[str, Any]] = {
        "one": {"seed": 41},
        "two": {"seed": 42, "r": 3, "targets": ["q_proj", "down_proj"]},
        "huge": {"seed": 5},
        "fading": {"seed": 3, "mode": "fading"},
        "raising": {"seed": 3, "mode": "raising"},
    }
    for name, options in plain.items():
        shutil.copytree(zoo.adapter("llama", changes=CHANGES, **options), folder / name)
    lines = [f'{name} = "./{name}"' for name in plain]
    (folder / "lora-rt.toml").write_text("[adapters]\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="package")
def runtime(zoo: Zoo, project: Path) -> Runtime:
    """A runtime of that project."""
    base = load_base(str(zoo.base("llama", **CHANGES)), "float32", "cpu")
    return Runtime(base, mode_host(fading=Fading, raising=Raising), Registry(project=project))


@pytest.fixture(scope="package")
def server(runtime: Runtime) -> Iterator[Live]:
    """The server that most tests ask."""
    with live(runtime, ServeSettings(port=0, admin_key=ADMIN)) as started:
        yield started


@pytest.fixture(scope="package")
def client(server: Live) -> Iterator[openai.OpenAI]:
    """OpenAI's own client of that server."""
    with server.openai() as opened:
        yield opened
