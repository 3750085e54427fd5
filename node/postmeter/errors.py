"""Every error that Postmeter raises on purpose, split by who is at fault.

A message says what is wrong, where, and what to do. Anything else that is raised is a bug.
"""


class PostmeterError(Exception):
    """Base of all errors below."""


class ConfigError(PostmeterError):
    """The operator's settings or limits are wrong. `problems` holds all of them, one text each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ProtocolError(PostmeterError):
    """A client of the policy port sent what no Postfix sends. It gets no reply and is disconnected."""


class PeerError(PostmeterError):
    """Another node said what cannot be, or is not who it says. Nothing of it counts."""


class StorageError(PostmeterError):
    """The state directory cannot be used: full, failing, locked by another agent, or of another version."""


class AgentError(PostmeterError):
    """The running agent cannot be reached, or refused what the command line asked."""


class EtcdError(PostmeterError):
    """etcd cannot be reached, or refused it. What should have been written may have been written or not."""


class ClusterError(PostmeterError):
    """The node must not take part in the cluster as it is: its state is old, a copy, or somebody else's."""
