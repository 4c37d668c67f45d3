# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf_effdl[examples]",
# ]
#
# [tool.uv.sources]
# hf_effdl = { path = "../.." }
# ///

"""Search small covering designs and write them to hf_effdl/vicl/remote_code/ranker_covering_tables.py.

    python examples/benchmarks/covering_designs.py                       # what the table has, beside the bound
    python examples/benchmarks/covering_designs.py --search --seconds 4  # go on searching, keep what is smaller
    python examples/benchmarks/covering_designs.py --prune               # drop lines that are no longer needed

A design is sought among those that a cyclic group maps to themselves: the v points are c cycles of m points and f
fixed ones, and turning every cycle by one place maps blocks to blocks. Simulated annealing then only has to place one
block of each orbit, such that every orbit of pairs is covered, and the table has to keep no more than these. Sizes are
tried from the Schoenheim bound up, each with the groups that fit it, until one succeeds or the time is over; what the
table has is kept unless something smaller is found. A line is only written where `covering_design` needs more blocks
without it; improvements of larger designs may make it needless later.
"""

import argparse
import itertools
import math
import random
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from hf_effdl.vicl.remote_code import ranker_covering_tables as covering_tables
from hf_effdl.vicl.remote_code import ranker_designs as designs


FILE = Path(covering_tables.__file__)
ALPHABET = covering_tables.ALPHABET
# moves of one annealing
MOVES = 60_000
HOT, COLD = 0.7, 0.12


