"""HyperBridge: both directions, their batches, their scores, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_rt
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.contract import UsageError
from lora_rt.plugins.modes.bridge.cycle import cycle_pairs, write_lines
from lora_rt.plugins.modes.bridge.hyper import BridgeError, HyperBridge, onward
from support.pairs import DOCUMENT, PAIRS

pytestmark = pytest.mark.slow

SCENES, TEXTS = [pair["scene"] for pair in PAIRS], [pair["text"] for pair in PAIRS]


def test_it_is_part_of_the_public_face() -> None:
    assert lora_rt.HyperBridge is HyperBridge


def test_one_adapter_compresses_and_expands_what_it_learned(bridge: HyperBridge) -> None:
    assert bridge.compress(TEXTS) == SCENES
    assert bridge.expand(SCENES) == TEXTS


def test_a_string_gives_a_string_and_a_list_a_list_in_the_same_order(bridge: HyperBridge) -> None:
    assert bridge.compress(TEXTS[3]) == SCENES[3]
    assert bridge.expand(SCENES[3], candidates=2) == TEXTS[3]
    assert bridge.compress(TEXTS[::-1]) == SCENES[::-1]
    assert bridge.compress([]) == bridge.expand([]) == bridge.expand([], candidates=3) == bridge.score([], []) == []


def test_a_batch_gives_what_single_calls_give(bridge: HyperBridge) -> None:
    texts = [DOCUMENT["text"], "ab", "a longer text that nobody has seen", "aaaa"]
    assert bridge.compress(texts) == [bridge.compress(text) for text in texts]
    scores = [bridge.score("a", text) for text in texts]
    assert bridge.score("a", texts) == pytest.approx(scores, abs=1e-3)


def test_scenes_and_texts_may_be_in_any_script(bridge: HyperBridge) -> None:
    scene, text = DOCUMENT["scene"], DOCUMENT["text"]
    for made, prompt in ((bridge.compress(text), bridge.prompt("compress", text)), (bridge.expand(scene), scene)):
        assert bridge.runtime.generate(prompt, bridge.composition).startswith(made)
    assert bridge.score(scene, text, kind="logp") < 0
    assert bridge.score([scene], [text]) == pytest.approx([bridge.score(scene, text)], abs=1e-4)


def test_pmi_is_the_likelihood_of_the_scene_less_its_prior(bridge: HyperBridge) -> None:
    likelihood = bridge.score("b", "bbbb", kind="logp")
    (prior,) = bridge.log_likelihoods("compress", [""], ["b"])
    assert bridge.score("b", "bbbb") == pytest.approx(likelihood - prior, abs=1e-4)


def test_the_likelihood_is_the_sum_over_the_scenes_tokens_and_its_end(bridge: HyperBridge) -> None:
    (nll,) = bridge.runtime.answer_nll([bridge.prompt("compress", "bbbb")], ["b"], bridge.composition)
    assert len(nll) == 2
    assert bridge.score("b", "bbbb", kind="logp") == pytest.approx(-float(nll.sum()), abs=1e-4)


def test_the_right_scene_scores_best_for_every_text(bridge: HyperBridge) -> None:
    for scene, text in zip(SCENES, TEXTS, strict=True):
        scores = bridge.score(SCENES, text)
        assert isinstance(scores, list)
        assert SCENES[scores.index(max(scores))] == scene


def test_of_several_candidates_the_one_that_compresses_back_best_is_kept(
    bridge: HyperBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = {0: ["hhhh", "bbbb"], 1: ["aaaa", "gggg"], 2: ["cccc", "gggg"]}
    monkeypatch.setattr(bridge, "_answers", lambda prompts, **settings: pools[0])
    monkeypatch.setattr(bridge, "_sampled", lambda scenes, seed, tokens: pools[seed])
    assert bridge.expand(["a", "b"], candidates=3) == ["aaaa", "bbbb"]


def test_an_empty_candidate_is_never_kept_beside_one_that_says_something(
    bridge: HyperBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "_answers", lambda prompts, **settings: [""])
    monkeypatch.setattr(bridge, "_sampled", lambda scenes, seed, tokens: ["hhhh"])
    assert bridge.expand(["a"], candidates=2) == ["hhhh"]


def test_candidates_are_repeatable(bridge: HyperBridge) -> None:
    assert bridge.expand(["zz", "q"], candidates=3, seed=5) == bridge.expand(["zz", "q"], candidates=3, seed=5)


def test_none_is_the_base_alone_and_a_composition_may_hold_the_bridge(learned: tuple[Runtime, Path]) -> None:
    runtime, folder = learned
    assert HyperBridge(runtime, None).compress(TEXTS) != SCENES
    muted = HyperBridge(runtime, f"{folder}:0")
    assert muted.compress(TEXTS) == HyperBridge(runtime, None).compress(TEXTS)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda b: b.compress(["a", " ", ""]), "text 3"),
        (lambda b: b.expand(""), "scene 1"),
        (lambda b: b.expand("a", candidates=0), "candidates is 0"),
        (lambda b: b.score("a", "b", kind="cosine"), "there is no score 'cosine'"),
        (lambda b: b.score(["a", "b"], ["a"]), "2 scenes for 1 texts"),
    ],
)
def test_what_can_not_be_used_is_named(bridge: HyperBridge, call: object, said: str) -> None:
    with pytest.raises(BridgeError) as caught:
        call(bridge)  # type: ignore[operator]
    assert said in str(caught.value)


def test_unpaired_texts_and_scenes_become_lines_whose_given_half_is_the_target(bridge: HyperBridge) -> None:
    assert cycle_pairs(bridge, texts=["cccc"], scenes=["d"]) == [
        {"scene": "c", "text": "cccc", "direction": "expand"},
        {"scene": "d", "text": "dddd", "direction": "compress"},
    ]
    with pytest.raises(UsageError, match="neither texts nor scenes"):
        cycle_pairs(bridge)


def test_lines_are_never_written_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    write_lines(file, [DOCUMENT])
    assert "тишинажарвход" in file.read_text(encoding="utf-8")
    with pytest.raises(BridgeError, match="is there already") as caught:
        write_lines(file, [DOCUMENT, DOCUMENT])
    kept = Path(caught.value.next_step.rpartition(" ")[2])
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 2, "what was computed is not lost"
    kept.unlink()


def test_nothing_goes_onward_as_nothing(bridge: HyperBridge) -> None:
    assert onward(bridge.compress, ["aaaa", "", "bbbb"]) == ["a", "", "b"]


def test_many_scenes_of_one_text_score_as_they_do_one_by_one(bridge: HyperBridge) -> None:
    """The text is read once for all of them."""
    scenes = ["a", "bb", "a longer scene", "тишинажарвход"]
    together = bridge.log_likelihoods("compress", ["bbbb"] * 4, scenes)
    assert together == pytest.approx([bridge.score(s, "bbbb", kind="logp") for s in scenes], abs=1e-3)
    mixed = bridge.log_likelihoods("compress", ["bbbb", "cc", "bbbb"], ["a", "a", "bb"])
    assert mixed == pytest.approx([together[0], bridge.score("a", "cc", kind="logp"), together[1]], abs=1e-3)
