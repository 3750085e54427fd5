"""The running agent, seen from the command line: one connection to its admin socket.

    with Client(args.socket) as client:
        reply = client.show(b"alice@example.com")

The socket is the one given, else $POSTMETER_SOCKET, else `admin_socket` of the settings file, else its default. Errors
are AgentError if the agent cannot be reached or failed, and ConfigError if it says that the question is wrong; both say
what to do.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import quote

from postmeter.cli.command import local_settings
from postmeter.defaults import CALL_TIMEOUT_S
from postmeter.errors import AgentError, ConfigError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from postmeter.v1 import control_pb2 as pb

ReplyT = TypeVar("ReplyT")


class Client:
    """To be closed, or used in a `with`."""

    def __init__(self, path: Path | None) -> None:
        self._path = path or default_path()
        _knock(self._path)
        import grpc

        from postmeter.v1 import control_pb2, control_pb2_grpc

        self._pb = control_pb2
        self._channel = grpc.insecure_channel(f"unix:{quote(str(self._path))}")
        self._stub = control_pb2_grpc.ControlStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def ask(self, request: bytes) -> pb.AskResponse:
        """What Postfix would be told about a request in its own form."""
        return self._call("Ask", self._pb.AskRequest(request=request), self._pb.AskResponse)

    def show(self, key: bytes) -> pb.ShowResponse:
        """What a key has used."""
        return self._call("Show", self._pb.ShowRequest(key=key), self._pb.ShowResponse)

    def top(self, limit: str, keys: int) -> pb.TopResponse:
        """Who has used most of a limit; "" for all."""
        return self._call("Top", self._pb.TopRequest(limit=limit, keys=keys), self._pb.TopResponse)

    def reset(self, key: bytes, limit: str) -> pb.ResetResponse:
        """Forget what a key has used of a limit; "" for all."""
        return self._call("Reset", self._pb.ResetRequest(key=key, limit=limit), self._pb.ResetResponse)

    def reload(self) -> pb.ReloadResponse:
        """Read the limits again."""
        return self._call("Reload", self._pb.ReloadRequest(), self._pb.ReloadResponse)

    def nodes(self) -> pb.NodesResponse:
        """Who is in the cluster."""
        return self._call("Nodes", self._pb.NodesRequest(), self._pb.NodesResponse)

    def change_roster(self, change: str, node: str) -> pb.ChangeRosterResponse:
        """Let a node join, be drained or be removed; "" for the one that is asked."""
        request = self._pb.ChangeRosterRequest(change=f"CHANGE_{change.upper()}", node=node)
        return self._call("ChangeRoster", request, self._pb.ChangeRosterResponse)

    def serving(self, wait_s: float) -> bool:
        """Whether the agent serves, as soon as it does within `wait_s`."""
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        watch = health_pb2_grpc.HealthStub(self._channel).Watch
        try:
            for reply in watch(health_pb2.HealthCheckRequest(), timeout=wait_s or CALL_TIMEOUT_S):
                if reply.status == health_pb2.HealthCheckResponse.SERVING or not wait_s:
                    break
        except grpc.RpcError as error:
            if not wait_s or error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                raise _explained(error, self._path) from None
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _call(self, name: str, request: Message, kind: type[ReplyT]) -> ReplyT:
        import grpc

        try:
            reply = getattr(self._stub, name)(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _explained(error, self._path) from None
        assert isinstance(reply, kind)
        return reply


def default_path() -> Path:
    """The socket, if none is given. Raises ConfigError if the settings are wrong."""
    named = os.environ.get("POSTMETER_SOCKET")
    path = Path(named) if named else local_settings().admin_socket.path
    assert path is not None
    return path


def _knock(path: Path) -> None:
    """Raise AgentError if nobody answers: gRPC would take longer to say so, and not say why."""
    with socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(CALL_TIMEOUT_S)
        try:
            wire.connect(str(path))
        except PermissionError:
            raise AgentError(f"{path}: this user may not ask the agent: use sudo, or the group of the socket") from None
        except OSError:
            raise AgentError(
                f"no agent answers at {path}: is it running? systemctl status postmeter;"
                " another socket: --socket or POSTMETER_SOCKET"
            ) from None


def _explained(error: Any, path: Path) -> AgentError | ConfigError:
    import grpc

    code, details = error.code(), error.details()
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return ConfigError([details])
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return AgentError(f"the agent at {path} went away: systemctl status postmeter")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return AgentError(f"the agent at {path} did not answer within {CALL_TIMEOUT_S:g} s: journalctl -u postmeter")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return AgentError(f"the agent at {path} is of another version: restart it, systemctl restart postmeter")
    return AgentError(f"the agent at {path} could not do it: {details}")
