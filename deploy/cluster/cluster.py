"""A cluster to try, on this machine: etcd, and three agents that share the limits of deploy/examples.

    make cluster        (or: python deploy/cluster/cluster.py [DIRECTORY])

etcd answers at 127.0.0.1:12379. The agents answer Postfix at 127.0.0.1:10041 to 10043 and each other, with certificates
of their own, at 127.0.0.1:10051 to 10053. Everything, the logs too, lies in build/cluster and is kept for the next
time; ^C stops all.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ETCD_PORT = 12379
ETCD = f"http://127.0.0.1:{ETCD_PORT}"
NODES = ("mx1", "mx2", "mx3")
LIMITS = Path(__file__).resolve().parents[1] / "examples" / "limits.yaml"
PATIENCE_S = 30.0
ENVIRONMENT = {**os.environ, "ETCDCTL_API": "3"}

SETTINGS = """\
node: mx{number}
listen: inet:127.0.0.1:{policy}
state_dir: mx{number}
admin_socket: {directory}/mx{number}.sock
etcd:
  endpoints: {etcd}
cluster:
  listen: 127.0.0.1:{peers}
  ca: tls/ca.pem
  certificate: tls/mx{number}.pem
  key: tls/mx{number}.key
"""

HELP = """
Three agents are up. In another terminal:

  postmeter ask --socket {directory}/mx1.sock sasl_username=alice@example.com     would she be let through?
  exec 3<>/dev/tcp/127.0.0.1/10041                  30 recipients through mx1 (in bash) ...
  printf '%s\\n' request=smtpd_access_policy protocol_state=END-OF-MESSAGE instance=1 \\
      sasl_username=alice@example.com recipient_count=30 '' >&3; head -1 <&3
  postmeter show --socket {directory}/mx2.sock alice@example.com
                                                    ... are known at mx2, within a second
  export ETCDCTL_API=3 ETCDCTL_ENDPOINTS={etcd}
  etcdctl get --prefix /postmeter/limits/           the limits
  etcdctl put /postmeter/overrides/per-user/alice@example.com '{{1h: 40}}'
                                                    another cap for her, at once and everywhere
  postmeter nodes --socket {directory}/mx1.sock     who is in, and how they are
  kill -9 a process, and see what the others do

(`postmeter` is {postmeter}.) ^C here stops everything.
"""


class Cluster:
    """Processes that are ended together, in the reverse order of their start."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.postmeter = str(Path(sys.executable).with_name("postmeter"))
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """All of it; the limits are those of the example, unless etcd has some."""
        directory = self.directory
        directory.mkdir(parents=True, exist_ok=True)
        self._start_etcd()
        self._make_certificates()
        for number, node in enumerate(NODES, 1):
            settings = directory / f"{node}.yaml"
            text = SETTINGS.format(
                number=number, policy=10040 + number, peers=10050 + number, directory=directory, etcd=ETCD
            )
            settings.write_text(text)
            if number == 1:
                self._put_limits(str(settings))
            self._spawn(node, self.postmeter, "agent", "--settings", str(settings))
        for node in NODES:
            self._await(f"{node} to serve", partial(self._serves, node))

    def stop(self) -> None:
        """Agents first."""
        for process in reversed(self._processes.values()):
            process.terminate()
            process.wait(PATIENCE_S)

    def _start_etcd(self) -> None:
        peer = f"http://127.0.0.1:{ETCD_PORT + 1}"
        self._spawn(
            "etcd", "etcd", "--name", "try", "--data-dir", str(self.directory / "etcd"), "--log-level", "warn",
            "--listen-client-urls", ETCD, "--advertise-client-urls", ETCD,
            "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"try={peer}",
        )  # fmt: skip
        health = ["etcdctl", "--endpoints", ETCD, "endpoint", "health"]
        self._await("etcd", lambda: subprocess.run(health, env=ENVIRONMENT, capture_output=True).returncode == 0)

    def _put_limits(self, settings: str) -> None:
        listed = self._run("limits", "list", "--json", "--settings", settings)
        if not json.loads(listed.stdout)["limits"]:
            self._run("limits", "put", "--settings", settings, "--all", str(LIMITS), check=True)

    def _make_certificates(self) -> None:
        tls = self.directory / "tls"
        if not tls.exists():
            self._run("certs", "ca", str(tls), check=True)
            for node in NODES:
                self._run("certs", "node", node, str(tls), check=True)

    def _serves(self, node: str) -> bool:
        asked = [self.postmeter, "health", "--socket", str(self.directory / f"{node}.sock")]
        return subprocess.run(asked, capture_output=True).returncode == 0

    def _run(self, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.postmeter, *args], text=True, stdout=subprocess.PIPE, check=check)

    def _spawn(self, name: str, *command: str) -> None:
        print(f"starting {name}", flush=True)
        with (self.directory / f"{name}.log").open("ab") as log:
            # Not in this terminal's group: ^C ends them in order.
            self._processes[name] = subprocess.Popen(command, env=ENVIRONMENT, stderr=log, start_new_session=True)

    def _await(self, what: str, happened: Callable[[], bool]) -> None:
        give_up_s = time.monotonic() + PATIENCE_S
        while not happened():
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise SystemExit(f"cluster.py: {name} ended; see {self.directory / name}.log")
            if time.monotonic() > give_up_s:
                raise SystemExit(f"cluster.py: waited {PATIENCE_S:g} s for {what}; see the logs in {self.directory}")
            time.sleep(0.1)


def main() -> int:
    """Start, say how to try it, and stop when asked to."""
    for name in ("etcd", "etcdctl"):
        if shutil.which(name) is None:
            raise SystemExit(f"cluster.py: {name} is missing: apt install etcd-server etcd-client")
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else "build/cluster").absolute()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    cluster = Cluster(directory)
    try:
        cluster.start()
        print(HELP.format(directory=directory, etcd=ETCD, postmeter=cluster.postmeter), flush=True)
        stop.wait()
    finally:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
