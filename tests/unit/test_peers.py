"""Nodes that speak to each other over real gRPC: what arrives, what is refused, and what happens when one is away."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
import uvloop

from postmeter.certificates import make_authority, make_certificate
from postmeter.core.effects import (
    Accepted,
    Answer,
    Ask,
    Excess,
    Handover,
    LoanId,
    Message,
    Return,
    Returned,
)
from postmeter.core.meters import MetersId
from postmeter.core.view import Changes, Known, Portion
from postmeter.defaults import PEER_ANSWERS_MAX, PEER_CALLS_MAX, PEER_QUEUE_MAX
from postmeter.errors import ConfigError, PeerError
from postmeter.link import Packet
from postmeter.packet import Contents, Draft, Head, parse, read_head
from postmeter.v1 import peers_pb2 as pb
from tests.unit.clusters import WAIT_S_MAX, Log, Nodes, call
from tests.unit.test_rights import METER, NOW_MS
from tests.unit.test_rights import node as rights_node

T = TypeVar("T")

USER_HOUR = MetersId("per-user", "sasl_username", "recipients", 3_600_000)
NINE = "mx2 (Postmeter 9.9.9)"
ALICE = (USER_HOUR, "alice@example.com")


def run(story: Coroutine[Any, Any, T]) -> T:
    """A story in an event loop as the agent has it."""
    return uvloop.run(story)


def ask(number: int, borrower: str = "mx1") -> Ask:
    """A question."""
    return Ask(LoanId(borrower, 7, number), ALICE, 5, True, 1000, 60_000)


def packet(head: Head, *messages: Message) -> bytes:
    """What anybody may send."""
    draft = Draft(head)
    for message in messages:
        draft.add_message(message)
    return draft.finish()


def head(sender: str = "mx2", receiver: str = "mx1", **given: Any) -> Head:
    return Head(sender, receiver, 7, "9.9.9", 0, **given)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA with certificates for mx1 to mx3, and one for mx4 that has expired."""
    directory = tmp_path_factory.mktemp("ca")
    make_authority(directory, 100)
    for node in ("mx1", "mx2", "mx3"):
        make_certificate(node, directory, [], 100)
    make_certificate("mx4", directory, [], 0)
    return directory


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another CA, with certificates for nodes of the same names."""
    directory = tmp_path_factory.mktemp("foreign")
    make_authority(directory, 100)
    for node in ("mx1", "mx2"):
        make_certificate(node, directory, [], 100)
    return directory


def credentials(node: str, directory: Path, trusted: Path | None = None) -> grpc.ChannelCredentials:
    """Who has the certificate of a node, and believes in a CA."""
    ca = (trusted or directory) / "ca.pem"
    paths = (ca, directory / f"{node}.key", directory / f"{node}.pem")
    return grpc.ssl_channel_credentials(*(path.read_bytes() for path in paths))


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
def test_what_is_said_arrives_and_is_answered(authority: Path, secure: bool) -> None:
    """Each node knows from whom, and how the other one is."""

    async def story() -> None:
        async with Nodes(authority if secure else None) as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()

            async def answer(packet: Packet) -> Contents:
                return Contents([Accepted(3)])

            mx2.handler.answer = answer
            mx1.peers.send("mx2", [ask(1), ask(2)])
            await mx1.handler.until(lambda: mx1.handler.packets)
            assert [ask(1), ask(2)] == mx2.handler.messages()
            assert [Accepted(3)] == mx1.handler.messages()
            [asked], [answered] = mx2.handler.packets, mx1.handler.packets
            assert ("mx1", "mx2", 7, False) == (
                asked.head.sender,
                asked.head.receiver,
                asked.head.incarnation,
                asked.is_reply,
            )
            assert ("mx2", "mx1", True) == (answered.head.sender, answered.head.receiver, answered.is_reply)
            state = mx1.state("mx2")
            assert (True, "", 7, 0) == (state.reachable, state.trouble, state.incarnation, state.dropped)
            assert state.clock_offset_ms is not None
            assert abs(state.clock_offset_ms) < WAIT_S_MAX * 1000
            assert mx2.state("mx1").heard_ms is not None

    run(story())


def test_what_a_reply_leads_to_is_said_in_turn() -> None:
    """The answer to an answer is the next message."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()

            async def answer(packet: Packet) -> Contents:
                numbers = [message.generation for message in packet.contents.messages if isinstance(message, Accepted)]
                return Contents([Accepted(number + 1) for number in numbers if number < 6])

            mx1.handler.answer = mx2.handler.answer = answer
            mx1.peers.send("mx2", [Accepted(0)])
            await mx2.handler.until(lambda: Accepted(6) in mx2.handler.messages() + mx1.handler.messages())
            assert [Accepted(number) for number in (0, 2, 4, 6)] == mx2.handler.messages()
            assert [Accepted(number) for number in (1, 3, 5)] == mx1.handler.messages()

    run(story())


