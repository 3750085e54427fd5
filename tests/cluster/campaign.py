"""campaign - clusters under load while their network and their nodes fail: does the cap hold?

NAME
    Run - what a run is; Result - what came of it; carry_out - the one to the other; table - of results

DESCRIPTION
    A run starts a cluster, asks every node about the same few users, far more than they may send, and lets a fault
    (faults.py) do its work. Users a, b and c share a domain's limit, which is less than their own limits together; d
    has a domain to himself. So requests fall under two limits of which either may be the one that refuses.

         0 s      load begins
         2 s      the fault begins; nodes are killed, started, frozen and thawed at random
        26 s      all is well again; the load pauses until all nodes show the same usage
        then      load until all that can have been lent to the dead is back, and a window more: when does the
                  first window begin in which all of `max` is admitted again?

    `most` of a result is the most that was admitted in any window, in per cent of `max`, on the meter with the largest
    part: count.py says how it is counted.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc

from postmeter.core.shared import Terms
from postmeter.defaults import SLICES_PER_WINDOW
from postmeter.errors import AgentError
from tests.postfix.mailhost import wait_until

from .cluster import Cluster
from .count import Meter, Reply, by_meter, first_full, most_admitted, refused_wrongly
from .faults import Event, schedule
from .load import Load

USERS = ("a@one.test", "b@one.test", "c@one.test", "d@two.test")
FAULT_FROM_S = 2.0
# The meters whose `max` the load exceeds; the others are held below theirs by these.
SATURATED: tuple[Meter, ...] = (("per-domain", "one.test"), ("per-user", "d@two.test"))
# A healthy cluster is watched for so many windows.
WINDOWS = 3


@dataclass(frozen=True, slots=True)
class Run:
    """`fault` is one of faults.FAULTS, or `none`. `max` is a user's, per window; a domain's is 2.5 times that."""

    fault: str
    nodes: int
    seed: int
    max: int = 60
    window_s: int = 12
    fault_s: int = 24
    borrow_timeout: str = "250ms"

    @property
    def caps(self) -> dict[Meter, int]:
        """The `max` of every meter."""
        caps = {("per-user", user): self.max for user in USERS}
        return caps | {("per-domain", domain): self.domain_max for domain in ("one.test", "two.test")}

    @property
    def domain_max(self) -> int:
        """A domain's, per window."""
        return self.max * 5 // 2

    @property
    def names(self) -> list[str]:
        """The nodes."""
        return [f"mx{number}" for number in range(1, self.nodes + 1)]

    @property
    def counted_s(self) -> float:
        """How long a node counts a charge, at most: to the end of its slice, and for a clock that is slow."""
        return self.window_s * (1 + 1 / SLICES_PER_WINDOW) + Terms().stretch_ms(self.window_s * 1000) / 1000

    @property
    def lent_s(self) -> float:
        """How long rights may be out of use that were lent to a node which died."""
        return Terms().longest_wait_ms(self.window_s * 1000) / 1000


@dataclass(slots=True)
class Result:
    """`problems` is empty if all that must hold did. Times are since the network was whole again, None: not at all."""

    run: Run
    admitted: dict[Meter, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)
    refused_wrongly: int = 0
    longest_ms: float = 0
    equal_s: float | None = None
    usable_s: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def most_percent(self) -> float:
        """The most that was admitted in a window, of any meter."""
        caps = self.run.caps
        return max((100 * most / caps[meter] for meter, most in self.admitted.items()), default=0)


def meters_of(user: str) -> tuple[Meter, ...]:
    """What a message of this user counts on."""
    return ("per-user", user), ("per-domain", user.partition("@")[2])


def carry_out(run: Run) -> Result:
    """Carry out a run. What was logged is kept if there was a problem, and named in it."""
    directory = Path(tempfile.mkdtemp(prefix="postmeter-cluster-"))
    result = Result(run)
    try:
        with Cluster(directory, run.names, settings={"borrow_timeout": run.borrow_timeout}) as cluster:
            try:
                _put_limits(run, cluster)
                cluster.start()
                replies = _trouble(run, cluster, result) if run.fault != "none" else _peace(run, cluster)
                _judge(run, replies, result)
                if result.problems:
                    (directory / "replies.json").write_text(json.dumps([asdict(reply) for reply in replies]))
                result.problems += [f"{name} died: {why}" for name, why in _dead(cluster)]
            finally:
                for agent in cluster.agents.values():
                    (directory / f"{agent.machine}.log").write_text(agent.earlier_log + agent.log())
    except Exception as error:  # noqa: BLE001 - a run that breaks must not end the others
        result.problems.append(f"{type(error).__name__}: {error}")
    if result.problems:
        result.problems.append(f"logs in {directory}")
    else:
        shutil.rmtree(directory)
    return result


def _put_limits(run: Run, cluster: Cluster) -> None:
    window = {"count": "recipients", "per": f"{run.window_s}s"}
    cluster.put_limit("per-user", key="sasl_username", max=run.max, **window)
    cluster.put_limit("per-domain", key="sasl_domain", max=run.domain_max, **window)


def _load(run: Run, cluster: Cluster, amounts: Sequence[int] = (1,)) -> Load:
    nodes = {name: agent.policy_socket for name, agent in cluster.agents.items()}
    return Load(nodes, USERS, meters_of, seed=run.seed, amounts=amounts)


