"""Bad adapters, by name: what is done to the files of a good one, and a part of what the refusal has to say."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from support.adapters import CARD, CONFIG, tensors

Files = dict[str, bytes]
Change = Callable[[Files], None]
W, C, R, S = "adapter_model.safetensors", "adapter_config.json", "register.json", "mode.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with exactly this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the body of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def weights(content: bytes) -> Change:
    """Replace the file of the weights."""
    return lambda files: files.update({W: content})


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of the weights and leave the body."""

    def apply(files: Files) -> None:
        found, body = parts(files[W])
        change(found)
        files[W] = raw(found, body)

    return apply


def arrays(change: Callable[[dict[str, np.ndarray]], object]) -> Change:
    """Change the tensors themselves."""

    def apply(files: Files) -> None:
        found = tensors()
        change(found)
        files[W] = save(found)

    return apply


def value(key: str, number: float) -> Change:
    """Put a number into the middle of a tensor."""

    def change(found: dict[str, np.ndarray]) -> None:
        found[key][1, 1] = number

    return arrays(change)


def config(**fields: Any) -> Change:
    """Change fields of the configuration."""
    return lambda files: files.update({C: json.dumps(CONFIG | fields).encode()})


def card(**fields: Any) -> Change:
    """Change fields of the card."""
    return lambda files: files.update({R: json.dumps(CARD | fields).encode()})


def text(name: str, content: bytes) -> Change:
    """Replace a file."""
    return lambda files: files.update({name: content})


def _gone(key: str) -> Change:
    return arrays(lambda found: found.pop(key))


def _named(key: str, shape: tuple[int, ...] = (4, 4)) -> Change:
    return arrays(lambda found: found.update({key: np.ones(shape, np.float32)}))


def _offsets(key: str, begin: int, end: int) -> Change:
    return header(lambda found: found[key].update(data_offsets=[begin, end]))


def _both(*changes: Change) -> Change:
    return lambda files: [change(files) for change in changes] and None


def _state(**entries: np.ndarray) -> Change:
    return lambda files: files.update({S: save(entries)})


GOOD = save(tensors())
LENGTH = struct.unpack("<Q", GOOD[:8])[0]
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