def test_usage_is_exchanged_in_both_directions_until_neither_has_more() -> None:
    """One call after the other, each as large as a packet may be."""
    keys = [f"{number:0500}" for number in range(200)]
    portion = Portion("mx1", 7, 0, 1, 0, Changes([USER_HOUR], keys, [(1, 0, 0, at, 1) for at in range(200)]))

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            turns = [[], [], [portion], [portion] * 3]
            mx1.handler.tell = lambda node: Contents(digest={"mx1": Known(7, 1, 0)}, portions=turns.pop())

            async def answer(packet: Packet) -> Contents:
                assert {"mx1": Known(7, 1, 0)} == packet.contents.digest
                return Contents(portions=[portion] * (2 if len(mx2.handler.packets) < 3 else 1))

            mx2.handler.answer = answer
            await mx1.peers.exchange("mx2")
            said = [(len(list(packet.contents.portions)), packet.contents.more) for packet in mx2.handler.packets]
            assert [(1, True), (1, False), (0, False)] == said
            heard = [(len(list(packet.contents.portions)), packet.contents.more) for packet in mx1.handler.packets]
            assert [(1, True), (1, True), (1, False)] == heard
            assert [portion] == mx1.handler.packets[0].contents.portions

    run(story())


def test_usage_is_exchanged_regularly_with_some() -> None:
    """With as many peers as the settings say, and with all of them in time."""

    async def story() -> None:
        async with Nodes(exchange_interval_ms=100) as nodes:
            members = [await nodes.add(f"mx{number}") for number in range(1, 5)]
            for member in members:
                member.handler.tell = lambda node: Contents(digest={"mx1": Known(1, 1, 0)})
            nodes.introduce()
            for member in members:
                others = {other.name for other in members} - {member.name}
                heard = member.handler
                await heard.until(lambda heard=heard, others=others: others == heard.senders())  # type: ignore[misc]

    run(story())


def test_a_long_handover_arrives_as_one() -> None:
    """Behind what is said at the same time, and not twice because it was repeated meanwhile."""
    loans = tuple(Excess(LoanId("mx1", 7, number), ALICE, number) for number in range(2_000))
    handover = Handover(3, loans, 60)

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            mx1.peers.send("mx2", [handover, handover, ask(1), handover])
            await mx2.handler.until(lambda: handover in mx2.handler.messages())
            mx1.peers.send("mx2", [Handover(4, ())])
            await mx2.handler.until(lambda: Handover(4, ()) in mx2.handler.messages())
            assert [ask(1), handover, Handover(4, ())] == mx2.handler.messages()

    run(story())


def test_what_does_not_fit_into_an_answer_is_said_afterwards() -> None:
    """Neither a long handover nor hundreds of messages make a packet too large, whoever says them."""
    loans = tuple(Excess(LoanId("mx2", 7, number), ALICE, number) for number in range(1_000))
    said: list[Message] = [Handover(3, loans), *(ask(number) for number in range(250))]

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()

            async def answer(packet: Packet) -> Contents:
                return Contents() if packet.is_reply or packet.contents.messages else Contents([ask(999), *said])

            mx2.handler.answer = answer
            await mx1.peers.exchange("mx2")
            turns = [Contents(), Contents([ask(998), *said])]
            mx1.handler.tell = lambda node: turns.pop()
            await mx1.peers.exchange("mx2")
            for heard in (mx1.handler, mx2.handler):
                await heard.until(lambda heard=heard: len(set(heard.messages())) == 252)  # type: ignore[misc]
            assert {ask(999), *said} == set(mx1.handler.messages())
            assert {ask(998), *said} == set(mx2.handler.messages())

    run(story())


