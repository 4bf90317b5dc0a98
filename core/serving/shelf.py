"""Which adapters stay in memory: those in use, those that are pinned, and of the others the latest, up to a bound."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.requests.composition import Composition, Term
from lora_rt.core.requests.residents import AdapterInfo
from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.metrics import Meter
from lora_rt.errors import LoraRtError
from lora_rt.registry.reference import Reference


@dataclass(frozen=True, slots=True)
class Shelved:
    """One resident adapter: what it is, its bytes, the rows that use it now, and whether it stays."""

    info: AdapterInfo
    nbytes: int
    rows: int
    pinned: bool


class Shelf:
    """The resident adapters of a server.

    An adapter that running rows use is never put away by itself: without it in the bank, its factors would be laid
    out anew for every token. What an operator unloads or reloads stays with the rows that began with it.

    Args:
        room: bytes that adapters may take which nobody uses now.
    """

    def __init__(self, runtime: Runtime, meter: Meter, room: int) -> None:
        self._runtime = runtime
        self._meter = meter
        self._room = room
        self._lock = threading.Lock()
        self._users: Counter[ResidentAdapter] = Counter()
        self._latest: OrderedDict[str, None] = OrderedDict()
        self._pinned: set[str] = set()

    def take(self, adapters: Iterable[ResidentAdapter]) -> None:
        """A row will use them."""
        with self._lock:
            for adapter in adapters:
                self._users[adapter] += 1
                self._latest[adapter.name] = None
                self._latest.move_to_end(adapter.name)

    def give_back(self, adapters: Iterable[ResidentAdapter]) -> None:
        """A row has ended."""
        with self._lock:
            self._users.subtract(adapters)
            self._users = +self._users

    def trim(self) -> None:
        """Put away what was not used for longest, until the rest fits."""
        with self._lock:
            bank = self._runtime.parts.bank
            free = {n: r for n, r in bank.residents.items() if n not in self._pinned and not self._users[r]}
            idle = {name: bank.nbytes_of(resident) for name, resident in free.items()}
            oldest = sorted(idle, key=lambda name: list(self._latest).index(name) if name in self._latest else -1)
            total = sum(idle.values())
            for name in oldest:
                if total <= self._room:
                    break
                total -= idle[name]
                self._latest.pop(name, None)
                with suppress(LoraRtError):  # somebody else has unloaded it
                    self._runtime.unload_adapter(name)
            self._meter.memory(adapters=sum(map(bank.nbytes_of, bank.residents.values())))

    def load(self, name: str, *, pin: bool = False) -> str:
        """Make an adapter resident, or all of a named composition; with `pin` it stays. Returns the first one's name.

        Raises:
            LoraRtError: it can't be loaded.
        """
        residents = [info.name for info, _ in self._runtime.terms(Composition((Term(Reference.parse(name)),)))]
        with self._lock:
            self._latest |= dict.fromkeys(residents)
            if pin:
                self._pinned |= set(residents)
        self.trim()
        return residents[0]

    def unpin(self, name: str) -> None:
        """Let it, or all of a named composition, be put away again."""
        named = self._runtime.parts.registry.compositions.look_up(name) if name not in self._runtime.adapters else None
        if named is None:
            names = {self._runtime.resident(name).name}
        else:
            names = {info.name for info, _ in self._runtime.terms(name)}
        with self._lock:
            self._pinned -= names
        self.trim()

    def reload(self, name: str) -> str:
        """Read its files again; rows that began with the old one keep it.

        Raises:
            LoraRtError: it is not what may be loaded; the old one stays.
        """
        self._runtime.parts.residents.reload(Reference.parse(name))
        self.trim()
        return name

    def unload(self, name: str) -> None:
        """Put it away, pinned or not.

        Raises:
            LoraRtError: it is not resident.
        """
        self._runtime.unload_adapter(name)
        with self._lock:
            self._pinned.discard(name)
            self._latest.pop(name, None)
        self.trim()

    def items(self) -> list[Shelved]:
        """What is resident, by name."""
        bank, infos = self._runtime.parts.bank, self._runtime.adapters
        with self._lock:
            return [
                Shelved(infos[name], bank.nbytes_of(resident), self._users.get(resident, 0), name in self._pinned)
                for name, resident in sorted(bank.residents.items())
                if name in infos
            ]
