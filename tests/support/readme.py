"""Keeps README.md and the pages beside its parts true: what stands between a pair of markers is what a command prints.

python tests/support/readme.py            fails where a page differs, and shows how
python tests/support/readme.py --write    brings it up to date

<!-- output of: lora-rt --help -->       the command's output, in a fenced block
<!-- registers report -->                the table from examples/registers/report.json
<!-- short registers report -->          two of its lines
<!-- other hand report -->               that of the texts by another hand
<!-- precisions report -->               what the base's precision costs each register
<!-- answers report -->                  faults in the registers' answers, as one reader noted them
<!-- gates report -->                     which scene types `registers` recognizes, and what it gains
<!-- router report -->                    routers beside static mixes
<!-- bridge report -->                    what the bridge does on pairs that it never saw
<!-- memory report -->                    what training was planned to take, and what it took
<!-- architectures report -->            the table from tests/architectures/results.json
<!-- adapters report -->                 what becomes of adapters, by kind, from tests/runtime/variants.json
<!-- short bench report -->              three rows of the next
<!-- bench report -->                    the table from examples/bench/report.json, once there is one
<!-- bench without amx report -->        the same of a processor without AMX, from report-without-amx.json
<!-- end -->
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(file for top in ("examples", "tests") for file in (ROOT / top).glob("*/*.md"))]
BENCH = ROOT / "examples/bench/report.json"
_BENCHES = {"bench report": BENCH, "bench without amx report": BENCH.with_name("report-without-amx.json")}
_WHAT = "output of: [^\n]+|[a-z ]+ report"
_BLOCK = re.compile(rf"(<!-- (?P<what>{_WHAT}) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


def output_of(command: str) -> str:
    """What a lora-rt command prints, 88 columns wide and without colour."""
    environment = {**os.environ, "COLUMNS": "88", "TERM": "dumb", "NO_COLOR": "1"}
    words = command.split()
    program = [sys.executable, "-m", "lora_rt"] if words[0] == "lora-rt" else [words[0]]
    done = subprocess.run([*program, *words[1:]], capture_output=True, text=True, env=environment, check=True)
    lines = [line.rstrip() for line in done.stdout.strip().splitlines()]
    return "```\n" + "\n".join(lines) + "\n```\n"


def registers_report() -> str:
    """What the four registers were measured to do."""
    report = json.loads((ROOT / "examples/registers/report.json").read_text())
    rows = ["| | " + " | ".join(report["registers"]) + " |", "|---|" + "---|" * len(report["registers"])]

    def row(title: str, cell: object) -> None:
        rows.append(f"| {title} | " + " | ".join(str(cell(name)) for name in report["registers"]) + " |")  # type: ignore[operator]

    def interval(key: str) -> object:
        def cell(name: str) -> str:
            value = report["registers"][name][key]
            return f"{value['mean']:.2f} [{value['ci'][0]:.2f}, {value['ci'][1]:.2f}]"

        return cell

    def over_seeds(key: str) -> None:
        def cell(name: str) -> str:
            found = report["seeds"][name][key]
            return f"{found['mean']:.2f} ({found['range'][0]:.2f} to {found['range'][1]:.2f})"

        if "seeds" in report:
            row(f"the same under {report['seeds']['count']} seeds: mean (least to most)", cell)

    row("gain over the base, nats per token", interval("gain_over_base"))
    over_seeds("gain_over_base")
    row("gain over the base with an instruction", interval("gain_over_instruction"))
    row("gain over the best other adapter", lambda n: f"{report['registers'][n]['own_minus_best_other']:.2f}")
    over_seeds("own_minus_best_other")
    row("true scene over a wrong one", interval("true_scene_over_wrong"))
    row(
        "greedy texts recognized by a word classifier",
        lambda n: f"{report['generations'][n]['classified_right']:.0%}",
    )
    row("the same with a repetition penalty of 1.1", lambda n: f"{report['generations_with_penalty'][n]:.0%}")
    row("the same of real held-out texts", lambda n: f"{report['classifier_on_real_held_out_texts'][n]:.0%}")
    return "\n".join(rows) + "\n"


def short_registers_report() -> str:
    """Two lines of that."""
    kept = ("| |", "|---", "| gain over the base, nats", "| greedy texts")
    return "".join(line for line in registers_report().splitlines(keepends=True) if line.startswith(kept))


def other_hand_report() -> str:
    """Gain and selectivity of the registers on texts by another hand, by manner."""
    report = json.loads((ROOT / "examples/registers/otherhand.json").read_text())
    registers = list(report["all"])
    rows = ["| manner | " + " | ".join(registers) + " |", "|---|" + "---|" * len(registers)]
    for manner, found in report.items():
        cells = []
        for name in registers:
            value, other = found[name]["gain_over_base"], found[name]["own_minus_best_other"]
            cells.append(f"{value['mean']:.2f} [{value['ci'][0]:.2f}, {value['ci'][1]:.2f}]; {other:+.2f}")
        rows.append(f"| {manner} ({found[registers[0]]['texts']} each) | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def precisions_report() -> str:
    """What each register gains over the base in each precision, and what the precision costs it."""
    report = json.loads((ROOT / "examples/registers/precisions.json").read_text())["precisions"]
    registers = list(next(iter(report.values())))
    rows = ["| precision | " + " | ".join(registers) + " |", "|---|" + "---|" * len(registers)]
    for precision, found in report.items():
        cells = []
        for name in registers:
            value, cost = found[name]["gain_over_base"], found[name]["own_worse_than_float32"]
            told = (
                "" if precision == "float32" else f"; {cost['mean']:+.3f} [{cost['ci'][0]:+.3f}, {cost['ci'][1]:+.3f}]"
            )
            cells.append(f"{value['mean']:.2f} [{value['ci'][0]:.2f}, {value['ci'][1]:.2f}]{told}")
        rows.append(f"| {precision} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def gates_report() -> str:
    """Of how many prompts `registers` tells the scene type, and what it gains by it, under each seed."""
    report = json.loads((ROOT / "examples/context/scenes.json").read_text())
    told, gains = report["told"], report["gains"]
    heads = [f"seed {number}" for number in range(len(told))]
    rows = ["| | " + " | ".join(["seed 0, as it ships", *heads[1:]]) + " |", "|---|" + "---|" * len(heads)]
    for kind, title in (
        ("held-out", "held-out prompts"),
        ("everyday", "everyday sentences"),
        ("another hand", "sentences by another hand"),
    ):
        counts = [[sum(each) for each in zip(*found[kind].values(), strict=True)] for found in told.values()]
        rows.append(
            f"| type recognized, of {counts[0][1]} {title} | " + " | ".join(str(right) for right, _ in counts) + " |"
        )
    for how, title in (("told", "given"), ("recognized", "recognized")):
        found = [gains[f"{name}, type {how}"] for name in told]
        cells = []
        for one in found:
            low, high = one["gain_ci"]
            cells.append(f"{one['nll']:.3f}; {one['gain_over_best_static']:+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append(f"| nats per token, type {title}; gain over 0.25 each | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def router_report() -> str:
    """Routers beside static mixes and the oracle, on texts whose register turns."""
    report = json.loads((ROOT / "examples/context/router.json").read_text())
    rows = ["| | nats per token | gain over the best static mix | of the way to the oracle |", "|---|---|---|---|"]
    for name, found in report["rows"].items():
        low, high = found["gain_ci"]
        gain = f"{found['gain_over_best_static']:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append(f"| {name} | {found['nll']:.3f} | {gain} | {found['way_to_oracle']:.0%} |")
    return "\n".join(rows) + "\n"


def answers_report() -> str:
    """How many answers of each register were free of each fault, as read by people."""
    report = json.loads((ROOT / "examples/registers/answers.json").read_text())
    titles = {
        "g": "grammatical",
        "n": "makes sense",
        "s": "keeps to the scene",
        "e": "ends properly",
        "r": "no repeats",
    }
    heads = [*titles.values(), "all of it"]
    rows = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for way, registers in report.items():
        for name, answers in registers.items():
            if faults := [answer["faults"] for answer in answers if answer["faults"] is not None]:
                cells = [sum(fault not in found for found in faults) for fault in titles]
                free = sum(not found for found in faults)
                rows.append(f"| {name}, {way} ({len(faults)}) | " + " | ".join(map(str, [*cells, free])) + " |")
    return "\n".join(rows) + "\n"


def bridge_report() -> str:
    """What the bridge does on held-out pairs, beside what it has to be compared with."""
    report = json.loads((ROOT / "examples/bridge/report.json").read_text())
    made, back, through = report["compress"], report["scene_text_scene"], report["text_scene_text"]
    ranks, forward, bits = report["ranking"], report["forward"], report["bits_per_character"]
    said, hidden, guessed = made["recall"]["literal"], made["recall"]["hidden"], made["controls"]

    def interval(found: dict[str, Any]) -> str:
        low, high = found["ci"]
        return f"{found['mean']:.2f} [{low:.2f}, {high:.2f}]"

    def first(who: str) -> str:
        return " / ".join(f"{ranks[who][by]['mean']:.0%}" for by in ("logp", "pmi"))

    rows = ["| | bridge | beside |", "|---|---|---|"]

    def row(title: str, own: str, beside: str = "") -> None:
        rows.append(f"| {title} | {own} | {beside} |")

    by_chance = f"random words of the text {guessed['random words']['mean']:.2f}"
    row("text -> scene, keyword F1", interval(made["f1"]), f"{by_chance}, the base {guessed['base']['mean']:.2f}")
    recalled = f"{said['mean']:.0%} / {hidden['mean'] * hidden['words']:.0f} of {hidden['words']}"
    row("words that the text says / hides, recalled", recalled)
    best = f"best of four {back['best_of_4']['f1']['mean']:.2f}"
    base = f"the base {back['base']['f1']['mean']:.2f}"
    row("scene -> text -> scene, keyword F1", f"{interval(back['greedy']['f1'])}, {best}", base)
    other = f"by another text's scene {through['another_text']['mean']:.1f}"
    row("text -> scene -> text, chrF", f"{through['chrf']['mean']:.1f}", other)
    row(
        f"the right scene first among {ranks['among']}, by log p / by PMI", first("bridge"), f"the base {first('base')}"
    )
    alone = f"one direction alone {forward['one_direction']:.3f}, " if "one_direction" in forward else ""
    row("scene -> text, nats per token", f"{forward['bridge']:.3f}", f"{alone}the base {forward['base']:.3f}")
    text = f"the base, of the text alone {bits['base_text_alone']['mean']:.2f}"
    row("bits per character of scene and text", interval(bits["scene_and_text"]), text)
    for name, form, title in (
        ("f1", ".2f", "text -> scene, keyword F1"),
        ("literal", ".0%", "words that the text says, recalled"),
        ("hidden", ".0%", "words that it hides, recalled"),
        ("forward", ".3f", "scene -> text, nats per token"),
    ):
        if seeds := report.get("seeds"):
            mean, least, most = (format(value, form) for value in (seeds[name]["mean"], *seeds[name]["range"]))
            row(f"{title}, {seeds['count']} seeds: mean (least to most)", f"{mean} ({least} to {most})")
    return "\n".join(rows) + "\n"


def memory_report() -> str:
    """What training was planned to take at most, and what it took."""
    report = json.loads((ROOT / "examples/memory/report.json").read_text())
    rows = ["| a step of | planned | measured | off by |", "|---|---|---|---|"]
    for name, found in report["rows"].items():
        megabytes = (f"{found[key] / 1e6:,.0f}" for key in ("planned", "measured"))
        rows.append(f"| {name} | {' | '.join(megabytes)} | {found['planned'] / found['measured'] - 1:+.1%} |")
    return "\n".join(rows) + "\n"


def short_bench_report() -> str:
    """Three rows of the table of a processor with AMX."""
    document = json.loads(BENCH.read_text())
    chosen = [item for item in document["workloads"] if item["name"] in ("row1-k2", "rows16-mixes", "prefill")]
    systems = [name for name in document["systems"] if name in ("base", "ours", "peft-set", "llama.cpp")]
    return bench_table({**document, "workloads": chosen, "systems": systems})


def architectures_report() -> str:
    """What works over which architectures."""
    sys.path[:0] = [str(ROOT / "tests")]
    from support.architectures.table import RESULTS, report

    return report(json.loads(RESULTS.read_text()))


def adapters_report() -> str:
    """What is exact and what is refused of all that PEFT writes."""
    sys.path[:0] = [str(ROOT / "tests")]
    from support.variants import RESULTS, report

    return report(json.loads(RESULTS.read_text()))


def bench_report(document: dict[str, Any]) -> str:
    """One run of `lora-rt bench`: the machine, and a line per workload with each system's figure and ratio."""
    facts, versions = document["machine"], document["versions"]
    about = (
        f"`{document['base']}` at {document['precision']} on {facts['threads']} threads of {facts['cores']} cores of "
        f"{facts.get('gpu', facts['cpu'])} ({facts['cpu_capability']}), load {facts['load']} before, others used "
        f"{facts['others']:.0%} of the processor meanwhile; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". Medians; in brackets the ratio to the base alone in the same repeat, above 1 is faster or less memory."
    )
    return "\n".join([*textwrap.wrap(about, 130, break_on_hyphens=False), "", bench_table(document)])


