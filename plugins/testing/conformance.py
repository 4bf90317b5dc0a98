"""What every mode has to hold, as a class of tests that its author puts into one line of a test file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import GROUP, load_modes
from lora_rt.plugins.testing.contexts import gate_context
from lora_rt.plugins.testing.hosts import host_of
from lora_rt.plugins.testing.workshop import EXAMPLES, Workshop
from lora_rt.registry.packages import points_of

if TYPE_CHECKING:
    from torch import Tensor

    from lora_rt.plugins.contract import Gate

_CLOSE = 1e-4
_NOT_AT_IMPORT = ("torch", "lora_rt.core", "lora_rt.registry", "lora_rt.plugins.manager")
_PROMPTS = ("rain", "a longer prompt about bread")


def conformance(
    mode: str | ModuleType,
    *,
    options: Mapping[str, str] | None = None,
    examples: Sequence[Mapping[str, Any]] = EXAMPLES,
    scene_types: Sequence[str] = ("body", "logic"),
    static_at_start: bool = True,
) -> type[Conformance]:
    """The class of tests for one mode; its name in the test file begins with Test.

    Args:
        mode: the name of an installed mode, or its module.
        options: the mode's own options in the training run.
        examples: lines of training data, where the mode needs other fields than scene and text; four or more.
        scene_types: scene types that the adapter is trained for and that rows are given.
        static_at_start: whether the untrained state composes like output-only. Not so for a mode whose gate is not 1
            from the start on.
    """
    settings = {
        "mode": mode,
        "options": dict(options or {}),
        "examples": tuple(examples),
        "scene_types": tuple(scene_types),
        "static_at_start": static_at_start,
    }
    return type("TestConformance", (Conformance,), settings)


class Conformance:
    """The tests. Each is a claim about `mode`; `workshop` makes the adapters and runtimes that they are tried on."""

    mode: str | ModuleType
    options: Mapping[str, str]
    examples: Sequence[Mapping[str, Any]]
    scene_types: Sequence[str]
    static_at_start: bool
    _workshop: Workshop | None = None

    @pytest.fixture
    def workshop(self, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
        """The mode at work, set up once for all claims and kept on the class."""
        cls = type(self)
        if cls._workshop is None:
            name = cls.mode if isinstance(cls.mode, str) else "mine"
            host = load_modes(blocked=()) if name is cls.mode else host_of(cls.mode, name)
            folder = tmp_path_factory.mktemp("workshop")
            cls._workshop = Workshop(folder, host, name, cls.options, cls.examples, cls.scene_types)
        return cls._workshop

    def test_it_loads_without_a_fault(self, workshop: Workshop) -> None:
        """The host takes it: API version, names and arguments of the hooks are right."""
        records = [record for record in workshop.host.records if record.name == workshop.mode]
        assert records, f"no package has the mode {workshop.mode!r} in its entry points"
        assert (records[0].status, records[0].reason) == ("ok", "")

    def test_its_import_is_light_and_stands_on_the_contract(self, workshop: Workshop) -> None:
        """`lora-rt --help` imports every mode: torch belongs into the hooks, and core nowhere."""
        code = (
            "import importlib, sys; importlib.import_module(sys.argv[1]); print(*set(sys.argv[2:]) & set(sys.modules))"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", code, self._module_name(workshop.mode), *_NOT_AT_IMPORT]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.split() == [], "the import of the mode brings these in"

    def test_an_option_that_it_does_not_know_is_refused(self, workshop: Workshop) -> None:
        """A mistyped option must not train for hours as if it were not there; `read_options` does this."""
        self._needs_objective(workshop)
        with pytest.raises(LoraRtError) as caught:
            workshop.objective(options={**self.options, "no-such-option": "1"})
        assert "no-such-option" in str(caught.value)

    def test_examples_become_tokens_with_labels(self, workshop: Workshop) -> None:
        """Every example is good, and gives sequences in which something is learned."""
        self._needs_objective(workshop)
        objective = workshop.objective()
        for example in self.examples:
            missing = [field for field in objective.fields if not example.get(field)]
            assert not missing, f"{example} lacks {missing}; give `examples` with the fields of the mode"
            assert objective.check(example) == []
            sequences = objective.encode(example)
            assert sequences
            assert all(any(label >= 0 for label in item.labels[1:]) for item in sequences), "nothing carries loss"

    def test_two_runs_with_one_seed_begin_alike(self, workshop: Workshop) -> None:
        """The same encodings, the same state."""
        self._needs_objective(workshop)
        first, second = workshop.objective(seed=3), workshop.objective(seed=3)
        assert [first.encode(e) for e in self.examples] == [second.encode(e) for e in self.examples]
        one, other = (o.state.state_dict() if o.state else {} for o in (first, second))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    def test_a_step_of_training_moves_the_adapter(self, workshop: Workshop) -> None:
        """The loss reaches the weights."""
        tensors = load_file(workshop.trained / "adapter_model.safetensors")
        assert any(bool(tensor.any()) for name, tensor in tensors.items() if ".lora_B." in name), (
            "every B is still zero"
        )

    def test_its_state_is_saved_and_read_back(self, workshop: Workshop) -> None:
        """mode.safetensors holds what the objective's state is made of, and a new runtime speaks the same with it."""
        if workshop.trains:
            state = workshop.objective().state
            file = workshop.trained / "mode.safetensors"
            saved = load_file(file) if file.exists() else {}
            assert saved.keys() == (state.state_dict() if state else {}).keys()
        again = workshop.new_runtime()
        again.load_adapter(str(workshop.strong), name="strong")
        prompt, scene = _PROMPTS[1], self.scene_types[:1] or None
        before = workshop.runtime.generate([prompt], "strong", scenes=scene, max_new_tokens=8)
        assert again.generate([prompt], "strong", scenes=scene, max_new_tokens=8) == before

    def test_an_untrained_adapter_changes_nothing(self, workshop: Workshop) -> None:
        """At its start B is zero: whatever the gate, the base speaks."""
        runtime = workshop.new_runtime()
        runtime.load_adapter(str(workshop.untrained), name="untrained")
        ids = _ids(workshop, _PROMPTS[:1])
        torch.testing.assert_close(
            runtime.logits(ids, None, "untrained"), runtime.logits(ids), rtol=_CLOSE, atol=_CLOSE
        )

    def test_its_untrained_state_composes_statically(self, workshop: Workshop) -> None:
        """A gate that has learned nothing is 1, and the weights are the user's."""
        if not self.static_at_start:
            pytest.skip("the mode's gate is not 1 from the start on")
        runtime = workshop.new_runtime()
        runtime.load_adapter(str(workshop.untuned), name="untuned")
        runtime.load_adapter(str(workshop.plain), name="plain")
        ids = _ids(workshop, _PROMPTS[:1])
        for scene in (None, *self.scene_types):
            ours = runtime.logits(ids, None, "untuned:0.7", scenes=[scene])
            torch.testing.assert_close(ours, runtime.logits(ids, None, "plain:0.7"), rtol=_CLOSE, atol=_CLOSE)

    def test_the_weight_zero_is_the_base(self, workshop: Workshop) -> None:
        """Whatever the mode makes of weights and gates, a term of weight 0 is not there."""
        ids = _ids(workshop, _PROMPTS[:1])
        none = workshop.runtime.logits(ids)
        torch.testing.assert_close(workshop.runtime.logits(ids, None, "strong:0"), none, rtol=_CLOSE, atol=_CLOSE)

    def test_a_row_of_a_batch_equals_the_row_alone(self, workshop: Workshop) -> None:
        """Rows of other lengths, compositions and scene types beside it, and padding, change nothing."""
        rows = self._rows()
        together = workshop.runtime.generate(
            [r[0] for r in rows], [r[1] for r in rows], scenes=[r[2] for r in rows], max_new_tokens=8
        )
        alone = [workshop.runtime.generate([p], [c], scenes=[s], max_new_tokens=8)[0] for p, c, s in rows]
        assert together == alone

    def test_threads_do_not_meet(self, workshop: Workshop) -> None:
        """Hooks are called from several threads at once, and keep nothing between calls."""
        rows = self._rows()

        def speak(row: tuple[str, str | None, str | None]) -> str:
            return workshop.runtime.generate([row[0]], [row[1]], scenes=[row[2]], max_new_tokens=8)[0]

        alone = [speak(row) for row in rows]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(speak, rows * 2)) == alone * 2

    def test_a_gate_with_a_cache_equals_one_pass(self, workshop: Workshop) -> None:
        """Decoding shows the gate one new token at a time; what it says about a token must not depend on that."""
        if not workshop.host.implements(workshop.mode, "lora_rt_gate"):
            pytest.skip("the mode has no gate")
        lengths, scenes, total = [3, 3], self._scenes(2), 8
        whole = self._gates(workshop, lengths, scenes, total, 0)
        passes = [self._gates(workshop, lengths, scenes, 3, 0)]
        passes += [self._gates(workshop, lengths, scenes, 1, first) for first in range(3, total)]
        for part, full in whole.items():
            torch.testing.assert_close(
                torch.cat([gates[part] for gates in passes], dim=2), full, rtol=_CLOSE, atol=_CLOSE
            )

    def _rows(self) -> list[tuple[str, str | None, str | None]]:
        """(prompt, composition, scene type)."""
        compositions = ("strong", None, "strong:0.5 plain:0.3", "plain")
        return [(_PROMPTS[i % 2], c, s) for i, (c, s) in enumerate(zip(compositions, self._scenes(4), strict=True))]

    def _scenes(self, count: int) -> list[str | None]:
        cycle = [*self.scene_types, None]
        return [cycle[i % len(cycle)] for i in range(count)]

    def _gates(
        self, workshop: Workshop, lengths: Sequence[int], scenes: Sequence[str | None], tokens: int, first: int
    ) -> dict[str, Tensor]:
        """Both gates of a pass in full shape: (layers, batch, tokens, rank or heads)."""
        adapter = workshop.runtime.resident("strong")
        context = gate_context(
            lengths, tokens, first, state=adapter.state, scene_types=scenes, card=adapter.card, rank=adapter.rank
        )
        with torch.inference_mode():
            gate = workshop.host.gate(workshop.mode, context)
        return _full(gate, (context.base.layers, len(lengths), tokens), adapter.rank, context.base.heads)

    def _module_name(self, mode: str) -> str:
        if isinstance(self.mode, ModuleType):
            return self.mode.__name__
        return next(point for point in points_of(GROUP)[0] if point.name == mode).module

    @staticmethod
    def _needs_objective(workshop: Workshop) -> None:
        if not workshop.trains:
            pytest.skip("the mode has no objective")


def _full(gate: Gate | None, place: tuple[int, int, int], rank: int, heads: int) -> dict[str, Tensor]:
    full = {}
    for part, last in (("ranks", rank), ("heads", heads)):
        tensor = getattr(gate, part) if gate is not None else None
        full[part] = (torch.ones(()) if tensor is None else tensor).expand(*place, last)
    return full


def _ids(workshop: Workshop, prompts: Sequence[str]) -> list[list[int]]:
    return [[int(i) for i in workshop.runtime.tokenizer(prompt).input_ids] for prompt in prompts]