def _peace(run: Run, cluster: Cluster) -> list[Reply]:
    with _load(run, cluster) as load:
        time.sleep(WINDOWS * run.window_s)
    return load.replies


def _trouble(run: Run, cluster: Cluster, result: Result) -> list[Reply]:
    events = schedule(run.fault, run.names, random.Random(run.seed), FAULT_FROM_S, FAULT_FROM_S + run.fault_s)
    with _load(run, cluster, (1, 1, 2, 3)) as before:
        began_s = time.monotonic()
        for event in events:
            time.sleep(max(0.0, began_s + event.at_s - time.monotonic()))
            _happen(event, cluster)
        healed_s = time.monotonic()
    result.equal_s = _await_equal(cluster) - healed_s
    with _load(run, cluster) as after:
        time.sleep(run.lent_s + run.window_s)
    meters = by_meter(after.replies)
    full_s = [first_full(meters[meter], run.caps[meter], run.window_s) for meter in SATURATED]
    if None not in full_s:
        result.usable_s = max(at_s for at_s in full_s if at_s is not None) - healed_s
    return before.replies + after.replies


def _happen(event: Event, cluster: Cluster) -> None:
    if event.what == "drop":
        cluster.network.drop(event.drops)
        return
    agent = cluster.agents[event.node]
    {"kill": agent.kill, "start": agent.launch, "freeze": agent.freeze, "thaw": agent.thaw}[event.what]()


def _await_equal(cluster: Cluster) -> float:
    """Until all nodes show the same usage of all users. Returns when that was."""
    seen: list[list[dict[str, dict[str, int]]]] = []

    def equal() -> bool:
        try:
            seen[:] = [[agent.used(user) for user in USERS] for agent in cluster.agents.values()]
        except (AgentError, grpc.RpcError):
            return False
        return all(shown == seen[0] for shown in seen)

    wait_until("the same usage everywhere", equal)
    return time.monotonic()


def _judge(run: Run, replies: list[Reply], result: Result) -> None:
    meters = by_meter(replies)
    result.admitted = {meter: most_admitted(of_meter, run.window_s) for meter, of_meter in meters.items()}
    for reply in replies:
        result.verdicts[reply.verdict] = result.verdicts.get(reply.verdict, 0) + 1
    result.refused_wrongly = len(refused_wrongly(replies, run.caps, run.counted_s))
    result.longest_ms = max((reply.answered_s - reply.asked_s) * 1000 for reply in replies)
    for meter, most in result.admitted.items():
        if most > run.caps[meter]:
            result.problems.append(f"{most} of {run.caps[meter]} admitted on {'/'.join(meter)}")
    if run.fault == "none":
        result.problems += _unused(run, replies)


def _unused(run: Run, replies: list[Reply]) -> Iterator[str]:
    """What was asked for in the first window, and not admitted, though `max` allowed it."""
    end_s = min(reply.asked_s for reply in replies) + run.window_s
    asked, admitted = Counter[Meter](), Counter[Meter]()
    for reply in replies:
        if reply.answered_s <= end_s:
            asked.update(dict.fromkeys(reply.meters, reply.amount))
            admitted.update(dict.fromkeys(reply.meters, reply.amount * (reply.verdict == "admitted")))
    allowed = {meter: min(asked[meter], run.max) for meter in asked if meter[0] == "per-user"}
    for domain in ("one.test", "two.test"):
        of_users = sum(amount for (_, user), amount in allowed.items() if user.endswith(domain))
        least = min(of_users, run.domain_max)
        if admitted["per-domain", domain] != least:
            yield f"{admitted['per-domain', domain]} of {least} in the first window on {domain}"


def _dead(cluster: Cluster) -> Iterable[tuple[str, str]]:
    for name, agent in cluster.agents.items():
        if agent.has_ended:
            yield name, agent.log()[-2000:]
        elif "by a bug" in agent.log() + agent.earlier_log:
            yield name, "see its log"


def table(results: Iterable[Result]) -> str:
    """As Markdown, one row for each kind of run."""
    kinds: dict[tuple[str, int, int, int], list[Result]] = {}
    for result in results:
        run = result.run
        kinds.setdefault((run.fault, run.nodes, run.max, run.window_s), []).append(result)
    rows = [
        "| fault | nodes | max | window | runs | most in a window | refused wrongly | same usage | usable |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (fault, nodes, most, window_s), of_kind in kinds.items():
        wrong = f"{_wrong_percent(of_kind):.1f} %" if fault == "none" else ""
        equal = _seconds([result.equal_s for result in of_kind])
        usable = _seconds([result.usable_s for result in of_kind])
        percent = max(result.most_percent for result in of_kind)
        facts = [fault, nodes, most, f"{window_s} s", len(of_kind), f"{percent:.0f} %", wrong, equal, usable]
        rows.append(f"| {' | '.join(map(str, facts))} |")
    return "\n".join(rows)


def _wrong_percent(results: Sequence[Result]) -> float:
    """Of all requests."""
    asked = sum(sum(result.verdicts.values()) for result in results)
    return 100 * sum(result.refused_wrongly for result in results) / asked if asked else 0.0


def _seconds(found: Sequence[float | None]) -> str:
    """The longest, and how many were not seen at all, if any was."""
    known = [each for each in found if each is not None]
    unseen = f" ({len(found) - len(known)} not)" if len(known) < len(found) else ""
    return f"{max(known):.1f} s{unseen}" if known else ""
