"""Asks a running `lora-rt serve` through OpenAI's client: several mixes at once, then one that changes as it is spoken.

Needs `pip install openai`, and a server: `lora-rt serve`.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def turn(url: str, key: str, answer: str, composition: dict[str, float]) -> None:
    """Give an answer that is being spoken other weights, from its next token on."""
    body = json.dumps({"composition": composition}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/responses-in-flight/{answer}", body, headers, method="PATCH")
    try:
        urllib.request.urlopen(request).close()
    except urllib.error.HTTPError as error:  # where the answer has ended in the meantime
        print(f" [{json.load(error)['error']['message']}] ", end="")


def main() -> None:
    """Ask, and print what is said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", nargs="?", default="rain, tin roof, unpaid bill")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="what the server was given as --api-key")
    parser.add_argument("--registers", nargs=2, default=["emotion", "logic"], help="the two that are mixed")
    given = parser.parse_args()
    one, two = given.registers
    import openai

    client = openai.OpenAI(base_url=given.url, api_key=given.key)
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": given.prompt}], "max_tokens": 60, "seed": 0}

    def answer(composition: str) -> str:
        """The model is the composition; each request has its own, and all share the server's batch."""
        return client.chat.completions.create(model=composition, **ask).choices[0].message.content or ""

    mixes = ["base", one, two, f"{one}:0.7 {two}:0.3"]
    with ThreadPoolExecutor(len(mixes)) as pool:
        for mix, text in zip(mixes, pool.map(answer, mixes), strict=True):
            print(f"{mix}\n    {text}")

    print(f"{one}, from the tenth piece on {two}\n    ", end="")
    stream = client.chat.completions.create(model="base", stream=True, extra_body={"composition": {one: 1}}, **ask)
    for number, piece in enumerate(stream):
        if number == 10:
            turn(given.url, given.key, piece.id, {two: 1})
        print(piece.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