# --- how much, and in which order -------------------------------------------------------------------------------------


def test_messages_gather_while_calls_are_under_way() -> None:
    """Thousands of them take some tens of calls, and all arrive."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            for number in range(3_000):
                mx1.peers.send("mx2", [ask(number)])
            await mx2.handler.until(lambda: len(mx2.handler.messages()) == 3_000)
            assert {ask(number) for number in range(3_000)} == set(mx2.handler.messages())
            assert 30 <= len(mx2.handler.packets) < 60

    run(story())


def test_a_few_messages_wait_for_others_while_a_call_is_under_way() -> None:
    """So that not each of them takes a call of its own."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            go = asyncio.Event()

            async def answer(packet: Packet) -> Contents:
                await go.wait()
                return Contents()

            mx2.handler.answer = answer
            for number in range(PEER_CALLS_MAX):
                mx1.peers.send("mx2", [ask(number)])
                # The first goes at once, the others in turns of the loop that take less than they wait.
                await asyncio.sleep(0)
            await mx2.handler.until(lambda: len(mx2.handler.messages()) == PEER_CALLS_MAX)
            assert len(mx2.handler.packets) < PEER_CALLS_MAX
            go.set()

    run(story())


def test_a_question_is_not_behind_a_slow_exchange() -> None:
    """Nor behind slow answers to other questions, as long as there are not too many."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            go = asyncio.Event()

            async def answer(packet: Packet) -> Contents:
                if packet.contents.digest or ask(1) in packet.contents.messages:
                    await go.wait()
                return Contents()

            mx2.handler.answer = answer
            mx1.handler.tell = lambda node: Contents(digest={"mx1": Known(7, 1, 0)})
            exchange = asyncio.create_task(mx1.peers.exchange("mx2"))
            mx1.peers.send("mx2", [ask(1)])
            await mx2.handler.until(lambda: len(mx2.handler.packets) == 2)
            mx1.peers.send("mx2", [ask(2)])
            await mx2.handler.until(lambda: ask(2) in mx2.handler.messages())
            assert not exchange.done()
            go.set()
            await exchange

    run(story())


def test_too_many_messages_are_dropped_and_the_newest_arrive() -> None:
    """It is logged once, and counted."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            go = asyncio.Event()

            async def answer(packet: Packet) -> Contents:
                await go.wait()
                return Contents()

            mx2.handler.answer = answer
            for number in range(PEER_CALLS_MAX):
                mx1.peers.send("mx2", [ask(number)])
                await mx2.handler.until(lambda count=number + 1: count == len(mx2.handler.packets))  # type: ignore[misc]
            with Log() as log:
                mx1.peers.send("mx2", [ask(number) for number in range(100, 100 + 3 * PEER_QUEUE_MAX)])
                mx1.peers.send("mx2", [ask(99)])
            assert ["messages to a peer dropped: "] == log.lines
            assert 2 * PEER_QUEUE_MAX + 1 == mx1.state("mx2").dropped
            go.set()
            await mx2.handler.until(lambda: ask(99) in mx2.handler.messages())
            assert ask(100) not in mx2.handler.messages()

    run(story())


