"""faults - what goes wrong with a network and its nodes, and when.

NAME
    FAULTS - the shapes of trouble, by name: of machines and chance a Drops, or a sequence of them
    schedule - all that happens in a run, in order of time

DESCRIPTION
    halves      two parts that do not hear each other; etcd is in one of them
    rest        one node is alone
    ring        each node hears its two neighbours only (of three nodes: a chain)
    one-way     between most pairs packets go one way only
    loss        30 % of all packets are lost
    changing    every few seconds another of these, or none

    Beside that, nodes are killed (kill -9) and started again, and frozen and thawed. The same seed gives the same
    schedule; what the agents make of it depends on the machine's speed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .network import Drops, cut

ETCD = "etcd"
LOSS_PERCENT = 30
# How long a network stays as it is while it is `changing`.
CHANGE_S = (2.0, 5.0)

What = Literal["drop", "kill", "start", "freeze", "thaw"]
# What happens to some node in each run, one after the other: what begins it, what ends it, how long it lasts at most.
SPELLS: list[tuple[What, What, float]] = [("kill", "start", 4.0), ("freeze", "thaw", 6.0), ("kill", "start", 4.0)]


@dataclass(frozen=True, slots=True, order=True)
class Event:
    """At `at_s` of the run the network loses `drops`, or something happens to a node."""

    at_s: float
    what: What
    node: str = ""
    drops: Drops = field(default_factory=dict, compare=False)


def _halves(nodes: Sequence[str], chance: random.Random) -> Drops:
    mixed = chance.sample(nodes, len(nodes))
    sides = [mixed[: len(nodes) // 2], mixed[len(nodes) // 2 :]]
    chance.choice(sides).append(ETCD)
    return cut(sides[0], sides[1])


def _rest(nodes: Sequence[str], chance: random.Random) -> Drops:
    alone = chance.choice(nodes)
    return cut([alone], [*nodes, ETCD])


def _ring(nodes: Sequence[str], chance: random.Random) -> Drops:
    order = chance.sample(nodes, len(nodes))
    ends = [(0, len(nodes) - 1)] if len(nodes) == 3 else []
    far = [(a, b) for a, b in itertools.combinations(range(len(nodes)), 2) if 1 < b - a < len(nodes) - 1]
    drops: dict[tuple[str, str], int] = {}
    for a, b in far + ends:
        drops |= cut([order[a]], [order[b]])
    return drops


def _one_way(nodes: Sequence[str], chance: random.Random) -> Drops:
    pairs = [tuple(chance.sample(pair, 2)) for pair in itertools.combinations([*nodes, ETCD], 2)]
    return {(source, destination): 100 for source, destination in pairs if chance.random() < 0.7}


def _loss(nodes: Sequence[str], chance: random.Random) -> Drops:
    machines = [*nodes, ETCD]
    return cut(machines, machines, LOSS_PERCENT)


SHAPES: dict[str, Callable[[Sequence[str], random.Random], Drops]] = {
    "halves": _halves,
    "rest": _rest,
    "ring": _ring,
    "one-way": _one_way,
    "loss": _loss,
}
FAULTS = (*SHAPES, "changing")


def schedule(fault: str, nodes: Sequence[str], chance: random.Random, begin_s: float, end_s: float) -> list[Event]:
    """What happens between `begin_s` and `end_s` of a run. At the end all is well again, if it was not before."""
    if fault == "changing":
        events = []
        at_s = begin_s
        while at_s < end_s:
            shape = chance.choice([*SHAPES.values(), lambda *_: {}])
            events.append(Event(at_s, "drop", drops=shape(nodes, chance)))
            at_s += chance.uniform(*CHANGE_S)
    else:
        events = [Event(begin_s, "drop", drops=SHAPES[fault](nodes, chance))]
    spell_s = (end_s - begin_s) / len(SPELLS)
    for number, (down, up, longest_s) in enumerate(chance.sample(SPELLS, len(SPELLS))):
        node, length_s = chance.choice(nodes), chance.uniform(0.2, min(longest_s, spell_s))
        from_s = begin_s + number * spell_s + chance.uniform(0, spell_s - length_s)
        events += [Event(from_s, down, node), Event(from_s + length_s, up, node)]
    return sorted([*events, Event(end_s, "drop")])
