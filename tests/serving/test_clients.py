"""OpenAI's own client gets from the server what the runtime gives alone."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import openai
import pytest
import torch

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.speaking import _sse
from support.serving import Live, asked

pytestmark = pytest.mark.slow

PROMPT = "rain, tin roof, unpaid bill"


def alone(runtime: Runtime, spec: Any, prompt: Any = PROMPT, **settings: Any) -> str:
    given = {"max_new_tokens": 12, **settings}
    return runtime.generate([prompt], [spec], **given)[0]


@pytest.mark.parametrize(
    ("model", "extra", "spec"),
    [
        ("base", {}, None),
        ("one:0.7 two:0.3", {}, "one:0.7 two:0.3"),
        ("one[: ] two:-0.5", {}, "one[: ] two:-0.5"),
        ("fading:2", {}, "fading:2"),
        ("base", {"composition": {"one": 0.7, "two": -1.5}}, {"one": 0.7, "two": -1.5}),
        ("anything at all", {"composition": "two:1.5"}, "two:1.5"),
        ("one", {"composition": "base"}, None),
    ],
)
def test_model_and_composition_mean_what_they_mean_on_the_command_line(
    client: openai.OpenAI, runtime: Runtime, model: str, extra: dict[str, Any], spec: Any
) -> None:
    found = client.chat.completions.create(**asked(PROMPT, model=model), extra_body=extra)
    assert found.choices[0].message.content == alone(runtime, spec)


def test_a_stream_is_the_whole_answer_in_pieces_and_ends_with_what_it_cost(
    client: openai.OpenAI, runtime: Runtime
) -> None:
    stream = client.chat.completions.create(
        **asked(PROMPT, model="one"), stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert len({piece.id for piece in pieces}) == 1
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [choice.delta.content for piece in pieces for choice in piece.choices]
    assert "".join(text for text in texts if text) == alone(runtime, "one")
    assert [c.finish_reason for piece in pieces for c in piece.choices if c.finish_reason] == ["length"]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 12
    assert pieces[-1].usage.prompt_tokens == len(runtime.text.prompt_ids(PROMPT))


def test_many_asynchronous_requests_share_the_batch_and_say_what_each_says_alone(
    server: Live, runtime: Runtime
) -> None:
    specs = ["base", "one", "two:-1.5", "one:0.3 two:0.7", "fading", "one[e]"] * 3

    async def ask_all() -> list[str]:
        client = server.async_openai()
        answers = await asyncio.gather(*(client.chat.completions.create(**asked(PROMPT, model=spec)) for spec in specs))
        await client.close()
        return [answer.choices[0].message.content or "" for answer in answers]

    assert asyncio.run(ask_all()) == [alone(runtime, None if spec == "base" else spec) for spec in specs]


def test_a_history_of_messages_is_the_runtimes_list_of_messages(client: openai.OpenAI, runtime: Runtime) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "rain"}, {"type": "text", "text": ", roof"}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "more"},
    ]
    found = client.chat.completions.create(model="two", messages=messages, temperature=0, max_tokens=9)  # type: ignore[arg-type]
    assert found.choices[0].message.content == alone(runtime, "two", messages, max_new_tokens=9)


def test_seed_temperature_and_top_p_are_those_of_the_runtime_and_each_of_n_has_its_own_seed(
    client: openai.OpenAI, runtime: Runtime
) -> None:
    wanted = {"temperature": 1.2, "top_p": 0.8}
    found = client.chat.completions.create(**asked(PROMPT, model="one", seed=7, n=3, **wanted))
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    expected = [alone(runtime, "one", seed=7 + n, **wanted) for n in range(3)]
    assert [choice.message.content for choice in found.choices] == expected
    assert len(set(expected)) == 3


def test_a_request_without_settings_samples_as_compose_does(client: openai.OpenAI, runtime: Runtime) -> None:
    message = {"role": "user", "content": PROMPT}
    found = client.chat.completions.create(model="one", messages=[message], seed=3, max_tokens=12)  # type: ignore[list-item]
    usual = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    assert found.choices[0].message.content == alone(runtime, "one", seed=3, **usual)


def test_an_answer_ends_before_a_stop_text(client: openai.OpenAI, runtime: Runtime) -> None:
    whole = alone(runtime, "one")
    stop = whole[4:6]
    found = client.chat.completions.create(**asked(PROMPT, model="one", stop=[stop, "never said"]))
    assert found.choices[0].message.content == whole.partition(stop)[0]
    assert found.choices[0].finish_reason == "stop"
    scored = asked(PROMPT, model="one") | {"logprobs": True}
    every = client.chat.completions.create(**scored).choices[0].logprobs
    before = client.chat.completions.create(**scored, stop=stop).choices[0].logprobs
    pieces = [piece.choices[0] for piece in client.chat.completions.create(**scored, stop=stop, stream=True)]
    assert every is not None
    assert before is not None
    assert before.content == every.content[: len(before.content or [])]  # type: ignore[index]
    assert 0 < len(before.content or []) < len(every.content or [])
    assert [one for piece in pieces if piece.logprobs for one in piece.logprobs.content or []] == before.content


def test_log_probabilities_are_those_of_the_composition(client: openai.OpenAI, runtime: Runtime) -> None:
    found = client.chat.completions.create(
        **asked(PROMPT, model="one:0.7 two:0.3", max_tokens=5), logprobs=True, top_logprobs=3
    )
    told = found.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    ids = runtime.text.prompt_ids(PROMPT)
    for item in told.content:
        logits = runtime.logits([ids], compositions=["one:0.7 two:0.3"])[0, -1].log_softmax(-1)
        token = int(logits.argmax())
        assert item.token == runtime.tokenizer.decode([token])
        assert math.isclose(item.logprob, float(logits[token]), abs_tol=1e-4)
        best = logits.topk(3).values
        assert torch.allclose(torch.tensor([top.logprob for top in item.top_logprobs]), best, atol=1e-4)
        ids = [*ids, token]
    assert len(told.content) == 5


def test_a_completion_goes_on_with_the_text_itself(client: openai.OpenAI, runtime: Runtime) -> None:
    ids = runtime.text.document_ids("so it is")
    found = client.completions.create(model="one", prompt="so it is", temperature=0, max_tokens=6)
    expected = [tokens[0] for tokens in runtime.decode([ids], "one", max_new_tokens=6)]
    assert found.choices[0].text == runtime.tokenizer.decode(expected)
    by_ids = client.completions.create(model="one", prompt=[ids], temperature=0, max_tokens=6, logprobs=2)
    assert by_ids.choices[0].text == found.choices[0].text
    assert by_ids.choices[0].logprobs is not None
    assert len(by_ids.choices[0].logprobs.token_logprobs or []) == 6


def test_the_models_are_the_names_that_compositions_are_made_of(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names[0] == "base"
    assert {"one", "two", "fading", "emotion", "logic"} <= set(names)
    assert client.models.retrieve("one:0.5 two").id == "one:0.5 two"


@pytest.mark.parametrize(
    "model", ["../x", "/etc", "~/x", "./adapter", "org/repo", "org/repo@main", "org/repo//sub", "nobody", "one ../x"]
)
def test_a_client_can_name_no_path_no_repository_and_nothing_unknown(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(**asked(model=model))
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(**asked(), extra_body={"composition": {model: 1.0}})
    assert raised.value.status_code == (400 if " " in model else 404)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "one:abc"}, "is not a number"),
        ({"model": "one:1e39"}, "too large"),
        ({"model": ""}, "no terms"),
        ({"model": "one " * 17}, "at most 16 terms"),
        ({"extra_body": {"composition": {"one": "much"}}}, "composition"),
        ({"extra_body": {"scene": "a[b"}}, "is not a scene"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 9999}, "takes 512 tokens in all"),
        ({"n": 9}, "at most 8 answers"),
        ({"stop": ["x"] * 17}, "at most 16"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_told_why(
    client: openai.OpenAI, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**asked(**settings))
    assert words in raised.value.message
    assert raised.value.type == "invalid_request_error"


def test_a_setting_of_sampling_alone_still_samples(client: openai.OpenAI) -> None:
    settings = {**asked(model="one", max_tokens=24), "temperature": openai.NOT_GIVEN, "top_p": 0.9}
    said = {client.chat.completions.create(**settings, seed=seed).choices[0].message.content for seed in range(3)}
    assert len(said) > 1


def test_a_message_of_an_assistant_may_be_empty_and_a_users_may_not(client: openai.OpenAI) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}]
    assert client.chat.completions.create(**{**asked(), "messages": turns}).choices
    with pytest.raises(openai.BadRequestError, match="content is missing"):
        client.chat.completions.create(**{**asked(), "messages": [{"role": "user", "content": None}]})


def test_lines_that_other_readers_end_in_a_text_do_not_tear_a_stream(server: Live) -> None:
    pieces = list(_sse({"text": "a\u2028b\u0085c"})["data"].splitlines())
    assert len(pieces) == 1


def test_what_was_not_read_again_is_counted_for_every_prompt(server: Live) -> None:
    long = "rain on a tin roof " * 12
    body = {"model": "base", "prompt": [long, long + "x", "y"], "max_tokens": 1, "temperature": 0}
    with server.http() as http:
        used = [http.post("/v1/completions", json=body).json()["usage"] for _ in range(2)][1]
    cached = used["prompt_tokens_details"]["cached_tokens"]
    assert used["prompt_tokens"] // 2 < cached <= used["prompt_tokens"]
