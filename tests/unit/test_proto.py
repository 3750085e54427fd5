"""The generated protobuf code is what proto/ says."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("control_pb2.py", "control_pb2.pyi", "control_pb2_grpc.py")


def test_generated_code_is_not_stale(tmp_path: Path) -> None:
    """Generating again gives what is committed."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs, "proto/postmeter/v1/control.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in GENERATED:
        made, committed = (root / "postmeter/v1" / name for root in (tmp_path, ROOT / "node"))
        assert made.read_text() == committed.read_text(), f"{name} is stale: run `make proto`, and commit what it makes"


def test_every_field_and_call_is_explained() -> None:
    """Each call, and each field but those that are messages of their own, has a comment right above it."""
    lines = (ROOT / "proto/postmeter/v1/control.proto").read_text().splitlines()
    bare = [
        line.strip()
        for above, line in pairwise(lines)
        if line.startswith("  ") and not line.strip().startswith("//") and not above.strip().startswith("//")
    ]
    assert ["Meter meter = 1;", "Meter meter = 1;"] == bare
