"""Starts vLLM over a base so that compositions are models of it: `lora-rt serve --engine vllm`, or `lora-rt-vllm`.

lora-rt-vllm Qwen/Qwen2.5-7B-Instruct emotion logic body -- --tensor-parallel-size 2
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_rt import Composition, Exporter, LoraRtError, prepare
from lora_rt_vllm import cache, settings
from lora_rt_vllm.settings import RANKS, Settings

_OURS = {
    "--enable-lora": "it is always given",
    "--middleware": "it is given with lora-rt's own front; put others into a proxy",
    "--api-server-count": "it is 1: each API server would number adapters by itself",
    "--lora-modules": "name registers instead",
    "--served-model-name": "use --names",
    "--max-lora-rank": "use --max-rank",
    "--max-loras": "use --max-loras before the --",
    "--dtype": "use --dtype before the --",
    "--api-key": "use --api-key before the --, or VLLM_API_KEY",
    "--host": "use --host before the --",
    "--port": "use --port before the --",
}
"""Flags of vLLM's that are set here, and what to do instead of giving them once more."""


class EngineError(LoraRtError):
    """vLLM can't be started like this."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be served.

    registers: names of adapters and named compositions that clients may use; all that fit the base if empty.
    max_terms: how many registers one composition has at most, for which the rank is to suffice.
    max_rank: the rank to start vLLM with; what `max_terms` registers need if None.
    max_loras: how many different compositions one batch holds.
    extra: further flags for `vllm serve`.
    """

    base: str = "default"
    registers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    max_terms: int = 4
    max_rank: int | None = None
    max_loras: int = 8
    dtype: str = "auto"
    names: tuple[str, ...] = ("base",)
    cache: Path | None = None
    cache_gb: float = 50.0
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """A command line, the variables that it needs beside those of this process, and what a person should know of it."""

    command: tuple[str, ...]
    environment: dict[str, str]
    settings: Settings
    notes: tuple[str, ...]


def launch(wanted: Wanted) -> Launch:
    """What has to be run.

    Raises:
        LoraRtError: everything that vLLM can't do of what is wanted.
    """
    _check_flags(wanted.extra)
    exporter = Exporter(wanted.base)  # reads all weights of the base once, to know which one it is
    ranks, notes = _ranks(exporter, wanted)
    rank = _rank(ranks, wanted)
    own = Settings(
        base=wanted.base,
        max_rank=rank,
        registers=wanted.registers,
        cache=(wanted.cache or settings.default_cache()).absolute(),
        cache_bytes=int(wanted.cache_gb * 1e9),
        dtype=wanted.dtype if wanted.dtype != "auto" else "float32",
        names=wanted.names,
    )
    model = _model(exporter, wanted)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *model]
    command += ["--served-model-name", *wanted.names]
    command += ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(wanted.max_loras)]
    if "--max-cpu-loras" not in {word.partition("=")[0] for word in wanted.extra}:
        command += ["--max-cpu-loras", str(4 * wanted.max_loras)]
    command += ["--api-server-count", "1", "--middleware", "lora_rt_vllm.front.Front", "--dtype", wanted.dtype]
    command += ["--host", wanted.host, "--port", str(wanted.port), *wanted.extra]
    served = ", ".join(f"{name} (rank {ranks[name]})" for name in ranks)
    notes = [*notes, f"registers: {served}; one composition may have rank {rank}"]
    return Launch(tuple(command), _environment(own, wanted), own, tuple(notes))


def serve(wanted: Wanted) -> None:
    """Tidy the exports of earlier servers, print the command, and become vLLM.

    Raises:
        LoraRtError: as `launch`; or vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineError("vLLM is not installed here", next_step="pip install vllm, beside lora-rt-vllm")
    found = launch(wanted)
    gone = cache.tidy(found.settings.cache, found.settings.cache_bytes // 2)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if gone is None:
        print("note: another server runs over these exports, so none was removed", file=sys.stderr)
    shown = [f"{name}={value}" for name, value in found.environment.items() if name != "VLLM_API_KEY"]
    print(shlex.join(["env", *shown, *found.command]), file=sys.stderr, flush=True)
    os.execvpe(found.command[0], found.command, {**os.environ, **found.environment})


def engine(words: Sequence[str], host: str, port: int, api_key: str) -> None:
    """`lora-rt serve --engine vllm BASE REGISTER... -- FLAG...`: from the first flag on, all are vLLM's.

    Raises:
        LoraRtError: as `serve`.
    """
    cut = next((number for number, word in enumerate(words) if word.startswith("-")), len(words))
    base, *registers = words[:cut] or ["default"]
    extra = tuple(words[cut:])
    serve(Wanted(base, tuple(registers), host=host, port=port, api_key=api_key, extra=extra))


def _environment(own: Settings, wanted: Wanted) -> dict[str, str]:
    found = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", **own.environment()}
    if (allowed := os.environ.get("VLLM_PLUGINS")) is not None and "lora_rt" not in allowed.split(","):
        found["VLLM_PLUGINS"] = ",".join(filter(None, [*allowed.split(","), "lora_rt"]))
    if wanted.api_key:  # not on the command line, which every user of the machine can read
        found["VLLM_API_KEY"] = wanted.api_key
    return found


def _check_flags(extra: Sequence[str]) -> None:
    given = [word.partition("=")[0].replace("_", "-") for word in extra]
    if problems := [f"{flag}: {_OURS[flag]}" for flag in given if flag in _OURS]:
        raise EngineError("these flags of vLLM's are set already", problems=problems, next_step="Leave them out")


def _ranks(exporter: Exporter, wanted: Wanted) -> tuple[dict[str, int], list[str]]:
    """The rank of every register that vLLM can serve; of those that were not asked for by name, why it can't."""
    registry = exporter.registry
    chosen = wanted.registers or sorted({*registry.names(), *registry.compositions.names()})
    ranks: dict[str, int] = {}
    problems: list[str] = []
    for name in chosen:
        try:
            if why := _why_not(exporter, name):
                problems.append(why)
            else:
                ranks[name] = exporter.gather(Composition.parse(name)).rank
        except LoraRtError as error:
            problems.append(error.message)
    if problems and wanted.registers:
        step = "`lora-rt serve` without --engine has gates, waking texts and biases"
        raise EngineError(f"vLLM can't serve all of {', '.join(chosen)}", problems=problems, next_step=step)
    if not ranks:
        step = "See: lora-rt list"
        raise EngineError(
            f"there is no register for {exporter.base.identity.id} here", problems=problems, next_step=step
        )
    return ranks, [f"not served: {problem}" for problem in problems]


