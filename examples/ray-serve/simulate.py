"""Routes 10,000 requests/s over 1,000 adapters to 100 replicas, with and without a look at who has which adapter.

Every request is a composition of two adapters, drawn by Zipf's law. A replica keeps the adapters that it used last; one
that is not there has to be loaded. The routing is that of routing.py, request by request.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from routing import choose

Load = dict[int, int]
Residents = dict[int, OrderedDict[int, None]]
Policy = Callable[[tuple[int, ...], Residents, Load], int]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is simulated: counts, requests per second, seconds of service, Zipf's exponent."""

    adapters: int = 1000
    replicas: int = 100
    rate: int = 10_000
    seconds: float = 10.0
    service: float = 1.0
    kept: int = 50
    exponent: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of it. Loads are counted after the first half, when memories are full.

    hits: the part of adapters that were in memory. loads: adapters loaded per second, on all replicas. imbalance: the
    busiest replica's requests over the mean, averaged over time.
    """

    policy: str
    hits: float
    loads: float
    imbalance: float


def policies(traffic: Traffic) -> dict[str, Policy]:
    """Those that are compared."""
    random = np.random.default_rng(traffic.seed + 1)
    everyone = range(traffic.replicas)

    def anyone(adapters: tuple[int, ...], residents: Residents, load: Load) -> int:
        return int(random.integers(traffic.replicas))

    def less_busy_of_two(adapters: tuple[int, ...], residents: Residents, load: Load) -> int:
        return min((int(one) for one in random.integers(traffic.replicas, size=2)), key=load.__getitem__)

    def by_hash(adapters: tuple[int, ...], residents: Residents, load: Load) -> int:
        return hash((min(adapters), 7919)) % len(everyone)

    def with_affinity(slack: float) -> Policy:
        return lambda adapters, residents, load: choose(adapters, residents, load, slack)

    return {
        "any replica": anyone,
        "the less busy of two": less_busy_of_two,
        "by a hash of the first adapter": by_hash,
        "resident adapters": with_affinity(1.25),
        "resident adapters, no bound": with_affinity(1e9),
    }


def simulate(name: str, policy: Policy, traffic: Traffic) -> Figures:
    """One policy under this traffic."""
    random = np.random.default_rng(traffic.seed)
    count = int(traffic.rate * traffic.seconds)
    shares = 1 / np.arange(1, traffic.adapters + 1) ** traffic.exponent
    drawn = random.choice(traffic.adapters, size=(count, 2), p=shares / shares.sum())
    lasting = random.exponential(traffic.service, count)
    residents: Residents = {replica: OrderedDict() for replica in range(traffic.replicas)}
    load: Load = dict.fromkeys(residents, 0)
    ending: list[tuple[float, int]] = []
    hits = asked = 0
    imbalances = []
    for number in range(count):
        now = number / traffic.rate
        while ending and ending[0][0] <= now:
            load[heapq.heappop(ending)[1]] -= 1
        adapters = tuple(sorted({int(one) for one in drawn[number]}))
        replica = policy(adapters, residents, load)
        load[replica] += 1
        heapq.heappush(ending, (now + lasting[number], replica))
        counted = number >= count // 2
        for adapter in adapters:
            asked += counted
            hits += counted and adapter in residents[replica]
            residents[replica][adapter] = None
            residents[replica].move_to_end(adapter)
            if len(residents[replica]) > traffic.kept:
                residents[replica].popitem(last=False)
        if counted and number % 100 == 0:
            imbalances.append(max(load.values()) * traffic.replicas / sum(load.values()))
    return Figures(name, hits / asked, (asked - hits) / (traffic.seconds / 2), float(np.mean(imbalances)))


def main() -> None:
    """Print a table, or JSON."""
    usual = Traffic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, value in asdict(usual).items():
        parser.add_argument(f"--{field}", type=type(value), default=value)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    traffic = Traffic(**given)
    found = [simulate(name, policy, traffic) for name, policy in policies(traffic).items()]
    if as_json:
        print(json.dumps({"traffic": asdict(traffic), "policies": [asdict(one) for one in found]}, indent=2))
        return
    print(f"{'routing':32} {'hit rate':>9} {'loads/s':>9} {'busiest/mean':>13}")
    for one in found:
        print(f"{one.policy:32} {one.hits:9.1%} {one.loads:9,.0f} {one.imbalance:13.2f}")


if __name__ == "__main__":
    main()