def bench_table(document: dict[str, Any]) -> str:
    """A line per workload with each system's figure and ratio."""
    found = {(row["workload"], row["system"]): row for row in document["rows"] if row["reason"] is None}
    systems = [name for name in document["systems"] if any(system == name for _, system in found)]
    rows = ["| | " + " | ".join(_HEADS.get(name, name) for name in systems) + " |", "|---|" + "---|" * len(systems)]
    for item in document["workloads"]:
        cells = [found.get((item["name"], name)) for name in systems]
        if any(cells):
            told = [_figure(row) if row else "-" for row in cells]
            rows.append(f"| {item['title']}, {_UNITS.get(item['kind'], 'tokens/s')} | " + " | ".join(told) + " |")
    return "\n".join(rows) + "\n"


_HEADS = {"base": "base alone", "generate": "its `generate`", "ours": "lora-rt", "peft-trainer": "PEFT, Trainer"} | {
    f"peft-{way}": f"PEFT {name}"
    for way, name in (("set", "`set_adapter`"), ("cat", "`cat`"), ("mixed", "mixed batch"))
}
_UNITS = {"change": "ms", "cold": "s", "memory": "MB"}


def _figure(row: dict[str, Any]) -> str:
    value = row["megabytes"] or row["tokens_per_s"] or row["seconds"] * (1000 if row["kind"] == "change" else 1)
    text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    text = f"**{text}**" if row["system"] == "ours" else text
    return text if row["ratio"] is None or row["system"] == row["reference"] else f"{text} ({row['ratio']:.2f})"