CASES: dict[str, tuple[Change, str]] = {
    # the file of the weights
    "empty file": (weights(b""), "has 0 bytes"),
    "seven bytes": (weights(b"\1\0\0\0\0\0\0"), "has 7 bytes"),
    "a pointer of Git LFS": (
        weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"),
        "Git LFS pointer",
    ),
    "eight bytes": (weights(struct.pack("<Q", 0)), "is not JSON"),
    "eight bytes of a promise": (weights(struct.pack("<Q", 500)), "cut off"),
    "header longer than the file": (weights(raw({}, length=10_000)), "cut off"),
    "header over 100 MB": (weights(raw({}, length=100_000_001)), "header of 100,000,001 bytes"),
    "header length of 2**64-1": (weights(raw({}, length=2**64 - 1)), "more than the"),
    "header not UTF-8": (weights(raw(b'{"\xff\xfe": 1}')), "not UTF-8"),
    "header cut off": (weights(raw(b'{"a": {"dtype": "F32", "sha')), "is not JSON"),
    "header is a list": (weights(raw([1, 2, 3])), "not an object"),
    "header nested 1,000 deep": (weights(raw(b'{"a":' * 1000 + b"1" + b"}" * 1000)), "nested|exactly dtype"),
    "header nested 100,000 deep": (weights(raw(b"[" * 100_000 + b"]" * 100_000)), "nested too deep"),
    "header with half a surrogate": (weights(raw(b'{"\\ud800": {}}')), "surrogate"),
    "header with NaN": (weights(raw(b'{"a": NaN}')), "holds NaN"),
    "an integer of 10,000 digits": (weights(raw(b'{"a": ' + b"9" * 10_000 + b"}")), "is not JSON"),
    "metadata that is not a text": (header(lambda found: found.update(__metadata__={"a": 1})), "__metadata__"),
    "no tensors": (weights(raw({})), "no tensors"),
    "only metadata": (weights(raw({"__metadata__": {"format": "pt"}})), "no tensors"),
    "a repeated key": (weights(raw(b'{"a": 1, "a": 2}')), "repeats the key 'a'"),
    "100,000 tensors": (weights(raw({f"t{i}": ONE for i in range(100_000)})), "more than 200,000 lists"),
    "80,000 tensors": (weights(raw({f"t{i}": {} for i in range(80_000)})), "more than 65,536"),
    "a million empty lists": (weights(raw(b'{"a": [' + b"[]," * 1_000_000 + b"1]}")), "more than 200,000"),
    "repeated offsets": (header(lambda found: found[B].update(data_offsets=found[A]["data_offsets"])), "overlap|hole"),
    "overlapping offsets": (_offsets(B, 100, 356), "overlaps|hole"),
    "a hole between tensors": (weights(raw({"a": ONE, "b": {**ONE, "data_offsets": [8, 12]}}, bytes(12))), "hole"),
    "missing offsets": (header(lambda found: found[A].pop("data_offsets")), "exactly dtype, shape and data_offsets"),
    "an offset too many": (header(lambda found: found[A]["data_offsets"].append(1)), "not two positions"),
    "negative offsets": (_offsets(A, -256, 0), "not two positions"),
    "offsets that run backwards": (_offsets(A, 256, 0), "its data_offsets give -256"),
    "offsets beyond the file": (_offsets(A, 10**9, 10**9 + 256), "hole"),
    "offsets of 2**63": (_offsets(A, 2**63, 2**63 + 256), "not two positions"),
    "offsets as text": (header(lambda found: found[A].update(data_offsets=["0", "256"])), "not two positions"),
    "trailing bytes": (weights(GOOD + b"xx"), "2 bytes behind"),
    "two bytes too few": (weights(GOOD[:-2]), "cut off by 2 bytes"),
    "cut in the header": (weights(GOOD[: LENGTH // 2]), "cut off"),
    "a shape that overflows": (header(lambda found: found[A].update(shape=[2**32, 2**32])), "takes"),
    "a shape of 2**60": (header(lambda found: found[A].update(shape=[2**60])), "not a list of sizes"),
    "a negative shape": (header(lambda found: found[A].update(shape=[-4, -16])), "not a list of sizes"),
    "a shape of true": (header(lambda found: found[A].update(shape=[True, 64])), "not a list of sizes"),
    "a shape of 4.0": (header(lambda found: found[A].update(shape=[4.0, 16])), "not a list of sizes"),
    "a shape of 1,000 dimensions": (header(lambda found: found[A].update(shape=[1] * 1000)), "not a list of sizes"),
    "a zero-sized tensor": (arrays(lambda found: found.update({A: np.zeros((0, 16), np.float32)})), "holds nothing"),
    "an unknown dtype": (header(lambda found: found[A].update(dtype="F31")), "dtype 'F31'"),
    "a field too many": (header(lambda found: found[A].update(pickle="x")), "exactly dtype"),
    # the numbers
    "NaN in lora_A": (value(A, float("nan")), "lora_A.weight' holds 1 values that are NaN"),
    "Inf in lora_B": (value(B, float("inf")), "lora_B.weight' holds 1 values"),
    "minus infinity": (value(B, float("-inf")), "NaN or infinite"),
    "1e30": (value(A, 1e30), "1e\\+30"),
    "norms out of proportion": (arrays(lambda found: [x.fill(5000) for x in found.values()]), "scaling"),
    "NaN in half precision": (
        arrays(lambda found: found.update({A: np.full((4, 16), np.nan, np.float16)})),
        "holds 64 values that are NaN",
    ),
    # the names and shapes
    "a layer missing": (
        arrays(lambda found: [found.pop(k) for k in list(found) if ".1.self_attn.v_proj" in k]),
        "layers.1.self_attn.v_proj' is to be adapted and has no tensors",
    ),
    "an A without its B": (_gone(B), "has no lora_B.weight"),
    "a B without its A": (_gone(A), "has no lora_A.weight"),
    "an unknown key": (_named("surprise"), "'surprise' is a weight of the base"),
    "lm_head.weight": (_named("lm_head.weight"), "'lm_head.weight' is a weight of the base"),
    "q_proj.base_layer.weight": (_named(f"{Q}.base_layer.weight"), "base_layer.weight' is a weight of the base"),
    "a module that the base lacks": (
        arrays(lambda found: found.update({k.replace(".0.", ".7."): v for k, v in found.items() if ".0." in k})),
        "layers.7.self_attn.q_proj' is not a linear layer",
    ),
    "a module that is not targeted": (_named(A.replace("q_proj", "o_proj"), (4, 16)), "not among target_modules"),
    "both forms of one key": (_named(A.removeprefix("base_model.model."), (4, 16)), "there twice"),
    "an embedding": (
        _named("base_model.model.model.embed_tokens.lora_embedding_A", (4, 64)),
        "embed_tokens' has no lora_B.weight",
    ),
    "a magnitude of DoRA": (_named(f"{Q}.lora_magnitude_vector", (16,)), "DoRA"),
    "int8 tensors": (arrays(lambda found: found.update({A: np.ones((4, 16), np.int8)})), "is I8"),
    "float64 tensors": (arrays(lambda found: found.update({A: np.ones((4, 16))})), "is F64"),
    "A transposed": (arrays(lambda found: found.update({A: found[A].T.copy()})), r"is \(16, 4\), should be \(4, 16\)"),
    "A and B of different rank": (
        arrays(lambda found: found.update({B: np.ones((16, 8), np.float32)})),
        r"is \(16, 8\), should be \(16, 4\)",
    ),
    "a tensor of one dimension": (arrays(lambda found: found.update({A: np.ones(64, np.float32)})), r"is \(64\)"),
    "a bias that is not announced": (_named(f"{Q}.lora_B.bias", (16,)), "lora_bias is not true"),
    # the configuration
    "r of 0": (config(r=0), "r is 0"),
    "r of -1": (config(r=-1), "r is -1"),
    'r of "4"': (config(r="4"), "r is '4'"),
    "r of 4.0": (config(r=4.0), "r is 4.0"),
    "r of true": (config(r=True), "r is True"),
    "r of 2,000,000": (config(r=2_000_000), "r is 2000000"),
    "r that the tensors do not have": (config(r=8), r"should be \(8, 16\) by r or rank_pattern"),
    "alpha NaN": (text(C, json.dumps(CONFIG).replace('"lora_alpha": 8', '"lora_alpha": NaN').encode()), "NaN"),
    "alpha 1e9": (config(lora_alpha=1e9), "lora_alpha is 1000000000.0"),
    "alpha 1e999": (text(C, json.dumps(CONFIG).replace('"lora_alpha": 8', '"lora_alpha": 1e999').encode()), "inf"),
    "alpha 0": (config(lora_alpha=0), "lora_alpha is 0"),
    "a scaling over 1,000": (config(lora_alpha=100_000), "the scaling is 25000"),
    "an unknown peft_type": (config(peft_type="EVIL"), "peft_type is 'EVIL'"),
    "no peft_type": (config(peft_type=None), "peft_type is None"),
    "a prompt tuning adapter": (config(peft_type="PROMPT_TUNING"), "PROMPT_TUNING"),
    "a regex that matches nothing": (config(target_modules="nothing"), "selects no linear layer"),
    "catastrophic regex in rank_pattern": (
        config(rank_pattern={"(.*)*(.*)*(.*)*X": 4}),
        "rank_pattern has the pattern",
    ),
    "catastrophic regex in alpha_pattern": (config(alpha_pattern={"(x+x+)+y": 4}), "alpha_pattern has the pattern"),
    "catastrophic regex in layers_pattern": (config(layers_to_transform=[0], layers_pattern="(a+)+"), "layers_pattern"),
    "a rank_pattern of 2,000,000": (config(rank_pattern={"q_proj": 2_000_000}), "rank_pattern"),
    "20,000 patterns": (config(rank_pattern={f"m{i}": 4 for i in range(20_000)}), "20,000 entries"),
    "target_modules of numbers": (config(target_modules=[1, 2]), "not a list of module names"),
    "no target_modules": (config(target_modules=None), "target_modules is None"),
    "empty target_modules": (config(target_modules=[]), "target_modules is empty"),
    "auto_mapping": (
        config(auto_mapping={"base_model_class": "X", "parent_library": "os"}),
        "auto_mapping names code to import",
    ),
    "megatron_core": (config(megatron_core="antigravity"), "megatron_core names code to import"),
    "megatron_config": (config(megatron_config={"a": 1}), "megatron_config"),
    "PiSSA": (config(init_lora_weights="pissa_niter_16"), "with lora-rt convert"),
    "OLoRA": (config(init_lora_weights="olora"), "convert it"),
    "CorDA": (config(init_lora_weights="corda"), "convert it"),
    "LoRA-GA": (config(init_lora_weights="lora_ga"), "convert it"),
    "LoftQ": (config(init_lora_weights="loftq"), "convert it"),
    "an unknown init": (config(init_lora_weights="surprise"), "unknown here"),
    "DoRA": (config(use_dora=True), "DoRA"),
    "QA-LoRA": (config(use_qalora=True), "use_qalora"),
    "aLoRA of no tokens": (config(alora_invocation_tokens=["here", -1]), "alora_invocation_tokens"),
    "layer replication": (config(layer_replication=[[0, 1]]), "layer_replication"),
    "modules_to_save": (config(modules_to_save=["lm_head"]), "modules_to_save names"),
    "biases of the base": (_both(config(bias="all"), _named(f"{Q}.base_layer.bias", (16,))), "a weight of the base"),
    "an unknown kind of biases": (config(bias="some"), "bias is 'some'"),
    "IA3": (config(peft_type="IA3"), "IA3, not LoRA"),
    "LoHa": (config(peft_type="LOHA"), "LoHa, not LoRA"),
    "LoKr": (config(peft_type="LOKR"), "LoKr, not LoRA"),
    "AdaLoRA": (config(peft_type="ADALORA"), "AdaLoRA"),
    "VeRA": (config(peft_type="VERA"), "VeRA, not LoRA"),
    "X-LoRA": (config(peft_type="XLORA"), "X-LoRA"),
    "MLX": (text(C, b'{"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 4}}'), "written by MLX"),
    "tensors of MLX": (_named(A.replace("lora_A.weight", "lora_a")), "written by MLX"),
    "the configuration of a model": (text(C, b'{"model_type": "llama", "architectures": ["X"]}'), "whole model"),
    "two adapters in one file": (
        arrays(lambda found: found.update({A.replace("lora_A", "lora_A.one"): found.pop(A)})),
        "several adapters",
    ),
    "a field of the future": (config(time_travel=True), "'time_travel' is True"),
    "a base that is not a text": (config(base_model_name_or_path=["a"]), "not a text"),
    "duplicate keys": (text(C, b'{"r": 4, "r": 8}'), "repeats the key 'r'"),
    "JSON nested 1,000 deep": (text(C, b"[" * 1000 + b"]" * 1000), "nested too deep|not an object"),
    "JSON nested 100,000 deep": (text(C, b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deep"),
    "a configuration of 2 MB": (text(C, b" " * 2_000_000), "more than the 1,048,576"),
    "an empty configuration": (text(C, b""), "is not JSON"),
    "a configuration that is a list": (text(C, b"[]"), "not an object"),
    # the card and the state
    "another base": (
        card(base={"id": "other/base", "revision": None, "digest": "x"}),
        "made for the base 'other/base'",
    ),
    "a card of the future": (card(schema_version=2), "schema_version is 2"),
    "a card that is no object": (text(R, b"[1]"), "register.json"),
    "a card without a mode": (card(mode=None), "mode"),
    "a mode that is a path": (card(mode="../x"), "mode"),
    "a register with control characters": (card(register="a\x1b[2Jb"), "register"),
    "a metric that is infinite": (text(R, json.dumps(CARD).replace("1.19", "1e999").encode()), "metrics"),
    "a state without a description": (_state(gate=np.ones(4, np.float32)), "does not describe"),
    "a state that is described and missing": (card(state={"g": {"dtype": "F32", "shape": [4]}}), "is missing"),
}


def pipe(folder: Path) -> None:
    """A pipe in place of the weights: who opens it waits forever."""
    (folder / W).unlink()
    os.mkfifo(folder / W)


def link(folder: Path) -> None:
    """A link to a file outside."""
    target = folder.parent / "outside.safetensors"
    (folder / W).rename(target)
    (folder / W).symlink_to(target)


def device(folder: Path) -> None:
    """A link to something endless."""
    (folder / C).unlink()
    (folder / C).symlink_to("/dev/zero")


def loop(folder: Path) -> None:
    """A link to itself."""
    (folder / R).unlink()
    (folder / R).symlink_to(folder / R)


def folder_for_a_file(folder: Path) -> None:
    """A folder in place of the configuration."""
    (folder / C).unlink()
    (folder / C).mkdir()


def case(folder: Path) -> None:
    """Two files whose names differ only by case."""
    (folder / "Adapter_Config.json").write_bytes(b"{}")


def only_case(folder: Path) -> None:
    """A file under another case."""
    (folder / R).rename(folder / "REGISTER.json")


def pickle(folder: Path) -> None:
    """A pickle in place of the weights."""
    (folder / W).rename(folder / "adapter_model.bin")


def huge(folder: Path) -> None:
    """A file of 20 GB that takes no room."""
    with open(folder / W, "r+b") as file:
        file.truncate(20 << 30)


def sparse(folder: Path) -> None:
    """8 GiB that take no room, of a rank beyond all use."""
    rank = 1 << 25
    body = 4 * rank * 16  # bytes of A
    entry = {"dtype": "F32", "shape": [rank, 16], "data_offsets": [0, body]}
    other = {"dtype": "F32", "shape": [48, rank], "data_offsets": [body, 4 * body]}
    start = raw({A: entry, B: other})
    (folder / W).write_bytes(start)
    with open(folder / W, "r+b") as file:
        file.truncate(len(start) + 4 * body)


def several(folder: Path) -> None:
    """Two parts of three."""
    content = (folder / W).read_bytes()
    (folder / W).unlink()
    for number in (1, 3):
        (folder / f"adapter_model-0000{number}-of-00003.safetensors").write_bytes(content)


def gguf(folder: Path) -> None:
    """An adapter for llama.cpp in place of the weights."""
    (folder / W).rename(folder / "adapter.gguf")


def whole_model(folder: Path) -> None:
    """A merged model in place of the weights."""
    (folder / W).rename(folder / "model.safetensors")


def cached_elsewhere(folder: Path) -> None:
    """A link that looks like one of the Hub client's cache and leaves its repository."""
    snapshot = folder / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "models--a--b" / "blobs").mkdir()
    (folder / W).rename(folder / "outside.safetensors")
    (folder / W).symlink_to(snapshot / W)
    (snapshot / W).symlink_to(folder / "outside.safetensors")


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO for a file": (pipe, "not a regular file|can not be opened"),
    "a symlinked file": (link, "symbolic link"),
    "a link to /dev/zero": (device, "symbolic link"),
    "a link to itself": (loop, "symbolic link"),
    "a folder for a file": (folder_for_a_file, "not a regular file|can not be opened"),
    "names that differ by case": (case, "only by case"),
    "a name in another case": (only_case, "only by case"),
    "a pickle": (pickle, "is a pickle, which is never opened"),
    "a file of 20 GB": (huge, "more than the"),
    "8 GiB of rank 33,554,432": (sparse, "is of rank 33,554,432, more than 4,096"),
    "a part of a sharded file missing": (several, "of the 3 parts of adapter_model.safetensors, number 2 is missing"),
    "an adapter for llama.cpp": (gguf, "is an adapter for llama.cpp"),
    "a merged model": (whole_model, "holds a whole model"),
    "a link out of a cached repository": (cached_elsewhere, "symbolic link"),
}
