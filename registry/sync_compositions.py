"""Named compositions between the store and `lora-rt.lock`: which are locked, what differs, and putting them back."""

from __future__ import annotations

from lora_rt.errors import LoraRtError
from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.composition_check import mix_problems
from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.errors import ChangedAdapterError, ProjectError
from lora_rt.registry.locked_compositions import read_locked_compositions
from lora_rt.registry.project import PROJECT_FILE, Project
from lora_rt.registry.registry import Registry


def mixes_to_lock(registry: Registry, project: Project | None) -> list[NamedComposition]:
    """The compositions that the project names; without a project, those of adapters that other machines can get.

    One that is not here stays as it is locked.

    Raises:
        ProjectError: one is neither here nor locked, or has terms that can't be used; all are named.
    """
    if project is None:
        mixes = [mix for name in registry.compositions.names() if (mix := registry.compositions.get(name)) is not None]
        return [mix for mix in mixes if _portable(registry, mix)]
    locked = {mix.name: mix for mix in read_locked_compositions(registry.folder)}
    found, problems = [], []
    for name in project.compositions:
        mix = registry.compositions.get(name)
        if mix is not None:
            problems += [f"{name}: {problem}" for problem in mix_problems(registry, mix)]
        elif name not in locked:
            problems.append(f"{name}: there is no such composition here")
        found += [kept] if (kept := mix or locked.get(name)) is not None else []
    if problems:
        text = f"compositions of {PROJECT_FILE} can't be locked"
        raise ProjectError(text, next_step="Tune them with: lora-rt tune", problems=problems)
    return found


def mix_differences(registry: Registry, project: Project | None) -> list[str]:
    """What the lock says of compositions and the project, or the store, does not."""
    locked = {mix.name: mix for mix in read_locked_compositions(registry.folder)}
    problems = []
    if project is not None:
        problems += [f"the composition {name} is not locked" for name in project.compositions if name not in locked]
        problems += [
            f"the composition {name} is locked, but not in the project"
            for name in locked
            if name not in project.compositions
        ]
    for name, mix in locked.items():
        here = registry.compositions.get(name)
        if here is not None and here.sha256 != mix.sha256:
            problems.append(f"the composition {name} is {here.sha256[:12]} here, locked is {mix.sha256[:12]}")
    return problems


def install_mixes(registry: Registry) -> list[NamedComposition]:
    """Put the locked compositions that are not here into the store, and check the adapters of all.

    Raises:
        ChangedAdapterError: one is another here, or its adapters are missing or others; all are named.
    """
    locked = read_locked_compositions(registry.folder)
    problems = mix_differences(registry, None)
    if problems:
        raise ChangedAdapterError(problems[0], next_step="Keep it with lora-rt lock, or remove it with lora-rt rm")
    for mix in locked:
        if registry.compositions.get(mix.name) is None:
            registry.compositions.save(mix)
    broken = [f"{mix.name}: {problem}" for mix in locked for problem in mix_problems(registry, mix)]
    if broken:
        text = "locked compositions can't be used with the adapters here"
        raise ChangedAdapterError(text, next_step="Get these adapters, or tune anew", problems=broken)
    return locked


def _portable(registry: Registry, mix: NamedComposition) -> bool:
    try:
        items = [registry.resolve(t.reference, BaseIdentity(mix.base, None, ""), offline=True) for t in mix.terms]
    except LoraRtError:
        return False
    return all(item.source.startswith(("hub ", "shipped ")) for item in items)
