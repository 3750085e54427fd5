"""A few short runs of what `make cluster-test` does at length: the cap holds whatever becomes of the network."""

from __future__ import annotations

import pytest

from .campaign import Run, carry_out

RUNS = [
    # On a busy machine the last right may take longer to come than the default allows.
    Run("none", nodes=3, seed=1, window_s=4, borrow_timeout="5s"),
    Run("changing", nodes=3, seed=1, window_s=3, fault_s=9),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.fault}-{run.nodes}")
def test_the_cap_holds(machines: None, run: Run) -> None:
    """No window has more than `max`; where nothing fails, the first has no less; all agents live."""
    assert [] == carry_out(run).problems