def test_one_peer_cannot_take_all_calls(caplog: pytest.LogCaptureFixture) -> None:
    """Beyond its number it is refused, and others are answered."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1 = await nodes.add("mx1")
            go = asyncio.Event()

            async def answer(packet: Packet) -> Contents:
                if packet.head.sender == "mx2":
                    await go.wait()
                return Contents()

            mx1.handler.answer = answer
            calls = [asyncio.create_task(call(mx1.address, packet(head()))) for _ in range(PEER_ANSWERS_MAX)]
            await mx1.handler.until(lambda: len(mx1.handler.packets) == PEER_ANSWERS_MAX)
            refused = await call(mx1.address, packet(head()))
            assert isinstance(refused, grpc.aio.AioRpcError)
            assert f"mx2 makes more than {PEER_ANSWERS_MAX} calls" == refused.details()
            assert "answering a peer failed" not in caplog.text
            assert isinstance(await call(mx1.address, packet(head("mx3"))), bytes)
            go.set()
            assert all(isinstance(answer, bytes) for answer in await asyncio.gather(*calls))
            assert isinstance(await call(mx1.address, packet(head())), bytes)

    run(story())


def test_what_was_said_is_taken_in_although_the_caller_has_gone() -> None:
    """As a whole: the core never stops in the middle of a step."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1 = await nodes.add("mx1")
            go, done = asyncio.Event(), asyncio.Event()

            async def answer(packet: Packet) -> Contents:
                await go.wait()
                done.set()
                return Contents()

            mx1.handler.answer = answer
            caller = asyncio.create_task(call(mx1.address, packet(head())))
            await mx1.handler.until(lambda: mx1.handler.packets)
            caller.cancel()
            with suppress(asyncio.CancelledError):
                await caller
            assert isinstance(await call(mx1.address, packet(head(receiver="mx9"))), grpc.aio.AioRpcError)
            go.set()
            await asyncio.wait_for(done.wait(), WAIT_S_MAX)

    run(story())


# --- who is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["nobody", "foreign", "expired", "plain"])
def test_who_has_no_good_certificate_is_not_heard(authority: Path, foreign: Path, who: str) -> None:
    """Whatever it says; and who has one is."""

    async def story() -> None:
        async with Nodes(authority) as nodes:
            mx1 = await nodes.add("mx1")
            used = {
                "nobody": grpc.ssl_channel_credentials((authority / "ca.pem").read_bytes()),
                "foreign": credentials("mx2", foreign, trusted=authority),
                "expired": credentials("mx4", authority),
                "plain": None,
            }[who]
            refused = await call(mx1.address, packet(head()), used)
            assert isinstance(refused, grpc.aio.AioRpcError)
            assert grpc.StatusCode.UNAVAILABLE == refused.code()
            assert [] == mx1.handler.packets
            assert isinstance(await call(mx1.address, packet(head()), credentials("mx2", authority)), bytes)

    run(story())


def test_a_node_speaks_for_nobody_but_itself(authority: Path) -> None:
    """Its certificate must name it; that is logged once, and again after it was right."""

    async def story() -> None:
        async with Nodes(authority) as nodes:
            mx1 = await nodes.add("mx1")
            mx3 = credentials("mx3", authority)
            with Log() as log:
                for _ in range(3):
                    refused = await call(mx1.address, packet(head("mx2")), mx3)
                    assert isinstance(refused, grpc.aio.AioRpcError)
                    assert "the certificate names mx3, not mx2" == refused.details()
                expected = ["peer refused: the certificate names mx3, not mx2"]
                assert expected == log.lines
                assert [] == mx1.handler.packets
                await call(mx1.address, packet(head("mx3")), mx3)
                await call(mx1.address, packet(head("mx2")), mx3)
                assert 2 * expected == log.lines

    run(story())


def test_a_node_speaks_to_nobody_but_whom_it_means(authority: Path, foreign: Path) -> None:
    """Not to another node at that address, and not to one of another CA."""

    async def story() -> None:
        async with Nodes(authority) as nodes:
            mx1, mx3 = await nodes.add("mx1"), await nodes.add("mx3")
            stranger = await nodes.add("mx2", directory=foreign)
            for address in (mx3.address, stranger.address):
                mx1.peers.set_peers({"mx2": address})
                with pytest.raises(PeerError, match="mx2 cannot be reached"):
                    await mx1.peers.exchange("mx2")
            assert [] == mx3.handler.packets == stranger.handler.packets

    run(story())


