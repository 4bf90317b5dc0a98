"""The pages and the tables of contents that tell a newcomer where things lie: what they name is there."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [
    folder
    for top in ("core", "plugins", "registry", "examples/lora-rt-vllm/lora_rt_vllm")
    for folder in (file.parent for file in (ROOT / top).rglob("__init__.py"))
]
MODULE = re.compile(r"(?<![\w/])([a-z_0-9]+)\.py\b")


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_package_that_lists_its_modules_lists_all_of_them_and_no_others(folder: Path) -> None:
    """One that names fewer than half of them tells of something else."""
    named = set(MODULE.findall(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""))
    there = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    named.discard("conftest")  # an author's own
    assert named <= there
    assert len(named) < len(there) / 2 or named == there


PAGES = [
    "core/ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "README.md",
    *(str(page.relative_to(ROOT)) for top in ("examples", "tests") for page in sorted((ROOT / top).glob("*/*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    """A path from the top, from core, or from a folder of core; a name alone, anywhere."""
    named = re.findall(r"`([\w-]+(?:/[\w-]+)*(?:/|\.(?:py|md|sh|json|lock)))`", (ROOT / page).read_text())
    asked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT)
    there = [f"/{file}" for file in asked.stdout.split()]
    missing = [
        name
        for name in named
        if not any(file.endswith(f"/{name}") or (name.endswith("/") and f"/{name}" in file) for file in there)
    ]
    assert sorted({*missing} - OF_USERS) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_to_a_file_and_a_heading(page: str) -> None:
    """Hosts make a heading's anchor of its words in small letters, with hyphens for blanks."""
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        heads = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor and there.is_file() else []
        anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
        if not there.exists() or (anchor and anchor not in anchors):
            lost.append(link)
    assert lost == []


OF_USERS = {
    "out/",
    "lora_rt/",
    "register.json",
    "lora-rt.lock",
    "adapter_config.json",
}  # theirs, or what a command makes


def shown(page: str) -> list[list[str]]:
    """The words of every `lora-rt` command of a page, in a block or in a sentence."""
    text = (ROOT / page).read_text()
    fenced = re.findall(r"^```(?:console|sh)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    commands = [re.search(r"(?:^|[|$] )(lora-rt [^|>\s][^|>]*)", " ".join(line.split())) for line in lines]
    return [shlex.split(found[1].partition(" -- ")[0].partition(" # ")[0]) for found in commands if found]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_that_a_page_shows_have_these_names_and_options(page: str) -> None:
    from lora_rt.core.cli.plugin_commands import plugin_commands
    from lora_rt.core.cli.table import COMMANDS, load
    from lora_rt.plugins.manager import load_modes

    theirs = plugin_commands(load_modes())
    wrong = []
    for line in shown(page):
        name, words = line[1], line[2:]
        if name in ("--help", "fade-in"):  # the latter is of a package under examples/
            continue
        command: Any = load(name) if name in COMMANDS else theirs.get(name)
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        options = {option for parameter in getattr(command, "params", ()) for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        if command is None or given - options:
            wrong.append(" ".join(line))
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_the_python_that_a_page_shows_is_python(page: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        compile(block, page, "exec")


def test_the_floors_of_the_page_are_those_that_are_held() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (contract,) = [c for c in project["tool"]["importlinter"]["contracts"] if c["name"] == "the floors inside core"]
    held = [re.split(r"\s*\|\s*", floor) for floor in contract["layers"]]
    page = (ROOT / "core/ARCHITECTURE.md").read_text()
    table = page.partition("Floors inside core")[2].partition("```")[2].partition("```")[0]
    told = [re.findall(r"(?<!\S)(\w+)(?:/|\.py)(?!\S)", line) for line in table.strip().splitlines()]
    assert [set(floor) for floor in told] == [set(floor) for floor in held]


def test_the_vocabularys_hooks_are_those_of_the_contract() -> None:
    """Of the page on architecture: each is told once, with when it fires."""
    from lora_rt.plugins.contract import hooks

    there = {name for name in vars(hooks) if name.startswith("lora_rt_")}
    told = re.findall(r"^\| `(lora_rt_\w+)` \|", (ROOT / "core/ARCHITECTURE.md").read_text(), re.MULTILINE)
    assert set(told) == there
    assert len(told) == len(there)
