"""The runtime: one base, its resident adapters, and text that several of them speak together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from lora_rt.core.base.load import LoadedBase, load_base
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.hidden_states import EarlyHidden
from lora_rt.core.generation.batch import given_batch
from lora_rt.core.generation.decode import Decoder
from lora_rt.core.generation.prompts import Prompt, TextFormat
from lora_rt.core.generation.sampling import Sampling, seeds_per_row
from lora_rt.core.generation.scoring import answer_nll, choices_nll
from lora_rt.core.generation.text import TextStream, text_of
from lora_rt.core.requests.composition import Composition, Term
from lora_rt.core.requests.explaining import Explanation, explain
from lora_rt.core.requests.planner import RowPlanner
from lora_rt.core.requests.residents import AdapterInfo, Residents
from lora_rt.core.requests.rows import Compositions, RequestError, Row, per_row, scenes_per_row
from lora_rt.core.requests.scene_classifier import SceneClassifier
from lora_rt.core.requests.timeline import Timeline
from lora_rt.core.requests.weigher import Weigher
from lora_rt.plugins.contract import BaseFacts, SceneType
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry

Seeds = int | None | Sequence[int | None]


class Runtime:
    """One base in memory and the adapters that are resident over it.

    The composition is an argument of every call and never a setting of the runtime: calls from several threads do not
    see each other's weights.
    """

    def __init__(
        self,
        base: LoadedBase,
        modes: ModeHost,
        registry: Registry,
        *,
        template_variables: Mapping[str, Any] | None = None,
        special_tokens: bool = False,
    ) -> None:
        """Use `Runtime.load`; this is for callers who have loaded the parts themselves."""
        self._base = base
        self._modes = modes
        self._bank = AdapterBank(base.model, base.dtype)
        self._early = EarlyHidden(base.model, base.facts.layers)
        self._residents = Residents(base, self._bank, modes, registry)
        self._classifier = SceneClassifier(self._bank, modes, base.facts, self._early)
        self._weigher = Weigher(self._residents, modes, base.facts, self._classifier)
        self.text = TextFormat.of_base(base, template_variables, special_tokens=special_tokens)
        self._pad_id = self.text.pad_id
        self._decoder = Decoder(base.model, self._pad_id, self.text.end_ids)

    @classmethod
    def load(
        cls,
        base: str = "default",
        *,
        precision: str = "int4",
        device: str = "auto",
        project: Path | None = None,
        template_variables: Mapping[str, Any] | None = None,
        special_tokens: bool = False,
        modes: ModeHost | None = None,
        registry: Registry | None = None,
    ) -> Runtime:
        """Load a base, fetching and quantizing it first where that has not been done yet.

        Args:
            base: "default", a folder, a GGUF file, or a hub id with an optional @revision.
            precision: float32, bfloat16, float16, int8 or int4 (NF4, double quantization, bfloat16 compute).
            device: "auto" (the first GPU if there is one), "cpu", "cuda" or "cuda:N".
            project: the folder whose lora-rt.toml names adapters; the working directory by default.
            template_variables: of the base's chat template, for instance {"enable_thinking": False}.
            special_tokens: read `<|im_end|>` and the like in prompts and answers as tokens; they are text by default.
            modes, registry: those that the caller has opened already.

        Raises:
            LoraRtError: with what went wrong and what to do.
        """
        modes = modes or load_modes()
        registry = registry or Registry(project=project, sources=modes.sources())
        loaded = load_base(base, precision, device)
        return cls(loaded, modes, registry, template_variables=template_variables, special_tokens=special_tokens)

    @property
    def base(self) -> BaseFacts:
        """Facts about the base: id, revision, digest, precision and sizes."""
        return self._base.facts

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, as transformers made it."""
        return self._base.tokenizer

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """The resident adapters by name."""
        return dict(self._residents.infos)

    def load_adapter(self, reference: str, name: str | None = None) -> str:
        """Make an adapter resident, under its own name or the one given, and return that name.

        Raises:
            LoraRtError: it can't be resolved, is refused, or does not fit this base.
        """
        return self._residents.load(reference, name)

    def ensure(self, reference: Reference | str) -> str:
        """The resident name of a reference, made resident first where it is not.

        Raises:
            LoraRtError: as `load_adapter`.
        """
        parsed = Reference.parse(reference) if isinstance(reference, str) else reference
        return self._residents.ensure(Composition((Term(parsed),)))[0][0].name

    def terms(self, composition: Composition | str) -> list[tuple[AdapterInfo, float]]:
        """The adapters of a composition, made resident where they are not, and their weights.

        Named compositions are resolved; of weights per layer it is the mean.

        Raises:
            LoraRtError: terms that can't be loaded; all of them are named.
        """
        given = Composition.parse(composition) if isinstance(composition, str) else composition
        return self._residents.ensure(given)

    def unload_adapter(self, name: str) -> None:
        """Forget a resident adapter; the base is untouched.

        Raises:
            LoraRtError: it is not resident.
        """
        self._residents.unload(name)

    def base_digest(self) -> str:
        """The sha256 of the base's weights as they lie in memory; no adapter ever changes it."""
        return self._base.digest()

    @overload
    def generate(self, prompts: str, compositions: Compositions = ..., **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], compositions: Compositions = ..., **options: Any) -> list[str]: ...
    def generate(  # type: ignore[misc]  # the options are spelled out once, here
        self,
        prompts: str | Sequence[Prompt],
        compositions: Compositions = None,
        *,
        scenes: Sequence[SceneType] | str | None = None,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: Seeds = None,
    ) -> str | list[str]:
        """The answers to one or several prompts, each under its own composition, in one batch.

        Args:
            prompts: a user message, or a list whose items are user messages or lists of chat messages.
            compositions: one for all rows, or one per row; None is the base alone.
            scenes: the scene type of each row, for modes that gate by it.
            max_new_tokens, min_new_tokens: bounds on the answer, in tokens.
            temperature, top_p, top_k: sampling; greedy where temperature is None or 0.
            repetition_penalty: on the answer's own tokens, 1 is off.
            seed: one for all rows or one per row. A row's sample depends on its own seed alone.

        Returns:
            A string for a string, a list for a list.

        Raises:
            LoraRtError: a prompt, composition or setting can't be used.
        """
        if isinstance(prompts, Mapping):
            raise RequestError("prompts is one chat message", next_step="Give [[message, ...], ...]: one list per row")
        single = isinstance(prompts, str)
        given: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)
        if not given:
            return []
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, max_new_tokens, min_new_tokens)
        answers: list[list[int]] = [[] for _ in given]
        for tokens in self._decode(given, compositions, scenes, sampling, seed):
            for answer, token in zip(answers, tokens, strict=True):
                if token is not None:
                    answer.append(token)
        texts = [text_of(self.tokenizer, answer) for answer in answers]
        return texts[0] if single else texts

    def stream(
        self,
        prompt: Prompt,
        composition: Compositions = None,
        *,
        scene: SceneType = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer to one prompt, piece by piece as it is decoded; joined, the pieces are what `generate` returns.

        Takes the sampling settings of `generate` by name.
        """
        chosen = Sampling(**sampling)
        text = TextStream(self.tokenizer)
        for tokens in self._decode([prompt], composition, [scene], chosen, seed):
            if tokens[0] is not None and (piece := text.push(tokens[0])):
                yield piece
        if rest := text.rest():
            yield rest

    def decode(
        self,
        input_ids: Sequence[Sequence[int]],
        compositions: Compositions = None,
        scenes: Sequence[SceneType] | str | None = None,
        *,
        seed: Seeds = None,
        **sampling: Any,
    ) -> Iterator[list[int | None]]:
        """`generate` on token ids, one list of ids per row: yields each step's token per row, None where it has ended.

        Takes the sampling settings of `generate` by name.
        """
        chosen = Sampling(**sampling)
        chosen.check()
        seeds = seeds_per_row(seed, len(input_ids))
        rows = self._rows(compositions, scenes, [None] * len(input_ids), input_ids)
        return self._decoder.decode(input_ids, self._planner(rows), chosen, seeds)

    def logits(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        compositions: Compositions = None,
        scenes: Sequence[SceneType] | str | None = None,
    ) -> Tensor:
        """The logits of whole rows, (batch, tokens, vocab), each row under its own composition.

        Args:
            input_ids: (batch, tokens). attention_mask: the same shape, 0 on padding (on either side); where left out,
                nothing is padding. A padded row's real positions equal those of the row unpadded.
            compositions, scenes: as in `generate`.
        """
        ids, mask = given_batch(input_ids, attention_mask, self.base.vocab_size, self._base.device)
        real = [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]
        rows = self._rows(compositions, scenes, [None] * len(ids), real)
        # A copy made here is an ordinary tensor; one that inference mode made could not be changed.
        return self._decoder.logits(ids, mask, self._planner(rows)).clone()

    def answer_nll(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        compositions: Compositions = None,
        scenes: Sequence[SceneType] | str | None = None,
    ) -> list[Tensor]:
        """How unlikely each answer is after its prompt: per row a float32 tensor (answer tokens,) in nats.

        The answer is followed by the end of the turn, which counts as its last token.
        """
        ids = [self.text.prompt_ids(prompt) for prompt in prompts]
        texts = [self.text.answer_ids(answer) for answer in answers]
        rows = self._rows(compositions, scenes, prompts, ids)
        return answer_nll(self._decoder, self._planner(rows), ids, texts, self._pad_id, self._base.device)

    def choices_nll(
        self,
        prompt: Prompt,
        answers: Sequence[str],
        composition: Composition | str | None = None,
        scene: SceneType = None,
    ) -> list[Tensor]:
        """`answer_nll` of several answers to one prompt, which is read once instead of once per answer."""
        if not answers:
            return []
        ids = self.text.prompt_ids(prompt)
        texts = [self.text.answer_ids(answer) for answer in answers]
        (row,) = self._rows([composition], [scene], [prompt], [ids])
        planners = self._planner([row]), self._planner([row] * len(texts))
        return choices_nll(self._decoder, planners, ids, texts, self._pad_id, self._base.device)

    def register_scenes(self, prompts: Sequence[Prompt], adapter: str) -> list[dict[str, float]]:
        """The scene types of prompts by the classifier of a resident adapter: type -> share, each adding up to 1.

        Raises:
            LoraRtError: the adapter is not resident, or its mode registers no scenes.
        """
        if adapter not in self.adapters:
            raise RequestError(f"no adapter {adapter!r} is resident", next_step="Load it first")
        found = self._classifier.ask(adapter, [self.text.prompt_ids(prompt) for prompt in prompts])
        if found is None:
            text = f"the mode {self.adapters[adapter].mode!r} of {adapter!r} registers no scenes"
            raise RequestError(text, next_step="Use an adapter of the mode context")
        return [dict(zip(found.types, shares, strict=True)) for shares in found.probabilities.tolist()]

    def explain(
        self, prompt: Prompt, composition: Composition | str, *, scene: SceneType = None, answer: str = ""
    ) -> Explanation:
        """How much each adapter adds, by layer, head and token, while the base reads a prompt and the answer behind it.

        Raises:
            LoraRtError: no adapter acts, or the composition can't be used.
        """
        ids = self.text.prompt_ids(prompt)
        (row,) = self._rows([Composition.of(composition)], [scene], [prompt], [ids])
        tokens = [*ids, *self.text.text_ids(answer)]
        return explain(self._base.model, self._bank, lambda one: self._planner([one]), row, tokens, len(ids))

    def _decode(
        self,
        prompts: Sequence[Prompt],
        compositions: Compositions,
        scenes: Sequence[SceneType] | str | None,
        sampling: Sampling,
        seed: Seeds,
    ) -> Iterator[list[int | None]]:
        sampling.check()
        seeds = seeds_per_row(seed, len(prompts))
        ids = [self.text.prompt_ids(prompt) for prompt in prompts]
        rows = self._rows(compositions, scenes, prompts, ids)
        return self._decoder.decode(ids, self._planner(rows), sampling, seeds)

    def _rows(
        self,
        compositions: Compositions,
        scenes: Sequence[SceneType] | str | None,
        prompts: Sequence[Prompt | None],
        ids: Sequence[Sequence[int]],
    ) -> list[Row]:
        count = len(prompts)
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        return self._weigher.rows(per_row(compositions, count), scenes_per_row(scenes, count), texts, ids)

    def _planner(self, rows: Sequence[Row]) -> RowPlanner:
        timeline = Timeline(rows, self.tokenizer.decode)
        return RowPlanner(rows, self._bank, self._modes, self._base.facts, self._early, timeline)