def test_without_certificates_a_wrong_address_is_noticed_too() -> None:
    """By both."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx3 = await nodes.add("mx1"), await nodes.add("mx3")
            mx1.peers.set_peers({"mx2": mx3.address})
            with Log() as log, pytest.raises(PeerError) as caught:
                await mx1.peers.exchange("mx2")
            reason = "this is mx3, not mx2: correct the address of mx2"
            assert f"mx2 refuses: {reason}" == str(caught.value)
            assert [f"peer refused: {reason}", f"peer unreachable: refuses: {reason}"] == log.lines

    run(story())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (packet(head("mx3")), "mx3 answers at {address}: correct the address of mx2"),
        (packet(head("mx2", "mx3")), "this is mx1, not mx3: correct the address of mx3"),
        (packet(head(protocol_oldest=2, protocol_newest=3)), f"{NINE} speaks protocol 2, mx1 up to 1: upgrade mx1"),
        (b"\xff", "this is not protobuf"),
    ],
)
def test_answers_are_checked_like_questions(answer: bytes, expected: str) -> None:
    """Nothing of a wrong one is heard, and the peer counts as unreachable."""

    async def story() -> None:
        async def respond(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return answer

        server = grpc.aio.server()
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(respond)
        service = grpc.method_handlers_generic_handler("postmeter.v1.Peers", {"Exchange": method})
        server.add_generic_rpc_handlers((service,))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with Nodes() as nodes:
            mx1 = await nodes.add("mx1")
            mx1.peers.set_peers({"mx2": address})
            with pytest.raises(PeerError) as caught:
                await mx1.peers.exchange("mx2")
            assert f"mx2 answers what cannot be: {expected.format(address=address)}" == str(caught.value)
            assert not mx1.state("mx2").reachable
            assert [] == mx1.handler.packets
        await server.stop(None)

    run(story())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            head(protocol_oldest=2, protocol_newest=3),
            "mx2 (Postmeter 9.9.9) speaks protocol 2, mx1 up to 1: upgrade mx1",
        ),
        (
            head(protocol_oldest=0, protocol_newest=0),
            "mx2 (Postmeter 9.9.9) speaks protocol 0, mx1 from 1 on: upgrade mx2",
        ),
        (head(protocol_oldest=1, protocol_newest=9), ""),
        (head(sender="mx1"), "two nodes are called mx1: give one of them another name"),
        (head(sender="mx9"), "mx9 is not in the roster"),
    ],
)
def test_what_cannot_work_is_refused_in_words(given: Head, expected: str) -> None:
    """Versions and names; what can work is answered."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1 = await nodes.add("mx1")
            mx1.handler.refusals = {"mx9": "mx9 is not in the roster"}
            answer = await call(mx1.address, packet(given, ask(1)))
            if expected:
                assert isinstance(answer, grpc.aio.AioRpcError)
                assert expected == answer.details()
                assert [] == mx1.handler.packets
            else:
                assert isinstance(answer, bytes)
                assert [ask(1)] == mx1.handler.messages()

    run(story())


def test_what_is_new_in_later_versions_is_ignored() -> None:
    """A message of an unknown kind and an unknown field; the rest is heard."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1 = await nodes.add("mx1")
            later = parse(packet(head(), ask(1)))
            later.messages.append(pb.RightsMessage.FromString(b"\xa2\x06\x03new"))
            answer = await call(mx1.address, later.SerializeToString() + b"\xa2\x06\x03new")
            assert isinstance(answer, bytes)
            assert "mx1" == read_head(parse(answer)).sender
            assert [ask(1)] == mx1.handler.messages()

    run(story())


def test_a_message_of_100_mb_is_refused() -> None:
    """Without being held; and so is what cannot be understood. Others are heard."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1 = await nodes.add("mx1")
            large = await call(mx1.address, bytes(100 * 1024 * 1024))
            assert isinstance(large, grpc.aio.AioRpcError)
            assert grpc.StatusCode.RESOURCE_EXHAUSTED == large.code()
            wrong = await call(mx1.address, os.urandom(1000))
            assert isinstance(wrong, grpc.aio.AioRpcError)
            assert "this is not protobuf" == wrong.details()
            assert [] == mx1.handler.packets
            assert isinstance(await call(mx1.address, packet(head())), bytes)

    run(story())


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        os.urandom(100_000),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 10_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600),
        b"",
    ],
    ids=["random", "http/1.1", "http/2", "tls", "silence"],
)
def test_garbage_at_the_port_disturbs_nobody(authority: Path, data: bytes, secure: bool) -> None:
    """The connection is closed, and the others are answered."""

    async def story() -> None:
        async with Nodes(authority if secure else None) as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            reader, writer = await asyncio.open_connection("127.0.0.1", mx1.peers.port)
            writer.write(data)
            with suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), WAIT_S_MAX)
            writer.close()
            await mx2.peers.exchange("mx1")
            assert 1 == len(mx1.handler.packets)

    run(story())


