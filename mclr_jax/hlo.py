"""The collectives in the text of a compiled program (HLO)."""

import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
COLLECTIVE = re.compile(rf"%?([\w.-]+) = (.+?) ({'|'.join(KINDS)})(-start|-done)?\(")
CALLED = re.compile(r"(?:body|calls|branch_computations)=\{?(%?[\w.-]+(?:, %?[\w.-]+)*)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
LIMIT = re.compile(r"%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def _bytes(shape: str) -> int:
    """Bytes of the arrays in the text of a shape, such as "(f32[8,2]{1,0}, u8[4])"."""
    return sum(
        math.prod(map(int, filter(None, sides.split(",")))) * (int(bits or 8)) // 8
        for _, bits, sides in ARRAY.findall(shape)
    )


def _rounds(line: str, bodies: dict[str, list[str]]) -> int:
    """The number of runs of this line's loop, as the compiler says, or 1 if it is not constant.

    XLA:TPU says it by the condition alone: the count of a loop, from 0, is less than a constant.
    """
    if known := TRIPS.search(line):
        return int(known[1])
    condition = re.search(r" while\(.*condition=%?([\w.-]+)", line)
    lines = bodies.get(condition[1], []) if condition else []
    limits = {match[1]: int(match[2]) for each in lines if (match := LIMIT.search(each))}
    roots = (re.search(r"ROOT .* compare\(.*%([\w.-]+)\), direction=LT", each) for each in lines)
    return next((limits[root[1]] for root in roots if root and root[1] in limits), 1)


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """The collectives of a compiled program by kind: their number and the bytes of their results.

    Both are for one device. The body of a loop counts as often as it runs, where the compiler knows
    how often, and otherwise once: a dispatch of several steps counts as one step. The fusions into
    which XLA:TPU cuts an asynchronous collective have one channel, and count once. It writes a
    reduce-scatter as an all-reduce.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := COMPUTATION.match(line):
            name, entry = head[2], head[2] if head[1] else entry
        bodies.setdefault(name, []).append(line)
    found: dict[tuple, tuple[int, int]] = {}  # runs of each collective, and bytes of a run

    def walk(name: str, times: int, fused: bool) -> None:
        for line in bodies.get(name, ()):
            match = COLLECTIVE.search(line)
            if match and match[4] != "-start":  # the result of which is that of its -done
                which = re.findall(r"channel_id=\d+", line) if fused else match[1]
                size = _bytes(match[2])
                found[match[3], str(which), size] = times, size
            for called in CALLED.findall(line):
                for part in called.split(", "):
                    rounds = times * _rounds(line, bodies)
                    walk(part.strip("%"), rounds, fused or "fusion(" in line)

    walk(entry, 1, False)
    kinds = {kind: [v for key, v in found.items() if key[0] == kind] for kind in KINDS}
    return {
        kind: {"count": sum(n for n, _ in each), "bytes": sum(n * size for n, size in each)}
        for kind, each in kinds.items()
        if each
    }
