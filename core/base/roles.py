"""What the layers of a base are for, told by their names, and which of them a list of targets means.

    query key value output     = attention     one projection may serve several: c_attn, qkv_proj, kv_b_proj
    gate up down               = mlp           gate_up_proj is both
    experts                                    those of a mixture, fused or not

The words mean the same in every architecture. Beside them a target may be a layer's name or the end of its path, a
regular expression for whole paths, or `all-linear`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from lora_rt.errors import SettingsError

ALL_LINEAR = "all-linear"
WIDER: Mapping[str, tuple[str, ...]] = {
    "attention": ("query", "key", "value", "output"),
    "mlp": ("gate", "up", "down"),
}
ROLES = ("query", "key", "value", "output", "gate", "up", "down", "experts")

_QKV, _KV, _GATE_UP = ("query", "key", "value"), ("key", "value"), ("gate", "up")
_LEAVES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj", "q_lin", "wq", "to_q"), ("query",)),
    **dict.fromkeys(("k_proj", "k_lin", "wk", "to_k"), ("key",)),
    **dict.fromkeys(("v_proj", "v_lin", "wv", "to_v"), ("value",)),
    **dict.fromkeys(("o_proj", "o_a_proj", "o_b_proj", "out_lin", "wo"), ("output",)),
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "c_attn", "qkv", "in_proj_qkv"), _QKV),
    **dict.fromkeys(("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"), _KV),
    **dict.fromkeys(("gate_up_proj", "up_gate_proj"), _GATE_UP),
    **dict.fromkeys(("gate_proj", "w1", "wi_0"), ("gate",)),
    **dict.fromkeys(("up_proj", "w3", "wi_1", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "lin1"), ("up",)),
    **dict.fromkeys(("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "lin2"), ("down",)),
}
_IN_ATTENTION: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("query", "q"), ("query",)),
    **dict.fromkeys(("key", "k"), ("key",)),
    **dict.fromkeys(("value", "v"), ("value",)),
    **dict.fromkeys(("out_proj", "c_proj", "dense", "output", "o", "proj"), ("output",)),
}
_IN_MLP: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("c_proj", "out_proj", "dense_out"), ("down",)),
    **dict.fromkeys(("intermediate.dense", "in_proj"), ("up",)),
    "output.dense": ("down",),
}
ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|intermediate|output", re.IGNORECASE)
_EXPERT = re.compile(r"(^|\.)(local_)?experts\.")
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")


class TargetError(SettingsError):
    """Targets that the base has no layers for."""


def roles_of(name: str) -> tuple[str, ...]:
    """The roles of the layer or parameter of this path; none where its name does not tell, as in a recurrence."""
    if _EXPERT.search(name):
        return ("experts",)
    *parents, leaf = name.split(".")
    near = parents[-3:]
    if any(ATTENTION.search(parent) for parent in near) and leaf in _IN_ATTENTION:
        return _IN_ATTENTION[leaf]
    if leaf in _LEAVES:
        return _LEAVES[leaf]
    if any(_MLP.search(parent) for parent in near):
        return _IN_MLP.get(".".join([*parents[-1:], leaf])) or _IN_MLP.get(leaf, ())
    return ()


def anywhere(name: str) -> str:
    """A layer's path in whichever block it stands: `model.layers.*.mlp.up_proj`."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def resolved(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """The full paths that targets mean, in the order of `names`.

    Raises:
        TargetError: one that means none, with the nearest name and the role that it may have meant.
    """
    chosen: set[str] = set()
    problems = []
    for one in wanted:
        found = _meant(one, names)
        chosen.update(found)
        if not found:
            problems.append(_unknown(one, names))
    if problems or not wanted:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names if "." in name})
        raise TargetError(
            f"the target modules do not fit this base, which has: {', '.join(leaves)}",
            problems=problems or ["none is given"],
            next_step=f"Use some of these, a role ({', '.join(_roles_here(names))}), or {ALL_LINEAR}",
        )
    return [name for name in names if name in chosen]


def _meant(target: str, names: Sequence[str]) -> list[str]:
    if target == ALL_LINEAR:
        return list(names)
    if found := [name for name in names if name == target or name.endswith(f".{target}")]:
        return found
    if target in WIDER or target in ROLES:
        roles = WIDER.get(target, (target,))
        return [name for name in names if set(roles) & set(roles_of(name))]
    if _PLAIN.fullmatch(target):
        return []
    try:
        pattern = re.compile(target)
    except re.error:
        return []
    return [name for name in names if pattern.fullmatch(name)]


def _unknown(target: str, names: Sequence[str]) -> str:
    if target in WIDER or target in ROLES:
        return f"this base has no layers of the role {target!r}; it has: {', '.join(_roles_here(names)) or 'none'}"
    if not _PLAIN.fullmatch(target):
        return f"the pattern {target!r} matches no layer's path"
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names if "." in name})
    roles = roles_of(f"attention.{target}") or roles_of(f"mlp.{target}")
    same = [leaf for name in names for leaf in [name.rsplit(".", 1)[-1]] if set(roles) & set(roles_of(name))]
    near = same[:1] or difflib.get_close_matches(target, [*leaves, *ROLES, *WIDER], n=1, cutoff=0.3)
    role = f", of the role {roles[0]!r}" if roles and same else ""
    return f"no layer is called {target!r}" + (f"; the nearest is {near[0]!r}{role}" if near else "")


def _roles_here(names: Sequence[str]) -> list[str]:
    found = {role for name in names for role in roles_of(name)}
    wider = [word for word, roles in WIDER.items() if found & set(roles)]
    return [*wider, *(role for role in ROLES if role in found)]


def as_peft_takes_them(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """The last parts of these paths where they mean the same layers; else the whole paths."""
    leaves = {name.rsplit(".", 1)[-1] for name in chosen}
    same = {name for name in names if name.rsplit(".", 1)[-1] in leaves}
    # A number is the name of many things: of blocks, too, that PEFT would take for layers.
    if same == set(chosen) and not any(leaf.isdigit() for leaf in leaves):
        return sorted(leaves)
    return sorted(chosen)
