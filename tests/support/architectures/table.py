"""Runs the checks of many types in processes of their own, and writes what they found.

python tests/support/architectures/table.py [TYPE ...] [--checks load,all-linear] [--json FILE]

What is found of types that are named goes into what the file says of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "architectures" / "results.json"
SECONDS = 120  # of one check


def child() -> None:
    """Reads types from standard input, one a line, and writes a line of JSON per finding."""
    sys.path[:0] = [str(HERE.parents[1])]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    import torch
    import transformers

    from support.architectures.checks import findings

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        kind, checks = json.loads(line)
        for finding in findings(kind, checks):
            print(json.dumps(asdict(finding)), file=answers, flush=True)
        print(json.dumps(None), file=answers, flush=True)


class Worker:
    """A child that is started anew after it has died or was stopped."""

    def __init__(self, home: str) -> None:
        self._home = home
        self._process: subprocess.Popen[str] | None = None
        self._lines: Queue[str] = Queue()

    def run(self, kind: str, checks: Sequence[str]) -> list[dict[str, Any]]:
        """The findings of a type. A check in which the child dies is a crash, and the others are tried again."""
        found: list[dict[str, Any]] = []
        while rest := [name for name in checks if name not in {one["check"] for one in found}]:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps([kind, rest]) + "\n")
            process.stdin.flush()
            ended = self._read(found)
            if ended is None:
                break
            found.append(
                {"kind": kind, "check": rest[0] if not found else _next(rest, found), "result": "crash", "why": ended}
            )
        return found

    def _read(self, found: list[dict[str, Any]]) -> str | None:
        while True:
            try:
                line = self._lines.get(timeout=SECONDS)
            except Empty:
                self.stop()
                return f"no answer within {SECONDS} seconds"
            if not line:
                code = self._process.wait() if self._process else 0
                self._process = None
                return f"the process ended with {code}"
            answer = json.loads(line)
            if answer is None:
                return None
            found.append(answer)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORA_RT_HOME": self._home, "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, str(HERE / "table.py"), "--child"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env=environment,
            )  # fmt: skip
            self._lines = Queue()
            threading.Thread(target=_pump, args=(self._process.stdout, self._lines), daemon=True).start()
        return self._process

    def stop(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _pump(stream: IO[str] | None, lines: Queue[str]) -> None:
    for line in stream or ():
        lines.put(line)
    lines.put("")


def _next(rest: Sequence[str], found: Sequence[dict[str, Any]]) -> str:
    done = {one["check"] for one in found}
    return next(name for name in rest if name not in done)


def all_kinds() -> list[str]:
    """Every model type of which transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def condensed(found: Sequence[dict[str, Any]], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is kept: the types that each check was tried with, and of each type what is not exact, and why.

    Findings go into those of `before`, in place of older ones of the same types.
    """
    import peft
    import torch
    import transformers

    tried: dict[str, set[str]] = {}
    exceptions: dict[str, dict[str, list[str]]] = {}
    if before is not None:
        tried = {check: set(before["partly"].get(check, before["kinds"])) for check in before["checks"]}
        exceptions = {kind: dict(checks) for kind, checks in before["exceptions"].items()}
    for one in found:
        if one["check"] != "base":
            tried.setdefault(one["check"], set()).add(one["kind"])
        of_kind = exceptions.setdefault(one["kind"], {})
        of_kind.pop(one["check"], None)
        if one["result"] != "exact":
            of_kind[one["check"]] = [one["result"], one["why"][:200]]
    versions = {library.__name__: library.__version__ for library in (transformers, peft, torch)}
    kinds = sorted(set().union(*tried.values()))
    return {
        "versions": versions,
        "kinds": kinds,
        "checks": list(tried),
        "partly": {check: sorted(some) for check, some in tried.items() if sorted(some) != kinds},
        "exceptions": {kind: checks for kind, checks in sorted(exceptions.items()) if checks},
    }


def report(kept: Mapping[str, Any]) -> str:
    """The page's table: counts by check, and the types of which not everything that PEFT can do is exact."""
    results = ("exact", "refused", "wrong", "crash", "not by PEFT")
    lines = ["| model types, by check | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for check in kept["checks"]:
        some = kept["partly"].get(check, kept["kinds"])
        told = [kept["exceptions"].get(kind, {}).get(check, ["exact"])[0] for kind in some]
        title = check if check not in kept["partly"] else f"{check} ({len(some)} types)"
        lines.append(f"| {title} | " + " | ".join(str(told.count(result)) for result in results) + " |")
    left = {
        kind: [check for check, (result, _) in checks.items() if result in ("refused", "wrong", "crash")]
        for kind, checks in kept["exceptions"].items()
    }
    odd = {kind: checks for kind, checks in left.items() if checks}
    bases = [kind for kind, checks in kept["exceptions"].items() if "base" in checks]
    whole = len(kept["kinds"]) - len(odd)
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    text = f"{whole} of {len(kept['kinds'])} types are exact in every check that PEFT itself can do ({versions}). "
    text += (
        "Not exact in every check: " + "; ".join(f"{kind} ({', '.join(checks)})" for kind, checks in odd.items()) + ". "
        if odd
        else ""
    )
    text += f"Not tried, because they have no causal form or no tiny base: {', '.join(bases)}." if bases else ""
    return "\n".join([*lines, "", text]) + "\n"


def main() -> None:
    """Check the types that are named, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--checks", default="")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    checks = [c for c in given.checks.split(",") if c] or [
        "load", "all-linear", "attention", "mixed rows", "adapter a row", "left padding", "generate", "text", "train",
        "int8", "int4",
    ]  # fmt: skip
    kinds: Queue[str] = Queue()
    for kind in given.kinds or all_kinds():
        kinds.put(kind)
    found: list[dict[str, Any]] = []

    def work() -> None:
        with tempfile.TemporaryDirectory() as home:
            worker = Worker(home)
            while True:
                try:
                    kind = kinds.get_nowait()
                except Empty:
                    break
                for one in worker.run(kind, checks):
                    found.append(one)
                    if one["result"] not in ("exact", "not by PEFT"):
                        print(f"{one['kind']:24} {one['check']:14} {one['result']:8} {one['why'][:300]}", flush=True)
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(given.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.sort(key=lambda one: one["kind"])
    kept = condensed(found, json.loads(given.json.read_text()) if given.kinds and given.json.is_file() else None)
    given.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(report(kept))


if __name__ == "__main__":
    child() if "--child" in sys.argv else main()
