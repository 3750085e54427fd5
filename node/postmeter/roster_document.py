"""The roster as it lies in etcd, at `<prefix>roster`, and the changes that may be made to it.

    {"generations": {"7": ["mx1", "mx2"], "8": ["mx1", "mx2", "mx3"]}, "stopped": ["mx4"], "last": "mx3 joined"}

Whoever changes it (a node that joins, `postmeter node`) replaces the value by compare-and-swap. One change is made at a
time: the next one is refused until every living node follows it, as its `status` says, or follows its own leaving. (All
who could tell a newcomer of one that does not may be removed meanwhile: core/roster.py.) Only `removed` may come in
between, because a node that does not follow may be the one that is down.

Generations are kept until some member says that it is `settled`: that nobody can be spending by an older one. So a
newcomer knows which stopped nodes may have used something that still counts, and waits for it as the others do.

A node that was taken out never comes back under the same name. Its machine does, as NAME~2 and so on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from postmeter.core.identity import is_node_name
from postmeter.core.roster import Members
from postmeter.defaults import GENERATIONS_MAX, ROSTER_NODES_MAX, STOPPED_NODES_MAX
from postmeter.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RosterDocument:
    """Generations by number, nodes that were declared stopped, and what was changed last, for people to read.

    `mod_revision` is when the value in etcd was written that this is, or is made of; 0 if there was none. It replaces
    no other.
    """

    generations: Mapping[int, Members]
    stopped: Members = ()
    last: str = ""
    mod_revision: int = field(default=0, compare=False)

    @property
    def generation(self) -> int:
        """The newest one."""
        return max(self.generations)

    @property
    def members(self) -> Members:
        """The nodes of the newest generation."""
        return self.generations[self.generation]

    @property
    def concerned(self) -> set[str]:
        """The living nodes of all generations that are kept."""
        return {node for members in self.generations.values() for node in members} - {*self.stopped}

    def awaited(self, adopted: Mapping[str, int]) -> dict[str, int]:
        """The living nodes that do not follow yet, and which generation they have to.

        That is the newest, or the first without the node. `adopted` is which generation each node follows.
        """
        late = {}
        for node in sorted(self.concerned):
            last = max(number for number, members in self.generations.items() if node in members)
            if adopted.get(node, 0) < min(last + 1, self.generation):
                late[node] = min(last + 1, self.generation)
        return late

    def born(self, node: str) -> int:
        """The generation before the first with this node."""
        return min(number for number, members in self.generations.items() if node in members) - 1

    def text(self) -> str:
        """As it is written to etcd."""
        generations = {str(number): list(members) for number, members in sorted(self.generations.items())}
        return json.dumps({"generations": generations, "stopped": list(self.stopped), "last": self.last})

    # --- changes ------------------------------------------------------------------------------------------------------

    def joined(self, node: str, adopted: Mapping[str, int], settled: bool) -> RosterDocument:
        """With one more node. Raises ConfigError if it has to wait."""
        if node in self.members or node in self.stopped:
            raise ConfigError([f"{node} is or was in the roster: a node joins once"])
        if len(self.members) >= ROSTER_NODES_MAX:
            raise ConfigError([f"the roster has {ROSTER_NODES_MAX} nodes, more are not supported"])
        self._check_complete(adopted)
        return self._next([*self.members, node], f"{node} joined", settled)

    def drained(self, node: str, adopted: Mapping[str, int], settled: bool) -> RosterDocument:
        """Without a node that runs, and hands over what it has. Raises ConfigError if it must not or has to wait."""
        self._check_member(node)
        self._check_complete(adopted)
        return self._next([each for each in self.members if each != node], f"{node} drained", settled)

    def removed(self, node: str, adopted: Mapping[str, int], settled: bool) -> RosterDocument:
        """Without a node whose machine is down for good. Raises ConfigError."""
        if node not in self.concerned:
            self._check_member(node)
        changed = self
        if node in self.members:
            changed = self._next(
                [each for each in self.members if each != node], "", settled and not self.awaited(adopted)
            )
        stopped = (*(each for each in self.stopped if each != node), node)
        return replace(changed, stopped=stopped[-STOPPED_NODES_MAX:], last=f"{node} removed")

    def _next(self, members: Iterable[str], last: str, settled: bool) -> RosterDocument:
        """With one more generation; `settled`: those before the newest are not needed any more."""
        kept = {self.generation: self.members} if settled else self.generations
        if len(kept) >= GENERATIONS_MAX:
            raise ConfigError(
                [
                    f"{GENERATIONS_MAX} changes are under way: bring the nodes up that have to follow, and wait until"
                    " what removed ones have used does not count any more"
                ]
            )
        return replace(self, generations={**kept, self.generation + 1: tuple(sorted(members))}, last=last)

    def _check_member(self, node: str) -> None:
        if node not in self.members:
            raise ConfigError([f"{node} is not in the roster; there are {', '.join(self.members) or 'none'}"])

    def _check_complete(self, adopted: Mapping[str, int]) -> None:
        late = self.awaited(adopted)
        if late:
            names = ", ".join(f"{node} (generation {number})" for node, number in late.items())
            raise ConfigError(
                [
                    f"has not followed the last change yet ({self.last}): {names}. Wait until it is up and reaches etcd"
                    " and its peers, or, if its machine is down for good, take it out with"
                    f" `postmeter node remove {next(iter(late))}`"
                ]
            )


def first_roster(node: str) -> RosterDocument:
    """The roster of a cluster of one."""
    return RosterDocument({1: (node,)}, (), f"{node} began")


def read_roster(text: str | bytes, mod_revision: int = 0) -> RosterDocument:
    """What lies in etcd. Raises ConfigError."""
    try:
        value = json.loads(text)
        generations = {int(number): tuple(sorted(_nodes(nodes))) for number, nodes in value["generations"].items()}
        stopped = tuple(_nodes(value["stopped"]))
        last = str(value.get("last", ""))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            [f"roster: cannot be read ({error}); it is written by `postmeter node` and not to be edited: restore it"]
        ) from None
    numbers = sorted(generations)
    # A node that writes its own roster again may have closed some in between.
    if not numbers or numbers[0] < 1 or numbers[-2:] != [*range(numbers[-1] - len(numbers[-2:]) + 1, numbers[-1] + 1)]:
        raise ConfigError([f"roster: generations {numbers} are not consecutive; restore the value that it had"])
    return RosterDocument(generations, stopped, last, mod_revision)


def _nodes(value: object) -> list[str]:
    if not isinstance(value, list) or len(set(map(str, value))) < len(value):
        raise ValueError(f"{value!r} is no list of different nodes")
    for node in value:
        if not isinstance(node, str) or not is_node_name(node):
            raise ValueError(f"{node!r} is no name of a node")
    return value
