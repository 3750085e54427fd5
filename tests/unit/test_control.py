"""The admin socket: what it shows and does, who may connect to it, and what health it tells."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from postmeter import control
from postmeter.control import Control, ControlServer
from postmeter.core.meters import OVERFLOW_KEY, OVERFLOW_ROW
from postmeter.defaults import CONTROL_BYTES_MAX, CONTROL_CALLS_MAX, DRAIN_S_MAX, SCAN_ROWS_MAX, TOP_KEYS_MAX
from postmeter.errors import ConfigError, StorageError
from postmeter.node import Node
from postmeter.settings import Listener
from postmeter.v1 import control_pb2 as pb
from postmeter.v1 import control_pb2_grpc
from tests.unit.nodes import RunningNode, running_node
from tests.unit.support import HOUR_MS, message

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

ALICE = "alice@example.com"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[RunningNode]:
    with running_node(tmp_path) as running:
        yield running


@pytest.fixture
def channel(node: RunningNode) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{node.socket}") as made:
        yield made


@pytest.fixture
def stub(channel: grpc.Channel) -> control_pb2_grpc.ControlStub:
    return control_pb2_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]


# --- ask --------------------------------------------------------------------------------------------------------------


def test_ask_says_what_postfix_is_told_then(
    node: RunningNode, stub: control_pb2_grpc.ControlStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any sequence of messages, `Ask` says the action that the message gets at the same moment."""
    now_ms = node.node.now_ms()
    monkeypatch.setattr(node.node, "now_ms", lambda: now_ms)
    choice = random.Random(7)
    for _ in range(300):
        given = {
            "sasl_username": choice.choice([ALICE, "bob@example.com", "boss@example.com", "evil@example.com", ""]),
            "recipient_count": choice.choice([1, 2, 5, 21, 200]),
            "client_address": choice.choice(["192.0.2.7", "10.0.0.1", "2001:db8::1"]),
            "size": choice.choice([100, 3_000_000, 30_000_000]),
            "protocol_state": choice.choice(["RCPT", "DATA", "END-OF-MESSAGE", "END-OF-MESSAGE"]),
        }
        asked = stub.Ask(pb.AskRequest(request=message(**given)))
        action = node.charge(**given)
        assert action == asked.action
        assert (action != "DUNNO") == asked.refused


def test_ask_charges_nothing(stub: control_pb2_grpc.ControlStub) -> None:
    """A request may be asked any number of times."""
    answers = {stub.Ask(pb.AskRequest(request=message(recipient_count=15))).action for _ in range(5)}
    assert {"DUNNO"} == answers
    assert [] == list(stub.Show(pb.ShowRequest(key=ALICE.encode())).usages)