def test_who_speaks_of_loans_of_others_changes_nothing() -> None:
    """Whoever it is: the core looks at who says it."""
    rights, _ = rights_node("a")
    loan = LoanId("b", 1, 1)
    rights.receive("b", Ask(loan, METER, 3, True, NOW_MS, 60_000), NOW_MS)
    (asked,) = rights.seek(METER, 6, NOW_MS).send
    assert isinstance(asked.message, Ask)
    before, spare = repr(rights.books), rights.spare(METER, NOW_MS)
    said: list[Message] = [
        Return(loan, 3),
        Ask(LoanId("b", 1, 2), METER, 1, True, NOW_MS, 60_000),
        Answer(asked.message.loan, 5, NOW_MS),
        Answer(loan, 5, NOW_MS),
        Returned(asked.message.loan, 5),
    ]

    async def story() -> None:
        async with Nodes() as nodes:
            a = await nodes.add("a")

            async def answer(packet: Packet) -> Contents:
                for message in packet.contents.messages:
                    rights.receive(packet.head.sender, message, NOW_MS)
                return Contents()

            a.handler.answer = answer
            assert isinstance(await call(a.address, packet(head("c", "a"), *said)), bytes)
            assert said == a.handler.messages()

    run(story())
    assert (before, spare) == (repr(rights.books), rights.spare(METER, NOW_MS))


def test_a_bug_in_the_node_is_logged_and_the_port_goes_on() -> None:
    """The caller is told that it failed."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()

            async def answer(packet: Packet) -> Contents:
                raise ZeroDivisionError

            mx1.handler.answer = answer
            with Log() as log, pytest.raises(PeerError, match="mx1 UNKNOWN"):
                await mx2.peers.exchange("mx1")
            assert "answering a peer failed: " in log.lines
            mx1.handler.answer = None
            await mx2.peers.exchange("mx1")

    run(story())


# --- who is away ------------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_there_is_shown_as_unreachable() -> None:
    """With its reason, logged once; messages to it are lost."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1 = await nodes.add("mx1")
            with socket.socket() as taken:
                taken.bind(("127.0.0.1", 0))
                mx1.peers.set_peers({"mx2": f"127.0.0.1:{taken.getsockname()[1]}"})
                with Log() as log:
                    for number in range(3):
                        mx1.peers.send("mx2", [ask(number)])
                        with pytest.raises(PeerError, match="mx2 cannot be reached: "):
                            await mx1.peers.exchange("mx2")
            assert 1 == len(log.lines)
            assert log.lines[0].startswith("peer unreachable: cannot be reached: ")
            state = mx1.state("mx2")
            assert (False, None, None, "") == (state.reachable, state.heard_ms, state.round_trip_ms, state.version)
            assert state.trouble.startswith("cannot be reached: ")

    run(story())


def test_a_peer_that_never_answers_keeps_nobody_waiting() -> None:
    """Every call has an end, also where the connection stands."""

    async def story() -> None:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        silent = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with Nodes() as nodes:
            mx1, mx3 = await nodes.add("mx1"), await nodes.add("mx3")
            mx1.peers.set_peers({"mx2": f"127.0.0.1:{silent.sockets[0].getsockname()[1]}", "mx3": mx3.address})
            mx1.peers.send("mx2", [ask(1)])
            mx1.peers.send("mx3", [ask(2)])
            await mx3.handler.until(lambda: mx3.handler.messages())
            with pytest.raises(PeerError, match=r"mx2 (does not answer within 2 s|cannot be reached)"):
                await mx1.peers.exchange("mx2")
            assert not mx1.state("mx2").reachable
        silent.close()

    run(story())


