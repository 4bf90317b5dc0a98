"""Compositions from a program: a batch whose rows differ, a mix that changes, rows that join a running batch."""

from __future__ import annotations

import argparse

import lora_rt

PROMPTS = ["rain, tin roof, unpaid bill", "frozen rope, harbour", "spare key, empty flat"]


def main() -> None:
    """Answer, and print what is said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("registers", nargs="*", default=["emotion", "logic"], help="two references")
    parser.add_argument("--base", default="default")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    given = parser.parse_args()
    if len(given.registers) != 2:
        parser.error("name two registers")
    one, two = given.registers
    options = {"max_new_tokens": given.max_new_tokens, "repetition_penalty": 1.1}
    with lora_rt.Runtime.load(given.base, precision=given.precision) as rt:
        print("one composition for each row of a batch; None is the base")
        mixes = [{one: 0.7, two: 0.3}, {two: 1.0}, None]
        for prompt, answer in zip(PROMPTS, rt.generate(PROMPTS, mixes, **options), strict=True):
            print(f"  {prompt}: {answer!r}")

        print(f"\n{one} first, {two} from the tenth piece on; what was read stays in the cache\n  ", end="")
        stream = rt.stream(PROMPTS[0], {one: 1.0}, **options)
        for number, piece in enumerate(stream, start=1):
            print(piece, end="", flush=True)
            if number == 10:
                stream.compose({two: 1.0})

        print("\n\nrows that join a batch while it runs, and leave it when they end")
        rows = rt.rows(PROMPTS, mixes, seed=[0, 1, 2], temperature=0.7, **options)
        batch, waiting = rt.batch(), list(rows)
        while waiting or batch.rows:
            batch.add([waiting.pop(0)] if waiting else [])
            batch.step()
        for prompt, row in zip(PROMPTS, rows, strict=True):
            print(f"  {prompt}: {row.new_text()!r} ({row.ended} after {len(row.answer)} tokens)")


if __name__ == "__main__":
    main()
