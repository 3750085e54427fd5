"""What the lab needs and makes once: a Debian tree, Ansible, Salt, Postmeter's wheels.

    base()          a Debian with systemd, sshd, Postfix and etcd, made by debootstrap: the hosts' lowest layer
    tools()         a virtual environment with Ansible and the linters
    salt()          a layer over the base, with Salt in /opt/salt
    wheelhouse()    Postmeter and what it needs as wheels: what the role installs without a network
    needed()        only what it needs
    key()           the ssh key that opens all hosts

All lies in CACHE under names that hold a digest of what it was made from, so that a change makes it anew, and is made
by one process at a time. Nothing of it is ever changed afterwards. What is no longer used is left: remove it by hand.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).with_name("host")
CACHE = Path(os.environ.get("POSTMETER_LAB_CACHE", "/var/cache/postmeter-lab"))
REQUIREMENTS = Path(__file__).with_name("requirements.lock")
SALT = Path(__file__).with_name("salt.lock")
# Releases of Debian that the hosts may have, with their Python; the first unless told otherwise.
PYTHONS = {"bookworm": "3.11", "trixie": "3.13"}
RELEASE = "bookworm"
# For what runs here.
PYTHON = "/usr/bin/python3"

_PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


class LabError(Exception):
    """Something in the lab cannot be made or did not work; says what, and shows what the command said."""


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed. Raises LabError with all of it if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=env,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout[-4000:]}")
    return done.stdout


def base(release: str = RELEASE) -> Path:
    """The hosts' lowest layer."""
    return _made(f"base-{release}", [*sorted(HOST.iterdir())], partial(_make_base, release=release))


def tools() -> Path:
    """The directory of ansible-playbook, ansible-lint and salt-lint."""
    return _made("tools", [REQUIREMENTS], _make_tools) / "bin"


def salt() -> Path:
    """A layer for hosts: /opt/salt, and the command salt-call."""
    return _made("salt", [SALT], _make_salt)


def wheelhouse(version: str | None = None, spoiled: bool = False, release: str = RELEASE) -> Path:
    """A directory of wheels: this tree's Postmeter, or the same under another version, and what it depends on.

    `spoiled`: its agent ends as soon as it is started. `release`: for the Python of that Debian.
    """
    sources = [path for name in ("node", "proto") for path in sorted((ROOT / name).rglob("*")) if _is_source(path)]
    name = f"wheels-{version or 'own'}{'-spoiled' if spoiled else ''}-{release}"
    sources += [ROOT / "pyproject.toml", ROOT / "tests/requirements.lock"]
    return _made(name, sources, partial(_make_wheels, version=version, spoiled=spoiled, release=release))


def needed(release: str = RELEASE) -> Path:
    """A directory of wheels: what Postmeter depends on, as the tests have it."""
    sources = [ROOT / "pyproject.toml", ROOT / "tests/requirements.lock"]
    return _made(f"needed-{release}", sources, partial(_make_needed, release=release))


def key() -> Path:
    """The private key; the public one lies beside it, as .pub."""
    made = _made("key", [], lambda at: run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", at / "id"))
    return made / "id"


def _made(name: str, sources: Sequence[Path], make: Callable[[Path], object]) -> Path:
    """The directory CACHE/name-digest, made by `make` if it is not there, whole."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    made = CACHE / f"{name}-{digest.hexdigest()[:12]}"
    whole = made.with_name(f"{made.name}.made")
    CACHE.mkdir(parents=True, exist_ok=True)
    CACHE.chmod(0o755)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            print(f"lab: making {made}", file=sys.stderr, flush=True)
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            whole.touch()
    return made


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path)


def _make_base(made: Path, release: str) -> None:
    names = [line.split("#")[0].strip() for line in (HOST / "packages.txt").read_text().splitlines()]
    include = f"--include={','.join(filter(None, names))}"
    run("debootstrap", "--variant=minbase", include, release, made, _mirror())
    run(HOST / "setup.sh", made, key().with_suffix(".pub"))


def _mirror() -> str:
    """Where apt on this machine gets Debian from."""
    lines = run("apt-get", "indextargets", "--format", "$(CREATED_BY) $(RELEASE) $(COMPONENT) $(REPO_URI)").splitlines()
    for line in lines:
        kind, release, component, uri = line.split(" ", 3)
        if kind == "Packages" and release in PYTHONS and component == "main":
            return uri
    raise LabError(f"apt knows no source of Debian ({', '.join(PYTHONS)}): the lab's hosts are made from it")


def _make_tools(made: Path) -> None:
    run(PYTHON, "-m", "venv", made)
    run(made / "bin/python", "-m", "pip", "install", "-q", "--require-hashes", "-r", REQUIREMENTS)


def _make_salt(made: Path) -> None:
    venv = made / "opt/salt"
    run(PYTHON, "-m", "venv", venv)
    run(venv / "bin/python", "-m", "pip", "install", "-q", "--require-hashes", "-r", SALT)
    # On the host it lies elsewhere than where it was made, so none of its own scripts would find it.
    command = made / "usr/local/bin/salt-call"
    command.parent.mkdir(parents=True)
    start = "import sys; from salt.scripts import salt_call; sys.exit(salt_call())"
    command.write_text(f"#!/bin/sh\nexec /opt/salt/bin/python -c '{start}' \"$@\"\n")
    command.chmod(0o755)


def _make_wheels(made: Path, version: str | None, spoiled: bool, release: str) -> None:
    tree = made / "tree"
    shutil.copytree(ROOT / "node", tree / "node", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    if version:
        init = tree / "node/postmeter/__init__.py"
        init.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', init.read_text()))
    if spoiled:
        with (tree / "node/postmeter/agent.py").open("a") as agent:
            agent.write('\n\ndef run(settings: Settings) -> int:\n    sys.exit("spoiled on purpose")\n')
    run(*_PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", made, tree)
    shutil.rmtree(tree)
    for wheel in needed(release).iterdir():
        os.link(wheel, made / wheel.name)


def _make_needed(made: Path, release: str) -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = made / "pinned.txt"
    pinned.write_text(run(sys.executable, "-m", "pip", "freeze", "--exclude-editable"))
    fitting = ("--only-binary=:all:", f"--python-version={PYTHONS[release]}", "--implementation=cp")
    run(*_PIP, "download", *fitting, "--constraint", pinned, "--dest", made, *dependencies)
    pinned.unlink()