@pytest.mark.parametrize("secure", [False, True])
def test_a_peer_that_comes_back_is_reached_again(authority: Path, secure: bool) -> None:
    """By itself, from both sides, at the same address."""

    async def story() -> None:
        async with Nodes(authority if secure else None, exchange_interval_ms=200) as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            with Log() as log:
                await log.until(lambda: mx1.state("mx2").reachable)
                await mx2.peers.stop()
                await log.until(lambda: not mx1.state("mx2").reachable)
                again = await nodes.add("mx2", listen=mx2.address)
                nodes.introduce()
                await log.until(lambda: mx1.state("mx2").reachable and again.state("mx1").reachable)

    run(story())


def test_a_peer_that_moves_is_found_at_its_new_address() -> None:
    """And one that is no peer any more is not spoken to; what is no address is logged."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            mx1.peers.set_peers({"mx1": mx1.address, "mx2": "127.0.0.1:1"})
            with pytest.raises(PeerError):
                await mx1.peers.exchange("mx2")
            mx1.peers.set_peers({"mx2": mx2.address})
            await mx1.peers.exchange("mx2")
            with Log() as log:
                mx1.peers.set_peers({"mx2": "nowhere", "mx3": "unix:/x:1"})
            assert 2 == len(log.starting("address of a peer refused: "))
            with pytest.raises(PeerError, match="mx2 is no peer"):
                await mx1.peers.exchange("mx2")
            mx1.peers.send("mx2", [ask(1)])
            assert [] == mx1.peers.states()

    run(story())


# --- certificates -----------------------------------------------------------------------------------------------------


def test_new_certificates_are_used_without_a_restart(tmp_path: Path, authority: Path, foreign: Path) -> None:
    """On both ends, even of another CA; files that do not fit together do not count until they do."""

    def install(directory: Path, *names: str) -> None:
        for name in names:
            (tmp_path / name).write_bytes((directory / name).read_bytes())

    files = ["ca.pem", "mx1.pem", "mx1.key", "mx2.pem", "mx2.key"]

    async def story() -> None:
        install(authority, *files)
        async with Nodes(tmp_path) as nodes:
            mx1, mx2 = await nodes.add("mx1"), await nodes.add("mx2")
            nodes.introduce()
            await mx1.peers.exchange("mx2")
            with Log() as log:
                install(foreign, "mx1.pem")
                await log.until(lambda: any("mx1.key: is not the key of" in line for line in log.lines))
                await mx1.peers.exchange("mx2")
                install(foreign, *files)
                await log.until(lambda: 2 == len(log.starting("new certificates in use")))
            await mx1.peers.exchange("mx2")
            await mx2.peers.exchange("mx1")
            old = await call(mx1.address, packet(head()), credentials("mx2", authority))
            assert isinstance(old, grpc.aio.AioRpcError)
            assert isinstance(await call(mx1.address, packet(head()), credentials("mx2", foreign)), bytes)

    run(story())


def test_an_expired_certificate_is_said_and_does_not_keep_a_node_from_starting(authority: Path) -> None:
    """It answers Postfix, and waits for a new one."""

    async def story() -> None:
        async with Nodes(authority) as nodes:
            with Log() as log:
                mx4 = await nodes.add("mx4")
            assert mx4.peers.trouble.startswith("the certificate has expired on ")
            assert [f"certificate: {mx4.peers.trouble}"] == log.lines
            mx1 = await nodes.add("mx1")
            assert "" == mx1.peers.trouble

    run(story())


# --- starting ---------------------------------------------------------------------------------------------------------


def test_an_address_in_use_is_refused() -> None:
    """In words, before anything else is done."""

    async def story() -> None:
        async with Nodes() as nodes:
            mx1 = await nodes.add("mx1")
            with pytest.raises(ConfigError) as caught:
                await nodes.add("mx2", listen=mx1.address)
            expected = f"cluster.listen: {mx1.address}: Address already in use; stop what listens there (ss -lntp)"
            assert str(caught.value).startswith(expected)
            with pytest.raises(ConfigError, match=r"192\.0\.2\.1:1: Cannot assign requested address"):
                await nodes.add("mx2", listen="192.0.2.1:1")

    run(story())