def test_ask_explains_every_limit(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """All limits come in the order of the file: with their readings, or with why they do not apply."""
    node.charge(recipient_count=15)
    asked = stub.Ask(pb.AskRequest(request=message(recipient_count=6, client_address="10.0.0.1")))
    assert ["per-user", "per-domain", "per-client", "bytes"] == [limit.limit for limit in asked.limits]
    hour, day = asked.limits[0].readings
    assert (ALICE.encode(), 15, 20, 5, 6) == (
        hour.meter.key, hour.meter.used, hour.meter.max, hour.meter.left, hour.amount,
    )  # fmt: skip
    assert 0 < hour.wait_ms <= HOUR_MS + HOUR_MS // 60
    assert day.wait_ms == 0
    assert asked.limits[2].shadow
    assert "client_address" in asked.limits[3].why_not
    assert not asked.limits[3].readings


def test_ask_says_that_it_never_fits(stub: control_pb2_grpc.ControlStub) -> None:
    """A charge above `max` has no time at which it would be accepted."""
    asked = stub.Ask(pb.AskRequest(request=message(recipient_count=21)))
    assert asked.action.startswith("550 5.7.1 ")
    assert not asked.limits[0].readings[0].HasField("wait_ms")


def test_ask_says_what_keeps_the_agent_from_serving(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """While a part does not serve Postfix may be told something else, and the answer says why."""
    node.set_health("storage", "the disk is full")
    assert ["storage: the disk is full"] == list(stub.Ask(pb.AskRequest(request=message())).troubles)


@pytest.mark.parametrize("request_", [b"", b"\n\n", b"a=b\n\n", b"request=smtpd_access_policy\nx\n\n", b"\xff" * 999])
def test_ask_refuses_what_is_no_request(stub: control_pb2_grpc.ControlStub, request_: bytes) -> None:
    """What no Postfix sends is an invalid argument, with the reason."""
    with pytest.raises(grpc.RpcError) as refused:
        stub.Ask(pb.AskRequest(request=request_))
    assert grpc.StatusCode.INVALID_ARGUMENT == refused.value.code()
    assert refused.value.details()


def test_ask_refuses_a_request_without_an_end(stub: control_pb2_grpc.ControlStub) -> None:
    """The empty line at the end belongs to the request: without it the last attribute would be cut off."""
    with pytest.raises(grpc.RpcError) as refused:
        stub.Ask(pb.AskRequest(request=message().rstrip(b"\n")))
    assert grpc.StatusCode.INVALID_ARGUMENT == refused.value.code()


def test_ask_does_not_teach_the_parser_of_the_policy_port(
    node: RunningNode, stub: control_pb2_grpc.ControlStub
) -> None:
    """Postfix's requests are parsed fast by what was learned from Postfix; an operator's are not learned."""
    for count in range(30):
        stub.Ask(pb.AskRequest(request=message(**{f"x{number}": "" for number in range(count)})))
    assert {} == node.node.parser._learned


# --- show, top, reset, reload -----------------------------------------------------------------------------------------


def test_show_tells_usage_by_slice(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """All windows of every limit that counts the key, with slices that add up to what is used."""
    node.charge(recipient_count=3)
    node.charge(recipient_count=4)
    usages = stub.Show(pb.ShowRequest(key=b"Alice@Example.com")).usages
    assert [("per-user", 7), ("per-user", 7), ("bytes", 2000)] == [
        (usage.meter.limit, usage.meter.used) for usage in usages
    ]
    for usage in usages:
        assert usage.meter.used == sum(usage.slices)
        assert 61 == len(usage.slices)
        assert usage.meter.window_ms == 60 * usage.slice_ms
    assert 0 < sum(usages[0].slices[-2:]), "now is at the end"


def test_show_finds_an_address_in_its_network(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """An address is looked up as it is counted, and so is the network itself."""
    node.charge(client_address="2001:db8::1")
    for written in ("2001:DB8::2", "2001:db8::/64"):
        [usage] = stub.Show(pb.ShowRequest(key=written.encode())).usages
        assert (b"2001:db8::/64", 1) == (usage.meter.key, usage.meter.used)


def test_show_suggests_the_nearest_keys(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """A key that is not counted gets those that contain it, or are nearly the same."""
    for name in (ALICE, "bob@example.com", "carol@example.net"):
        node.charge(sasl_username=name)
    for written in ("alice", "alcie@example.com", "aliceexample.com", "ALICE@example.co"):
        shown = stub.Show(pb.ShowRequest(key=written.encode()))
        assert ([], [ALICE.encode()]) == (list(shown.usages), list(shown.nearest))
    assert [] == list(stub.Show(pb.ShowRequest(key=b"zzz")).nearest)


def test_apart_is_what_a_dumb_twin_says() -> None:
    """Up to the bound it is exact, for any two texts; beyond it is only beyond."""
    choice = random.Random(1)
    for _ in range(20_000):
        wanted, name = ("".join(choice.choices("ab@", k=choice.randint(0, 9))) for _ in range(2))
        start = len(os.path.commonprefix((wanted, name)))  # noqa: RUF071 - characters are what is compared
        end = len(os.path.commonprefix((wanted[start:][::-1], name[start:][::-1])))  # noqa: RUF071 - the same
        apart = 0 if wanted in name else max(len(wanted), len(name)) - start - end
        most = choice.randint(1, 4)
        assert min(apart, most + 1) == min(control._apart(wanted, name, most), most + 1)


def test_show_knows_overrides_without_usage(stub: control_pb2_grpc.ControlStub) -> None:
    """A key with an override is known before it has used anything; unlimited has no max and blocked has max 0."""
    [hour, _] = stub.Show(pb.ShowRequest(key=b"boss@example.com")).usages
    assert (False, False, 0) == (hour.meter.HasField("max"), hour.meter.HasField("left"), hour.meter.assumed)
    [hour, _] = stub.Show(pb.ShowRequest(key=b"evil@example.com")).usages
    assert (True, 0, 0) == (hour.meter.HasField("max"), hour.meter.max, hour.meter.left)


def test_show_tells_what_is_only_assumed(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """After an unclean stop part of `used` is assumed; it is not in the slices, and not left."""

    async def crash(each: Node) -> None:
        for meters in each.ledger.meters.values():
            meters.set_tolls([each.now_ms()])

    node.do(crash)
    node.charge(recipient_count=3)
    day = stub.Show(pb.ShowRequest(key=ALICE.encode())).usages[1]
    assert (8, 5, 100, 92, 3) == (
        day.meter.used, day.meter.assumed, day.meter.max, day.meter.left, sum(day.slices),
    )  # fmt: skip


def test_keys_that_are_not_utf8_survive(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """A key comes back as the bytes that Postfix sent, and is found by them."""
    node.charge(sasl_username="b\udcffb@example.com")
    [first] = stub.Top(pb.TopRequest(limit="bytes", keys=1)).rankings[0].meters
    assert b"b\xffb@example.com" == first.key
    assert 3 == len(stub.Show(pb.ShowRequest(key=first.key)).usages)
    assert 3 == len(stub.Reset(pb.ResetRequest(key=first.key)).forgotten)


def test_top_ranks_by_usage(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """The largest usage comes first, in each window of the limit, as many as asked for."""
    for number in range(1, 6):
        node.charge(sasl_username=f"user{number}@example.net", recipient_count=number)
    rankings = stub.Top(pb.TopRequest(limit="per-user", keys=3)).rankings
    assert [HOUR_MS, 24 * HOUR_MS] == [ranking.window_ms for ranking in rankings]
    for ranking in rankings:
        assert [5, 4, 3] == [meter.used for meter in ranking.meters]


def test_top_of_all_limits_is_bounded(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """Without a limit all are ranked; the keys of one answer are bounded, whatever is asked for."""
    node.charge()
    rankings = stub.Top(pb.TopRequest(keys=2**32 - 1)).rankings
    assert ["per-user", "per-user", "per-domain", "per-client", "bytes"] == [ranking.limit for ranking in rankings]
    load(node, 3 * TOP_KEYS_MAX)
    assert TOP_KEYS_MAX // 2 == len(stub.Top(pb.TopRequest(limit="per-user", keys=2**32 - 1)).rankings[0].meters)


def test_top_shows_the_overflow_meter(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """Keys that found no room are shown together under their common name."""

    async def overflow(each: Node) -> None:
        meters = next(iter(each.ledger.meters.values()))
        meters.keys.rows_max = 0
        each.policy.decide(each.parser.parse(message()), each.now_ms())
        assert meters.used[OVERFLOW_ROW]

    node.do(overflow)
    [first] = stub.Top(pb.TopRequest(limit="per-user", keys=3)).rankings[0].meters
    assert OVERFLOW_KEY.encode() == first.key
    assert 1 == stub.Show(pb.ShowRequest(key=first.key)).usages[0].meter.used


def load(node: RunningNode, keys: int) -> None:
    """Give so many users a usage of 1 each on all windows of `per-user`."""

    async def fill(each: Node) -> None:
        now_ms = each.now_ms()
        for id, meters in each.ledger.meters.items():
            if id.limit == "per-user":
                meters.advance(now_ms)
                for number in range(keys):
                    meters.load(now_ms // meters.slice_ms, meters.keys.open(f"user{number}@example.org"), 1)

    node.do(fill)


@pytest.mark.parametrize("call", ["_ranking", "_nearest"])
def test_long_scans_let_others_go_on(node: RunningNode, call: str) -> None:
    """Between two portions of keys everything else in the event loop gets its turn."""
    load(node, 40 * SCAN_ROWS_MAX)

    async def scan(each: Node) -> int:
        turns = 0
        meters = next(iter(each.ledger.meters.values()))
        asked = {"_ranking": (meters, 10), "_nearest": ("user1@example.com",)}[call]
        scanning = asyncio.ensure_future(getattr(Control(each), call)(*asked))
        while not scanning.done():
            await asyncio.sleep(0)
            turns += 1
        await scanning
        return turns

    assert node.do(scan) >= 40


def test_a_scan_bears_keys_that_come_and_go(node: RunningNode) -> None:
    """Keys that are forgotten while `top` looks at others are left out, and new ones do no harm."""
    load(node, 10 * SCAN_ROWS_MAX)

    async def scan(each: Node) -> pb.Ranking:
        meters = next(iter(each.ledger.meters.values()))
        scanning = asyncio.ensure_future(Control(each)._ranking(meters, 1000))
        for number in range(1000):
            for several in meters.keys.meters:
                row = meters.keys.rows.get(f"user{number}@example.org")
                if row is not None:
                    several.reset(row)
            each.policy.decide(each.parser.parse(message(sasl_username=f"new{number}@example.net")), each.now_ms())
            if not scanning.done():
                await asyncio.sleep(0)
        return await scanning

    ranking = node.do(scan)
    assert all(meter.used == 1 for meter in ranking.meters)


def test_reset_forgets(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """What was used is forgotten and told: on one limit, then on all others; then there is nothing more."""
    node.charge(recipient_count=20)
    assert node.charge(recipient_count=1).startswith("450 ")
    forgotten = stub.Reset(pb.ResetRequest(key=b"Alice@example.com", limit="per-user")).forgotten
    assert [("per-user", ALICE.encode(), 20)] * 2 == [(each.limit, each.key, each.used) for each in forgotten]
    assert "DUNNO" == node.charge(recipient_count=1)
    assert ["per-user", "per-user", "bytes"] == [
        each.limit for each in stub.Reset(pb.ResetRequest(key=ALICE.encode())).forgotten
    ]
    assert [] == list(stub.Reset(pb.ResetRequest(key=ALICE.encode())).forgotten)


def test_reset_suggests_the_nearest_keys(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """A key that is not counted is not taken for another one."""
    node.charge()
    reset = stub.Reset(pb.ResetRequest(key=b"alice"))
    assert ([], [ALICE.encode()]) == (list(reset.forgotten), list(reset.nearest))


def test_reset_that_is_not_on_the_disk_is_no_success(
    node: RunningNode, stub: control_pb2_grpc.ControlStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it cannot be stored the call fails and says so."""

    async def reset(key: str, limit: str | None) -> None:
        raise StorageError("not on the disk yet")

    monkeypatch.setattr(node.node, "reset", reset)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Reset(pb.ResetRequest(key=ALICE.encode()))
    assert (grpc.StatusCode.FAILED_PRECONDITION, "not on the disk yet") == (
        refused.value.code(),
        refused.value.details(),
    )


@pytest.mark.parametrize(("call", "asked"), [("Top", pb.TopRequest), ("Reset", pb.ResetRequest)])
def test_unknown_limits_are_refused(stub: control_pb2_grpc.ControlStub, call: str, asked: type) -> None:
    """A limit that does not exist is an invalid argument, and the answer names those that do."""
    with pytest.raises(grpc.RpcError) as refused:
        getattr(stub, call)(asked(limit="per-usr"))
    assert grpc.StatusCode.INVALID_ARGUMENT == refused.value.code()
    assert "no limit is called per-usr; there are per-user, per-domain, per-client, bytes" == refused.value.details()


def test_reload_puts_limits_into_force(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """New limits decide from then on."""
    node.limits_file.write_text("limits: {tiny: {key: sasl_username, count: recipients, max: 1, per: 1h}}")
    reloaded = stub.Reload(pb.ReloadRequest())
    assert ([], 1) == (list(reloaded.problems), reloaded.limits)
    assert ["DUNNO", "450"] == [node.charge().split()[0] for _ in range(2)]


def test_reload_refuses_wrong_limits_as_a_whole(node: RunningNode, stub: control_pb2_grpc.ControlStub) -> None:
    """All problems are told, with the file and their lines, and the last good limits stay in force."""
    node.limits_file.write_text("limits:\n  a: {key: sasl_usrname, max: 1, per: 1h}\n  b: {max: many}\n")
    reloaded = stub.Reload(pb.ReloadRequest())
    assert 4 == reloaded.limits
    assert any(f"{node.limits_file}:2: " in problem for problem in reloaded.problems)
    assert any(f"{node.limits_file}:3: " in problem for problem in reloaded.problems)
    assert "DUNNO" == node.charge(recipient_count=20)


# --- health -----------------------------------------------------------------------------------------------------------


def healths(channel: grpc.Channel) -> dict[str, int]:
    """The status of all services that exist."""
    stub = health_pb2_grpc.HealthStub(channel)
    services = ("", "postmeter.policy", "postmeter.storage")
    return {service: stub.Check(health_pb2.HealthCheckRequest(service=service)).status for service in services}


def test_health_follows_the_parts(node: RunningNode, channel: grpc.Channel) -> None:
    """A part that does not serve keeps the whole from serving, and no other part."""
    assert {"": SERVING, "postmeter.policy": SERVING, "postmeter.storage": SERVING} == healths(channel)
    node.set_health("storage", "disk full")
    assert {"": NOT_SERVING, "postmeter.policy": SERVING, "postmeter.storage": NOT_SERVING} == healths(channel)
    node.set_health("storage", "")
    node.set_health("policy", "draining")
    assert {"": NOT_SERVING, "postmeter.policy": NOT_SERVING, "postmeter.storage": SERVING} == healths(channel)


def test_health_is_not_serving_before_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment the socket answers until the policy port does, the agent is not ready."""
    monkeypatch.setattr(Node, "set_health", lambda node, part, reason: None)
    with running_node(tmp_path) as node, grpc.insecure_channel(f"unix:{node.socket}") as channel:
        assert {"": NOT_SERVING, "postmeter.policy": NOT_SERVING, "postmeter.storage": SERVING} == healths(channel)


def test_health_can_be_watched(node: RunningNode, channel: grpc.Channel) -> None:
    """Who watches is told every change."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
    assert SERVING == next(watch).status
    node.set_health("storage", "disk full")
    assert NOT_SERVING == next(watch).status
    node.set_health("storage", "")
    assert SERVING == next(watch).status


def test_stopping_does_not_wait_for_those_who_watch(tmp_path: Path) -> None:
    """A watch never ends by itself; the agent ends it."""
    with running_node(tmp_path) as node, grpc.insecure_channel(f"unix:{node.socket}") as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        next(watch)
        stopping_s = time.monotonic()
        node.stop()
        with pytest.raises(grpc.RpcError):
            next(watch)
        assert time.monotonic() - stopping_s < DRAIN_S_MAX


def test_health_of_an_unknown_part(channel: grpc.Channel) -> None:
    """It is not found."""
    with pytest.raises(grpc.RpcError) as refused:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="postmeter.nothing"))
    assert grpc.StatusCode.NOT_FOUND == refused.value.code()


# --- the socket -------------------------------------------------------------------------------------------------------


def start(node: RunningNode, listener: Listener) -> None:
    """Start and stop a second admin socket of the same node."""

    async def serve(each: Node) -> None:
        each.settings = replace(each.settings, admin_socket=listener)
        server = ControlServer(each)
        try:
            await server.start()
        finally:
            await server.stop()

    node.do(serve)


def test_socket_has_its_mode(node: RunningNode) -> None:
    """Owner and group by default, and whatever the listener says."""
    assert 0o660 == stat.S_IMODE(node.socket.stat().st_mode)
    other = node.socket.with_name("other.sock")
    start(node, Listener(path=other, mode=0o600))
    assert 0o600 == stat.S_IMODE(other.stat().st_mode)


def test_nobody_else_can_connect_before_it_has_its_mode(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The socket is made for the agent's user alone, under another name, whatever the umask."""
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(control, "give_away", lambda path, _: seen.append((path.name, path.stat().st_mode & 0o777)))
    umask = os.umask(0)
    try:
        start(node, Listener(path=node.socket.with_name("other.sock")))
        assert 0 == os.umask(0)
    finally:
        os.umask(umask)
    assert [(f".other.sock.{os.getpid()}", 0o600)] == seen


def test_stale_socket_is_replaced(node: RunningNode) -> None:
    """What a killed agent left does not stop the next one."""
    path = node.socket.with_name("other.sock")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    start(node, Listener(path=path))


def test_live_socket_is_refused(node: RunningNode) -> None:
    """The socket of another agent is left alone."""
    with pytest.raises(ConfigError, match="another agent answers there"):
        start(node, Listener(path=node.socket))
    assert "DUNNO" == node.charge()


def test_missing_directory_is_explained(node: RunningNode, tmp_path: Path) -> None:
    """The error says where it must be, and leaves nothing behind."""
    with pytest.raises(ConfigError, match=f"{tmp_path}/none must exist"):
        start(node, Listener(path=tmp_path / "none/admin.sock"))


def test_paths_may_hold_any_character(node: RunningNode, tmp_path: Path) -> None:
    """A path is not a URL."""
    path = tmp_path / "a b%41?#é.sock"
    start(node, Listener(path=path))
    assert path.exists()


def test_large_messages_are_refused(stub: control_pb2_grpc.ControlStub) -> None:
    """What is larger than any policy request is not even read."""
    with pytest.raises(grpc.RpcError) as refused:
        stub.Show(pb.ShowRequest(key=b"x" * (CONTROL_BYTES_MAX + 1)))
    assert grpc.StatusCode.RESOURCE_EXHAUSTED == refused.value.code()


def test_calls_at_a_time_are_bounded(channel: grpc.Channel, stub: control_pb2_grpc.ControlStub) -> None:
    """Beyond the maximum a call is refused at once; when others end it is served again."""
    health = health_pb2_grpc.HealthStub(channel)
    watches = [health.Watch(health_pb2.HealthCheckRequest(service="")) for _ in range(CONTROL_CALLS_MAX)]
    for watch in watches:
        next(watch)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Top(pb.TopRequest(keys=1))
    assert grpc.StatusCode.RESOURCE_EXHAUSTED == refused.value.code()
    for watch in watches:
        watch.cancel()
    until = threading.Event()
    for _ in range(100):
        try:
            stub.Top(pb.TopRequest(keys=1))
            break
        except grpc.RpcError:
            until.wait(0.05)
    else:
        pytest.fail("ended calls still count")
