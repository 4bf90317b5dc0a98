"""Who may know whom: import-linter's contracts in pyproject.toml, and imports that must stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "huggingface_hub", "pydantic", "matplotlib", "numpy")


def test_the_layers_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


def test_no_module_leads_back_to_itself() -> None:
    """Imports inside functions count; those for type checkers alone do not."""
    graph = grimp.build_graph("lora_rt", exclude_type_checking_imports=True)
    edges = [(name, other) for name in graph.modules for other in graph.find_modules_directly_imported_by(name)]
    circles = [
        sorted(part) for part in networkx.strongly_connected_components(networkx.DiGraph(edges)) if len(part) > 1
    ]
    assert circles == []


@pytest.mark.parametrize(
    "statement",
    [
        "import lora_rt",
        "import lora_rt.core.cli.app",
        "import lora_rt.plugins.contract",
        "import lora_rt.plugins.modes.output_only, lora_rt.plugins.modes.context, lora_rt.plugins.modes.router",
        "import lora_rt.plugins.modes.bridge.commands",
    ],
)
def test_a_light_import_pulls_in_nothing_heavy(statement: str) -> None:
    code = f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy_either() -> None:
    code = (
        "import sys, runpy; sys.argv = ['lora-rt', '--help']\n"
        "try: runpy.run_module('lora_rt', run_name='__main__')\n"
        f"except SystemExit: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
