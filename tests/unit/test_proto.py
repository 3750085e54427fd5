"""The generated protobuf code is what proto/ says."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted(path.relative_to(ROOT / "proto") for path in (ROOT / "proto").rglob("*.proto"))

# A field that is a message of its own, of which the comment stands there.
_SPEAKS_FOR_ITSELF = {"Meter meter = 1;"}


@pytest.mark.parametrize("proto", PROTOS, ids=str)
def test_generated_code_is_not_stale(proto: Path, tmp_path: Path) -> None:
    """Generating again gives what is committed."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs, f"proto/{proto}"]
    subprocess.run(command, cwd=ROOT, check=True)
    generated = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert generated
    for made in generated:
        committed = ROOT / "node" / made.relative_to(tmp_path)
        assert made.read_text() == committed.read_text(), f"{made.name} is stale: run `make proto`, and commit that"


@pytest.mark.parametrize("proto", PROTOS, ids=str)
def test_every_field_and_call_is_explained(proto: Path) -> None:
    """Each call, and each field but those that are messages of their own, has a comment right above it."""
    lines = (ROOT / "proto" / proto).read_text().splitlines()
    bare = {
        line.strip()
        for above, line in pairwise(lines)
        if line.startswith("  ") and line.endswith(";") and not above.strip().startswith("//")
    }
    assert bare <= _SPEAKS_FOR_ITSELF
