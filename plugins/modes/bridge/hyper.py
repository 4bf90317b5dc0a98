"""HyperBridge: scene <-> text over one runtime, with an adapter that was trained in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from lora_rt import Composition, LoraRtError
from lora_rt.plugins.modes.bridge.directions import Direction, prompt_for

if TYPE_CHECKING:
    from torch import Tensor

    from lora_rt import Runtime

Kind = Literal["pmi", "logp"]
T = TypeVar("T")

_SCENE_TOKENS, _TEXT_TOKENS = 32, 96
# Candidates must differ and still be about the scene; chosen by reading.
_TEMPERATURE, _TOP_P = 0.7, 0.9


class BridgeError(LoraRtError):
    """What a bridge can't be given."""


class HyperBridge:
    """Compresses texts to scenes, expands scenes to texts, and scores how well they belong together.

    Everywhere a string gives one answer and a list a list, in the same order.
    """

    def __init__(self, runtime: Runtime, adapter: Composition | str | None = "bridge", *, batch_size: int = 16) -> None:
        """Make the adapter resident.

        Args:
            runtime: the base.
            adapter: a reference, or a composition that holds the bridge among others ("bridge emotion:0.4"); None is
                the base alone, for comparison.
            batch_size: rows per forward pass.

        Raises:
            LoraRtError: it can't be loaded.
        """
        if batch_size < 1:
            raise BridgeError(f"batch_size is {batch_size}", next_step="Give at least 1")
        self.runtime = runtime
        self.composition = Composition.of(adapter)
        self._batch_size = batch_size
        for term in self.composition.terms if self.composition else ():
            runtime.ensure(term.reference)

    @overload  # a string is a sequence of strings, too: the first one wins
    def compress(self, texts: str, *, max_new_tokens: int = ..., seed: int = ..., **sampling: Any) -> str: ...
    @overload
    def compress(
        self, texts: Sequence[str], *, max_new_tokens: int = ..., seed: int = ..., **sampling: Any
    ) -> list[str]: ...
    def compress(
        self, texts: str | Sequence[str], *, max_new_tokens: int = _SCENE_TOKENS, seed: int = 0, **sampling: Any
    ) -> str | list[str]:
        """The scene of each text, greedily decoded unless `sampling` (settings of `Runtime.generate`) says otherwise.

        Raises:
            BridgeError: a text is empty.
        """
        given = _listed(texts, "text")
        settings = {"max_new_tokens": max_new_tokens, "seed": seed, **sampling}
        scenes = self._answers([self.prompt("compress", text) for text in given], **settings)
        return scenes[0] if isinstance(texts, str) else scenes

    @overload
    def expand(
        self, scenes: str, *, candidates: int = ..., max_new_tokens: int = ..., seed: int = ..., **sampling: Any
    ) -> str: ...
    @overload
    def expand(
        self,
        scenes: Sequence[str],
        *,
        candidates: int = ...,
        max_new_tokens: int = ...,
        seed: int = ...,
        **sampling: Any,
    ) -> list[str]: ...
    def expand(
        self,
        scenes: str | Sequence[str],
        *,
        candidates: int = 1,
        max_new_tokens: int = _TEXT_TOKENS,
        seed: int = 0,
        **sampling: Any,
    ) -> str | list[str]:
        """The text of each scene: the greedy one, or the best of several.

        With more than one candidate, the greedy text and `candidates - 1` samples are compared by log p(scene | text)
        under the same adapter, and the one that compresses back best is returned (a noisy channel). With `sampling`
        (settings of `Runtime.generate`) the first text is no longer the greedy one.

        Raises:
            BridgeError: a scene is empty, or there are no candidates.
        """
        given = _listed(scenes, "scene")
        if candidates < 1:
            raise BridgeError(f"candidates is {candidates}", next_step="Give at least 1")
        settings = {"max_new_tokens": max_new_tokens, **sampling}
        texts = self._answers([self.prompt("expand", scene) for scene in given], **settings, seed=seed)
        if candidates > 1 and given:
            pools = [texts, *(self._sampled(given, seed + n, settings) for n in range(1, candidates))]
            texts = self._best(given, pools)
        return texts[0] if isinstance(scenes, str) else texts

    @overload
    def score(self, scene: str, text: str, kind: Kind = ...) -> float: ...
    @overload
    def score(self, scene: str | Sequence[str], text: str | Sequence[str], kind: Kind = ...) -> float | list[float]: ...
    def score(self, scene: str | Sequence[str], text: str | Sequence[str], kind: Kind = "pmi") -> float | list[float]:
        """How well scene and text belong together, in nats.

        "pmi" is log p(scene | text) - log p(scene), "logp" its first term alone; the end of the scene counts as a
        token. p(scene) is the adapter's probability of the scene when asked to compress nothing. Of scene and text one
        may be a string and the other a list.

        Raises:
            BridgeError: lists of different lengths, an empty item, or another kind.
        """
        if kind not in ("pmi", "logp"):
            raise BridgeError(f"there is no score {kind!r}", next_step='Use "pmi" or "logp"')
        scenes, texts = _paired(scene, text)
        scores = self.log_likelihoods("compress", texts, scenes)
        if kind == "pmi":
            different = list(dict.fromkeys(scenes))
            prior = dict(
                zip(different, self.log_likelihoods("compress", [""] * len(different), different), strict=True)
            )
            scores = [score - prior[scene] for score, scene in zip(scores, scenes, strict=True)]
        return scores[0] if isinstance(scene, str) and isinstance(text, str) else scores

    def prompt(self, direction: Direction, content: str) -> str:
        """The user message by which this bridge is asked for a direction."""
        return prompt_for(direction, content)

    def log_likelihoods(self, direction: Direction, given: Sequence[str], answers: Sequence[str]) -> list[float]:
        """log p(answer | given) in that direction, in nats, the answer's end included; one number per pair."""
        prompts = [self.prompt(direction, content) for content in given]
        rows_of: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(prompt, []).append(row)
        single = [rows[0] for rows in rows_of.values() if len(rows) == 1]
        found = dict(zip(single, self._each([prompts[i] for i in single], [answers[i] for i in single]), strict=True))
        for prompt, rows in rows_of.items():
            if len(rows) > 1:
                found.update(zip(rows, self._choices(prompt, [answers[i] for i in rows]), strict=True))
        return [found[row] for row in range(len(prompts))]

    def _each(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """log p of one answer per prompt."""

        def scored(rows: Sequence[int]) -> list[float]:
            chosen = [prompts[i] for i in rows], [answers[i] for i in rows]
            return [_likelihood(nll) for nll in self.runtime.answer_nll(*chosen, self.composition)]

        return self._batched([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], scored)

    def _choices(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """log p of several answers to one prompt, which is read once."""

        def scored(rows: Sequence[int]) -> list[float]:
            losses = self.runtime.choices_nll(prompt, [answers[i] for i in rows], self.composition)
            return [_likelihood(nll) for nll in losses]

        # Answers are short beside a prompt, which every batch reads again.
        return self._batched([len(answer) for answer in answers], scored, 4 * self._batch_size)

    def _sampled(self, scenes: Sequence[str], seed: int, settings: Mapping[str, Any]) -> list[str]:
        warm = {} if settings.get("temperature") else {"temperature": _TEMPERATURE, "top_p": _TOP_P}
        return self._answers([self.prompt("expand", scene) for scene in scenes], **{**settings, **warm, "seed": seed})

    def _best(self, scenes: Sequence[str], pools: Sequence[Sequence[str]]) -> list[str]:
        """Of the texts pools[n][i], for each scene i the one from which the scene is likeliest; the first of equals."""
        flat = [text for pool in pools for text in pool]
        scores = self.log_likelihoods("compress", flat, [*scenes] * len(pools))
        width = len(scenes)
        best = [
            max(range(len(pools)), key=lambda n: scores[n * width + i] if pools[n][i] else -1e30) for i in range(width)
        ]
        return [pools[n][i] for i, n in enumerate(best)]

    def _answers(self, prompts: Sequence[str], **settings: Any) -> list[str]:
        def answered(rows: Sequence[int]) -> list[str]:
            answers = self.runtime.generate([prompts[i] for i in rows], self.composition, **settings)
            return [answer.strip() for answer in answers]

        return self._batched([len(prompt) for prompt in prompts], answered)

    def _batched(self, sizes: Sequence[int], run: Callable[[Sequence[int]], list[T]], limit: int = 0) -> list[T]:
        """`run` on batches of rows of like size, so that little is spent on padding; results in the rows' own order."""
        order = sorted(range(len(sizes)), key=lambda i: sizes[i])
        found: dict[int, T] = {}
        limit = limit or self._batch_size
        for start in range(0, len(order), limit):
            rows = order[start : start + limit]
            found.update(zip(rows, run(rows), strict=True))
        return [found[i] for i in range(len(sizes))]


def _likelihood(nll: Tensor) -> float:
    return -float(nll.double().sum())


def _listed(items: str | Sequence[str], what: str) -> list[str]:
    if not isinstance(items, Iterable):
        raise BridgeError(f"a {what} is a {type(items).__name__}", next_step="Give a text, or a list of texts")
    given = [items] if isinstance(items, str) else list(items)
    problems = [
        f"{what} {n}: {item!r:.80}" for n, item in enumerate(given, 1) if not isinstance(item, str) or not item.strip()
    ]
    if problems:
        raise BridgeError(f"a {what} is empty, or is not a text", problems=problems, next_step="Give some words")
    return given


def _paired(scene: str | Sequence[str], text: str | Sequence[str]) -> tuple[list[str], list[str]]:
    scenes, texts = _listed(scene, "scene"), _listed(text, "text")
    if isinstance(scene, str):
        scenes *= len(texts)
    elif isinstance(text, str):
        texts *= len(scenes)
    if len(scenes) != len(texts):
        raise BridgeError(
            f"{len(scenes)} scenes for {len(texts)} texts", next_step="Give as many of the one as of the other"
        )
    return scenes, texts


def onward(direction: Callable[[Sequence[str]], list[str]], items: Sequence[str]) -> list[str]:
    """What `compress` or `expand` makes of items that were made, too: of an empty one an empty one."""
    kept = [i for i, item in enumerate(items) if item.strip()]
    made = dict(zip(kept, direction([items[i] for i in kept]), strict=True))
    return [made.get(i, "") for i in range(len(items))]
