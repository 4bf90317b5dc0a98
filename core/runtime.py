"""The runtime: one base, its resident adapters, and text that several of them speak together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, overload

from torch import Tensor, ones_like, tensor

from lora_rt.core.base.choices import check_wish
from lora_rt.core.base.given import given_base
from lora_rt.core.base.load import LoadedBase, load_base
from lora_rt.core.base.source import text_of
from lora_rt.core.engine.plan import Plan
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.generation.batch import Batch
from lora_rt.core.generation.messages import Prompt, one_per_row
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.generation.row import PassInfo, check_numbers
from lora_rt.core.generation.sampling import Sampling, Seeds, seeds_per_row
from lora_rt.core.generation.scoring import answer_nll, choices_nll, given_batch, given_ids, whole_logits
from lora_rt.core.native import openmp
from lora_rt.core.requests.adapted import AdaptedBase
from lora_rt.core.requests.composition import Composition, CompositionLike, Term
from lora_rt.core.requests.explaining import Explanation, explain
from lora_rt.core.requests.residents import AdapterInfo
from lora_rt.core.requests.rows import Compositions, RequestError, Scenes
from lora_rt.core.requests.running import RequestRow, RowStream
from lora_rt.plugins.contract import BaseFacts, SceneType
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry


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
        multiply: str | None = None,
    ) -> None:
        """Use `Runtime.load`; this is for callers who have loaded the parts themselves."""
        self.text = TextFormat.of_base(base, template_variables, special_tokens=special_tokens)
        self._adapted: AdaptedBase | None = AdaptedBase(base, modes, registry, self.text, multiply)

    @classmethod
    @openmp.visiting()
    def load(
        cls,
        base: str | PathLike[str] = "default",
        *,
        precision: str = "int4",
        device: str = "auto",
        project: str | PathLike[str] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        special_tokens: bool = False,
        modes: ModeHost | None = None,
        registry: Registry | None = None,
        allow_base_mismatch: bool = False,
        multiply: str | None = None,
    ) -> Runtime:
        """Load a base, fetching and quantizing it first where that has not been done yet.

        Args:
            base: "default", a folder, a GGUF file, or a hub id with an optional @revision.
            precision: float32, bfloat16, float16, int8 or int4 (NF4, double quantization, bfloat16 compute).
            device: "auto" (the first GPU if there is one), "cpu", "cuda" or "cuda:N"; a torch.device, too.
            project: the folder whose lora-rt.toml names adapters; the working directory by default.
            template_variables: of the base's chat template, for instance {"enable_thinking": False}.
            special_tokens: read `<|im_end|>` and the like in prompts and answers as tokens; they are text by default.
            modes, registry: those that the caller has opened already.
            allow_base_mismatch: take adapters that state another base, if their shapes fit.
            multiply: how weights that are kept in few bits are multiplied on a CPU: "packed", "dequantize" (made dense
                for every product), "dense" (a dense copy that is kept), or "auto", the fastest of them for each shape
                and number of tokens, as measured once on this machine. `$LORA_RT_MULTIPLY` where left out.

        Raises:
            LoraRtError: with what went wrong and what to do.
        """
        check_wish(multiply)
        modes, registry = _opened(modes, registry, project, allow_base_mismatch)
        loaded = load_base(text_of(base), precision, str(device))
        return cls(
            loaded,
            modes,
            registry,
            template_variables=template_variables,
            special_tokens=special_tokens,
            multiply=multiply,
        )

    @classmethod
    def over(
        cls,
        model: Any,
        tokenizer: Any,
        base_id: str | None = None,
        *,
        project: str | PathLike[str] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        special_tokens: bool = False,
        modes: ModeHost | None = None,
        registry: Registry | None = None,
        allow_base_mismatch: bool = False,
    ) -> Runtime:
        """A runtime over a model that is in memory already: on any device or several, quantized by anyone.

        The engine adds to the outputs of the model's linear layers, whatever these are. Closing gives the model back as
        it was; until then it is in eval mode, and outside of this runtime's calls no adapter acts on it. Of PEFT's
        model the base is used, and PEFT's adapters stay out. What is not done over it is training: give `train` the
        folder or hub id of the base.

        Args:
            model: a causal language model of transformers.
            tokenizer: its tokenizer.
            base_id: which base it is: "default", a folder, a GGUF file, or a hub id with an optional @revision. Left
                out, it is what the model calls itself: adapters of a base with another hub id are refused, others are
                taken where their shapes fit, with a warning where nothing tells that they belong here.
            project, template_variables, special_tokens, modes, registry, allow_base_mismatch: as in `load`.

        Raises:
            LoraRtError: with what went wrong and what to do; the model is then as it was.
        """
        modes, registry = _opened(modes, registry, project, allow_base_mismatch)
        base = given_base(model, tokenizer, base_id)
        try:
            return cls(
                base,
                modes,
                registry,
                template_variables=template_variables,
                special_tokens=special_tokens,
                multiply="packed",  # no copies of a model that is the caller's
            )
        except BaseException:
            base.give_back()
            raise

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the memory of base and adapters, and take all hooks off the model. A second time does nothing."""
        if self._adapted is not None:
            self._adapted.close()
            self._adapted = None

    @property
    def parts(self) -> AdaptedBase:
        """Base, bank, residents and planner, for programs that look inside.

        Raises:
            RequestError: the runtime was closed.
        """
        if self._adapted is None:
            raise RequestError("this runtime was closed", next_step="Load a new one with lora_rt.Runtime.load()")
        return self._adapted

    @property
    def _base(self) -> LoadedBase:
        """Scripts written for 0.1 read it."""
        return self.parts.base

    @property
    def base(self) -> BaseFacts:
        """Facts about the base: id, revision, digest, precision and sizes."""
        return self.parts.base.facts

    @property
    def model(self) -> Any:
        """The base's transformers model. Outside of this runtime's calls no adapter acts on it."""
        return self.parts.base.model

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, as transformers made it."""
        return self.parts.base.tokenizer

    @property
    def adapters(self) -> Mapping[str, AdapterInfo]:
        """The resident adapters by name."""
        return dict(self.parts.residents.infos)

    def resident(self, name: str) -> ResidentAdapter:
        """A resident adapter itself: factors, card and state.

        Raises:
            RequestError: it is not resident.
        """
        if name not in self.parts.bank.residents:
            raise RequestError(f"no adapter {name!r} is resident", next_step="Load it first")
        return self.parts.bank.residents[name]

    @openmp.visiting()
    def load_adapter(
        self,
        reference: Reference | str | PathLike[str],
        name: str | None = None,
        *,
        allow_base_mismatch: bool = False,
    ) -> str:
        """Make an adapter resident, under its own name or the one given, and return that name.

        With `allow_base_mismatch` one that states another base, if its shapes fit.

        Raises:
            LoraRtError: it can't be resolved, is refused, or does not fit this base.
        """
        return self.parts.residents.load(reference, name, allow_base_mismatch=allow_base_mismatch)

    def ensure(self, reference: Reference | str | PathLike[str]) -> str:
        """The resident name of a reference, made resident first where it is not.

        Raises:
            LoraRtError: as `load_adapter`.
        """
        return self.parts.residents.ensure(Composition((Term(Reference.of(reference)),)))[0][0].name

    def terms(self, composition: CompositionLike) -> list[tuple[AdapterInfo, float]]:
        """The adapters of a composition, made resident where they are not, and their weights.

        Named compositions are resolved; of weights per layer it is the mean.

        Raises:
            LoraRtError: terms that can't be loaded; all of them are named.
        """
        given = Composition.of(composition)
        return [] if given is None else self.parts.residents.ensure(given)

    def unload_adapter(self, name: str) -> None:
        """Forget a resident adapter; the base is untouched.

        Raises:
            LoraRtError: it is not resident.
        """
        self.parts.residents.unload(name)

    def base_digest(self) -> str:
        """The sha256 of the base's weights as they lie in memory; no adapter ever changes it."""
        return self.parts.base.digest()

    @overload
    def generate(self, prompts: str, compositions: Compositions = ..., **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], compositions: Compositions = ..., **options: Any) -> list[str]: ...
    def generate(  # type: ignore[misc]  # the options are spelled out once, here
        self,
        prompts: str | Sequence[Prompt],
        compositions: Compositions = None,
        *,
        scenes: Scenes = None,
        max_new_tokens: int = 256,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: Seeds = None,
        deterministic: bool = False,
    ) -> str | list[str]:
        """The answers to one or several prompts, each under its own composition, in one batch.

        Args:
            prompts: a user message, or a list whose items are user messages or lists of chat messages.
            compositions: one for all rows, or a list of one per row, each a text, a mapping from references to weights
                or a `Composition`; None is the base alone.
            scenes: a scene type for all rows or one for each, a name or shares of several, for modes that gate by it.
            max_new_tokens, min_new_tokens: bounds on the answer, in tokens; the end of the turn is held back before the
                least, a stop text ends it all the same.
            temperature, top_p, top_k: sampling; greedy where temperature is None or 0.
            repetition_penalty: on the answer's own tokens, 1 is off.
            stop: texts at which an answer ends, before them.
            seed: one for all rows or one per row. A row's sample depends on its own seed alone.
            deterministic: give every row forward passes of its own. A batch shares them, and in few bits its products
                are rounded otherwise than those of a row alone; with this, the texts are the same bit for bit.

        Returns:
            A string for a string, a list for a list.

        Raises:
            LoraRtError: a prompt, composition or setting can't be used.
        """
        if isinstance(prompts, Mapping):
            raise RequestError("prompts is one chat message", next_step="Give [[message, ...], ...]: one list per row")
        single = isinstance(prompts, str)
        given: list[Prompt] = [prompts] if isinstance(prompts, str) else one_per_row(prompts, "prompts")
        if not given:
            return []
        sampling = Sampling.given(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop=stop,
        )
        rows = self._prompted(given, compositions, scenes, sampling, seed)
        for _ in self._steps(rows, deterministic):
            pass
        texts = [row.new_text() for row in rows]
        return texts[0] if single else texts

    def stream(
        self,
        prompt: Prompt,
        composition: Compositions = None,
        *,
        scene: SceneType = None,
        seed: Seeds = None,
        deterministic: bool = False,
        **sampling: Any,
    ) -> RowStream:
        """The answer to one prompt, piece by piece as it is decoded; joined, the pieces are what `generate` returns.

        Takes the sampling settings of `generate` by name. The stream's `compose` changes the weights while it runs:

            stream = rt.stream("...", "emotion:0.7")
            for piece in stream:
                if "So:" in piece:
                    stream.compose("emotion:0.2 logic:0.8")
        """
        rows = self._prompted([prompt], composition, [scene], Sampling.given(**sampling), seed)
        return RowStream(rows[0], self._steps(rows, deterministic))

    def decode(
        self,
        input_ids: Sequence[Sequence[int]],
        compositions: Compositions = None,
        scenes: Scenes = None,
        *,
        seed: Seeds = None,
        deterministic: bool = False,
        **sampling: Any,
    ) -> Iterator[list[int | None]]:
        """`generate` on token ids, one list of ids per row: yields each step's token per row, None where it has ended.

        Takes the sampling settings of `generate` by name.
        """
        ids = given_ids(input_ids, self.base.vocab_size)
        chosen, seeds = Sampling.given(**sampling), seeds_per_row(seed, len(ids))
        rows = self.parts.rows(ids, compositions, scenes, sampling=chosen, seeds=seeds)
        return self._steps(rows, deterministic)

    def batch(
        self,
        *,
        chunk: int | None = None,
        deterministic: bool = False,
        keep: Callable[[RequestRow, Any], None] | None = None,
    ) -> Batch[RequestRow]:
        """An empty batch that rows join and leave while it runs (see `lora_rt.core.generation.batch`).

        Args:
            chunk: how many tokens of newcomers are read in one step; None reads them at once.
            deterministic: as in `generate`.
            keep: told of each row that has ended, with the keys and values of what was read of it.
        """
        parts = self.parts
        ends = self.text.end_ids
        return Batch(parts.lm, parts.planner(), ends, chunk=chunk, deterministic=deterministic, keep=keep)

    def rows(
        self,
        prompts: Sequence[Prompt],
        compositions: Compositions = None,
        *,
        scenes: Scenes = None,
        seed: Seeds = None,
        **sampling: Any,
    ) -> list[RequestRow]:
        """Rows that can join a `batch`, each with the settings of `generate`; `compose` changes them while they run."""
        given = one_per_row(prompts, "prompts")
        return self._prompted(given, compositions, scenes, Sampling.given(**sampling), seed)

    def plan(
        self, input_ids: Sequence[Sequence[int]], compositions: Compositions = None, scenes: str | None = None
    ) -> Plan | None:
        """The plan that one pass over these rows, all of one length, would run under; None is the base alone."""
        rows = self.parts.rows(given_ids(input_ids, self.base.vocab_size), compositions, scenes)
        ids = tensor([row.ids for row in rows], device=self.parts.lm.device)
        return self.parts.planner()(PassInfo.of(rows, ids, ones_like(ids)), rows)

    def logits(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        attention_mask: Tensor | Sequence[Sequence[int]] | None = None,
        compositions: Compositions = None,
        scenes: Scenes = None,
    ) -> Tensor:
        """The logits of whole rows, (batch, tokens, vocab), each row under its own composition.

        Args:
            input_ids: (batch, tokens). attention_mask: the same shape, 0 on padding (on either side); where left out,
                nothing is padding. A padded row's real positions equal those of the row unpadded.
            compositions, scenes: as in `generate`.
        """
        ids, mask = given_batch(input_ids, attention_mask, self.base.vocab_size, self.parts.lm.device)
        real = [row[kept].tolist() for row, kept in zip(ids, mask.bool(), strict=True)]
        rows = self.parts.rows(real, compositions, scenes)
        return whole_logits(self.parts.lm, self.parts.planner(), rows, mask)

    def answer_nll(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        compositions: Compositions = None,
        scenes: Scenes = None,
    ) -> list[Tensor]:
        """How unlikely each answer is after its prompt: per row a float32 tensor (answer tokens,) in nats.

        The answer is followed by the end of the turn, which counts as its last token.

        Raises:
            LoraRtError: a prompt, answer or composition can't be used, or there are not as many answers as prompts.
        """
        given, wanted = one_per_row(prompts, "prompts"), one_per_row(answers, "answers")
        if len(given) != len(wanted):
            raise RequestError(f"{len(wanted)} answers for {len(given)} prompts", next_step="Give one for each")
        ids = [self.text.prompt_ids(prompt) for prompt in given]
        texts = [self.text.answer_ids(answer) for answer in wanted]
        rows = self._answered(ids, texts, compositions, scenes, given)
        return answer_nll(self.parts.lm, self.parts.planner(), rows, texts)

    def choices_nll(
        self,
        prompt: Prompt,
        answers: Sequence[str],
        composition: CompositionLike | None = None,
        scene: SceneType = None,
    ) -> list[Tensor]:
        """`answer_nll` of several answers to one prompt, which is read once instead of once per answer."""
        wanted = one_per_row(answers, "answers")
        if not wanted:
            return []
        ids = self.text.prompt_ids(prompt)
        texts = [self.text.answer_ids(answer) for answer in wanted]
        (alone,) = self.parts.rows([ids], [composition], [scene], prompts=[prompt])
        many = len(texts)
        rows = self._answered([ids] * many, texts, [composition] * many, [scene] * many, [prompt] * many)
        return choices_nll(self.parts.lm, self.parts.planner(), alone, rows, texts)

    def register_scenes(self, prompts: Sequence[Prompt], adapter: str) -> list[dict[str, float]]:
        """The scene types of prompts, each type -> share, adding up to 1.

        Args:
            prompts: as in `generate`.
            adapter: whose classifier: a resident adapter's, or that of a named composition with a mode.

        Raises:
            LoraRtError: there is no such adapter, or its mode recognizes no scenes.
        """
        asked = self.parts.residents.moded(adapter) or (self.resident(adapter) if adapter in self.adapters else None)
        if asked is None:
            raise RequestError(f"no adapter {adapter!r} is resident", next_step="Load it first")
        given = [self.text.prompt_ids(prompt) for prompt in one_per_row(prompts, "prompts")]
        found = self.parts.classifier.ask(asked, given)
        if found is None:
            text = f"the mode {asked.mode!r} of {adapter!r} recognizes no scenes"
            raise RequestError(text, next_step="Use an adapter of the mode context")
        return [dict(zip(found.types, shares, strict=True)) for shares in found.probabilities.tolist()]

    def explain(
        self, prompt: Prompt, composition: CompositionLike, *, scene: SceneType = None, answer: str = ""
    ) -> Explanation:
        """How much each adapter adds, by layer, head and token, while the base reads a prompt and the answer behind it.

        Raises:
            LoraRtError: no adapter acts, or the composition can't be used.
        """
        ids = self.text.prompt_ids(prompt)
        tokens = [*ids, *self.text.text_ids(answer)]
        (row,) = self.parts.rows([tokens], [composition], [scene], prompts=[prompt], lengths=[len(ids)])
        return explain(self.model, self.parts.bank, self.parts.planner(), row)

    def _prompted(
        self,
        prompts: Sequence[Prompt],
        compositions: Compositions,
        scenes: Scenes,
        sampling: Sampling,
        seed: Seeds,
    ) -> list[RequestRow]:
        seeds = seeds_per_row(seed, len(prompts))
        ids = [self.text.prompt_ids(prompt) for prompt in prompts]
        return self.parts.rows(ids, compositions, scenes, prompts=prompts, sampling=sampling, seeds=seeds, spoken=True)

    def _answered(
        self,
        ids: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        compositions: Compositions,
        scenes: Scenes,
        prompts: Sequence[Prompt],
    ) -> list[RequestRow]:
        """Rows of prompts with the answers behind them."""
        whole = [[*prompt, *answer] for prompt, answer in zip(ids, answers, strict=True)]
        lengths = [len(prompt) for prompt in ids]
        return self.parts.rows(whole, compositions, scenes, prompts=prompts, lengths=lengths)

    def _steps(self, rows: Sequence[RequestRow], deterministic: bool) -> Iterator[list[int | None]]:
        """Each step's token per row, None where it has ended."""
        batch = self.batch(deterministic=deterministic)
        batch.add(rows)
        with openmp.visiting():  # the next answer may be another thread's
            while batch.rows:
                got = {id(row) for row in batch.step()}
                check_numbers(rows)
                if got:
                    yield [row.answer[-1] if id(row) in got else None for row in rows]


def _opened(
    modes: ModeHost | None, registry: Registry | None, project: str | PathLike[str] | None, allow_base_mismatch: bool
) -> tuple[ModeHost, Registry]:
    """The caller's modes and registry, or new ones."""
    modes = modes or load_modes()
    if registry is None:
        registry = Registry(project=project, sources=modes.sources(), allow_base_mismatch=allow_base_mismatch)
    return modes, registry