def configurations(v: int, k: int, low: int, high: int) -> Iterator[tuple[int, int, list[int]]]:
    """(blocks, m, sizes of stabilisers of the base blocks), the fewest blocks first, then the largest groups."""
    found = []
    for m in range(2 if v > 20 else 1, v + 1):
        cycles, fixed = divmod(v, m)
        if fixed > 2 and fixed != k:
            continue
        # a stabiliser of size d makes the block a union of cosets of d points, and of fixed points
        short = [d for d in range(2, m + 1) if m % d == 0 and any((k - e) % d == 0 for e in range(min(fixed, k) + 1))]
        for counts in itertools.product(range(4), repeat=min(len(short), 3)):
            spare = sum(s * (m // d) for s, d in zip(counts, short))
            for full in range(max(0, math.ceil((low - spare) / m)), (high - spare) // m + 1):
                kinds = [1] * full + [d for s, d in zip(counts, short) for _ in range(s)]
                if kinds:
                    found.append((full * m + spare, m, kinds))
    yield from sorted(found, key=lambda one: (one[0], -one[1]))


class Search:
    """Pairs of points modulo the group, and one annealing over base blocks."""

    def __init__(self, v: int, k: int, m: int) -> None:
        self.v, self.k, self.m = v, k, m
        self.orbit = [[-1] * v for _ in range(v)]
        self.orbits = 0
        for x, y in itertools.combinations(range(v), 2):
            if self.orbit[x][y] < 0:
                for turn in range(m):
                    a, b = self._turned(x, turn), self._turned(y, turn)
                    self.orbit[a][b] = self.orbit[b][a] = self.orbits
                self.orbits += 1
        self._units: dict[int, tuple] = {}

    def _turned(self, point: int, by: int) -> int:
        cycle, place = divmod(point, self.m)
        return point if cycle >= self.v // self.m else cycle * self.m + (place + by) % self.m

    def units(self, d: int) -> tuple:
        """What a block with a stabiliser of size d is made of: sets of points, and the orbits between any two."""
        if d not in self._units:
            step = self.m // d
            full = self.v // self.m * self.m
            sets = [[point] for point in range(full, self.v)] if d > 1 else []
            sets += [
                [self._turned(cycle + place, turn * step) for turn in range(d)]
                for cycle in range(0, full, self.m)
                for place in range(step)
            ]
            if d == 1:
                sets += [[point] for point in range(full, self.v)]
            between = [
                [tuple({self.orbit[x][y] for x in one for y in other if x != y}) for other in sets] for one in sets
            ]
            self._units[d] = sets, between
        return self._units[d]

    def _start(self, d: int, rng: random.Random) -> list[int] | None:
        sets = self.units(d)[0]
        fixed = [u for u, points in enumerate(sets) if len(points) == 1]
        cosets = [u for u, points in enumerate(sets) if len(points) == d]
        if d == 1:
            return rng.sample(range(len(sets)), self.k)
        for extra in range(min(len(fixed), self.k) + 1):
            if (self.k - extra) % d == 0 and (self.k - extra) // d <= len(cosets):
                return rng.sample(fixed, extra) + rng.sample(cosets, (self.k - extra) // d)
        return None

    def anneal(self, kinds: list[int], rng: random.Random, moves: int, until: float) -> list[list[int]] | None:
        """One block of each orbit, or None where it failed."""
        blocks = [self._start(d, rng) for d in kinds]
        if None in blocks:
            return None
        tables = [self.units(d) for d in kinds]
        count = [0] * self.orbits
        for (_, between), block in zip(tables, blocks):
            for i, u in enumerate(block):
                for w in block[i:]:
                    for o in between[u][w]:
                        count[o] += 1
        cost = count.count(0)
        cooling = (COLD / HOT) ** (1 / moves)
        heat, uniform, exp = HOT, rng.random, math.exp
        for move in range(moves):
            if not cost:
                break
            if not move % 4096 and time.monotonic() > until:
                return None
            heat *= cooling
            which = int(uniform() * len(blocks))
            block, (sets, between) = blocks[which], tables[which]
            place = int(uniform() * len(block))
            old, new = block[place], int(uniform() * len(sets))
            if new in block or len(sets[new]) != len(sets[old]):
                continue
            delta, leave, join = 0, between[old], between[new]
            for u in block:
                for o in leave[u]:
                    count[o] -= 1
                    if not count[o]:
                        delta += 1
            block[place] = new
            for u in block:
                for o in join[u]:
                    if not count[o]:
                        delta -= 1
                    count[o] += 1
            if delta <= 0 or uniform() < exp(-delta / heat):
                cost += delta
                continue
            for u in block:
                for o in join[u]:
                    count[o] -= 1
            block[place] = old
            for u in block:
                for o in leave[u]:
                    count[o] += 1
        if cost:
            return None
        return [sorted(point for u in block for point in sets[u]) for (sets, _), block in zip(tables, blocks)]


def search(v: int, k: int, known: int, seconds: float, seed: int) -> tuple[int, list[list[int]]] | None:
    """(m, base blocks) of a design of fewer than `known` blocks, if one is found in time."""
    rng = random.Random(f"{v} {k} {seed}")
    until = time.monotonic() + seconds
    searches: dict[int, Search] = {}
    low = designs.schoenheim_bound(v, k)
    todo = list(configurations(v, k, low, known - 1))
    moves = MOVES
    while todo and time.monotonic() < until:
        by_size = itertools.groupby(todo, key=lambda one: one[0])
        for _, group in by_size:
            for _, m, kinds in itertools.islice(group, 6):
                if m not in searches:
                    searches[m] = Search(v, k, m)
                if sum(k * (k - 1) // 2 for _ in kinds) < searches[m].orbits:
                    continue
                found = searches[m].anneal(kinds, rng, min(moves, 3000 * len(kinds)), until)
                if found is not None:
                    return m, found
                if time.monotonic() > until:
                    return None
        moves *= 2
    return None


def line(v: int, m: int, blocks: list[list[int]]) -> str:
    return " ".join([str(v), str(m), *("".join(ALPHABET[point] for point in block) for block in blocks)])


def wrapped(line: str) -> str:
    return " \\\n".join(textwrap.wrap(line, 100))


def write(lines: dict[int, dict[int, str]]) -> None:
    body = "".join(
        f'    {k}: """\n' + "".join(f"{wrapped(lines[k][v])}\n" for v in sorted(lines[k])) + '""",\n'
        for k in sorted(lines)
    )
    head = FILE.read_text().split("DESIGNS = {\n")[0]
    FILE.write_text(f"{head}DESIGNS = {{\n{body}}}\n")


def current() -> dict[int, dict[int, str]]:
    return {
        k: {int(one.split()[0]): one for one in text.split("\n") if one} for k, text in covering_tables.DESIGNS.items()
    }


def size(v: int, k: int, lines: dict[int, dict[int, str]]) -> int:
    """Blocks of what `covering_design` makes of these lines."""
    covering_tables.DESIGNS.clear()
    covering_tables.DESIGNS.update({one: "\n".join(lines[one].values()) for one in lines})
    designs._design.cache_clear()
    return len(designs.covering_design(v, k))


def prune(lines: dict[int, dict[int, str]]) -> None:
    """Drops lines without which their size has no more blocks."""
    for k in sorted(lines):
        for v in sorted(lines[k], reverse=True):
            without = {one: {u: text for u, text in of.items() if (one, u) != (k, v)} for one, of in lines.items()}
            if size(v, k, without) <= size(v, k, lines):
                print(f"({v}, {k}) is not needed")
                lines = without
    write(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--k", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--v", type=int, nargs=2, default=[3, 50], help="first and last number of points")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each design")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prune", action="store_true")
    options = parser.parse_args()
    if options.prune:
        prune(current())
    for k in options.k:
        for v in range(options.v[1], max(options.v[0], k + 1) - 1, -1):
            lines = current()
            lines.setdefault(k, {})
            before, bound = size(v, k, lines), designs.schoenheim_bound(v, k)
            if options.search and before > bound:
                found = search(v, k, before, options.seconds, options.seed)
                if found is not None:
                    lines[k][v] = line(v, *found)
                    write(lines)
                before = min(before, size(v, k, lines))
            print(f"({v}, {k}): {before} blocks, bound {bound}, {before / bound:.3f}", flush=True)


if __name__ == "__main__":
    main()