def _why_not(exporter: Exporter, name: str) -> str:
    term = Composition.parse(name).terms[0]
    if term.reference.kind != "name" or term.weight != 1 or term.after:
        return f"{name!r} is not the name of an adapter or a named composition; pull it under one"
    gathered = exporter.gather(name)
    found = [error.message for error in (*gathered.failures, *gathered.dynamic)]
    return "; ".join(found) or (f"{name!r} adds biases, which vLLM does not" if gathered.has_biases else "")


def _rank(ranks: dict[str, int], wanted: Wanted) -> int:
    """The --max-lora-rank that suffices."""
    if wanted.max_rank is not None:
        if wanted.max_rank not in RANKS:
            raise EngineError(f"vLLM takes no --max-lora-rank {wanted.max_rank}", next_step=f"Use one of {RANKS}")
        return wanted.max_rank
    largest = sorted(ranks.values(), reverse=True)[: wanted.max_terms]
    found = next((rank for rank in RANKS if rank >= sum(largest)), None)
    if found is None:
        raise EngineError(
            f"{len(largest)} of these registers have rank {sum(largest)} together, and vLLM takes {RANKS[-1]} at most",
            problems=[f"{name}: rank {rank}" for name, rank in ranks.items()],
            next_step="Give fewer registers, a smaller --max-terms, or --max-rank 512",
        )
    return found


def _model(exporter: Exporter, wanted: Wanted) -> list[str]:
    """What vLLM loads: a dense folder where the base is none that it reads, else the base itself."""
    source = exporter.base.source
    if source.kind in ("default", "gguf"):
        precision = wanted.dtype if wanted.dtype in ("float32", "float16") else "bfloat16"
        return [str(prepare(wanted.base, precision=precision))]
    if source.kind == "folder":
        return [str(source.path)]
    return [source.text, *(["--revision", source.revision] if source.revision else [])]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `lora-rt-vllm`."""
    parser = argparse.ArgumentParser(
        prog="lora-rt-vllm",
        description="Start vLLM so that compositions of registers are models of it.",
        epilog="What stands behind -- goes to `vllm serve` as it is.",
    )
    usual = Wanted()
    parser.add_argument("base", help='"default", a folder, a .gguf file or a hub id with an optional @revision')
    parser.add_argument("registers", nargs="*", help="those that clients may use; all that fit the base if left out")
    parser.add_argument("--host", default=usual.host)
    parser.add_argument("--port", type=int, default=usual.port)
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY", ""), help="or VLLM_API_KEY")
    parser.add_argument("--max-terms", type=int, default=usual.max_terms, help="registers in one composition, at most")
    parser.add_argument("--max-rank", type=int, help="instead of what --max-terms registers need")
    parser.add_argument("--max-loras", type=int, default=usual.max_loras, help="different compositions in one batch")
    parser.add_argument("--dtype", default=usual.dtype, choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--names", default="base", help="what the base is called as a model, separated by commas")
    parser.add_argument("--cache", type=Path, help="folder of the exports; every worker has to see it")
    parser.add_argument("--cache-gb", type=float, default=usual.cache_gb, help="how much they may take")
    given = sys.argv[1:] if arguments is None else list(arguments)
    cut = given.index("--") if "--" in given else len(given)
    read = vars(parser.parse_args(given[:cut]))
    names, registers = tuple(read.pop("names").split(",")), tuple(read.pop("registers"))
    try:
        serve(replace(Wanted(**read), names=names, registers=registers, extra=tuple(given[cut + 1 :])))
    except LoraRtError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