def rendered(text: str) -> str:
    """A page as it should be."""

    def replace(match: re.Match[str]) -> str:
        what = match["what"]
        if path := _BENCHES.get(what):
            body = bench_report(json.loads(path.read_text())) if path.exists() else match["body"]
        else:
            made = {
                "registers report": registers_report,
                "short registers report": short_registers_report,
                "other hand report": other_hand_report,
                "precisions report": precisions_report,
                "gates report": gates_report,
                "bridge report": bridge_report,
                "memory report": memory_report,
                "short bench report": short_bench_report,
                "router report": router_report,
                "answers report": answers_report,
                "architectures report": architectures_report,
                "adapters report": adapters_report,
            }.get(what)
            body = made() if made else output_of(what.removeprefix("output of: "))
        return f"{match[1]}{body}{match[4]}"

    return _BLOCK.sub(replace, text)


def main() -> int:
    """Check or write; 1 where a page is not true."""
    untrue = []
    for page in PAGES:
        before = page.read_text()
        after = rendered(before)
        if "--write" in sys.argv:
            page.write_text(after)
        elif before != after:
            name = str(page.relative_to(ROOT))
            lines = before.splitlines(), after.splitlines()
            untrue += difflib.unified_diff(*lines, name, "what commands print", lineterm="")
    print("\n".join(untrue) or f"README.md and {len(PAGES) - 1} other pages are true")
    return 1 if untrue else 0


if __name__ == "__main__":
    sys.exit(main())
