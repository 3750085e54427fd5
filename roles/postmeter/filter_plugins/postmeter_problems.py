"""postmeter_problems: what is wrong with the role's variables, found before anything is changed.

    {{ variables | postmeter_problems(hostvars, play_hosts) }}

gives a list of "VARIABLE: what is wrong; what to do". `variables` maps the role's variables to their values on this
host. Types and unknown names are checked before by meta/argument_specs.yml; what is looked at here is what these cannot
say: names that must differ between hosts, files on the controller, networks, and variables that need each other.
"""

import ipaddress
import os
import re

NODE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
ENDPOINT = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
WHEEL = re.compile(r"postmeter-([0-9][A-Za-z0-9.+!]*)-[^/]*\.whl")
TLS = ("ca", "certificate", "key")


def postmeter_problems(variables, others):
    """All problems. `others` maps the other hosts of the play to the names of their nodes."""
    wanted = {name.removeprefix("postmeter_"): value for name, value in variables.items()}
    return [
        f"postmeter_{problem}"
        for check in (_source, _node, _cluster, _etcd, _tls, _limits)
        for problem in check(wanted, others)
    ]


def postmeter_release(variables):
    """The version that the variables name; "" if they name none."""
    if variables["postmeter_source"] == "wheel":
        match = WHEEL.fullmatch(os.path.basename(variables["postmeter_wheel"]))
        return match[1] if match else ""
    if variables["postmeter_source"] == "wheelhouse" and not variables["postmeter_version"]:
        found = _in_wheelhouse(variables["postmeter_wheelhouse"])
        return found[0] if len(found) == 1 else ""
    return variables["postmeter_version"]


def _in_wheelhouse(directory):
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return [match[1] for match in map(WHEEL.fullmatch, names) if match]


def _source(wanted, others):
    source = wanted["source"]
    if source == "pypi" and not wanted["version"]:
        yield "version: is missing; name the release, or the newest one would differ from host to host"
    if source == "wheel":
        if not WHEEL.fullmatch(os.path.basename(wanted["wheel"])):
            yield f"wheel: {wanted['wheel']!r} is no wheel of Postmeter; name a file postmeter-VERSION-py3-none-any.whl"
        yield from _unreadable("wheel", wanted["wheel"])
    if source == "wheelhouse":
        found = _in_wheelhouse(wanted["wheelhouse"])
        if not found:
            yield f"wheelhouse: {wanted['wheelhouse']!r} on the controller holds no postmeter-VERSION-py3-none-any.whl"
        elif wanted["version"] and wanted["version"] not in found:
            yield f"version: {wanted['version']} is not in {wanted['wheelhouse']}; there is {', '.join(sorted(found))}"
        elif not wanted["version"] and len(found) > 1:
            yield f"version: is missing; {wanted['wheelhouse']} holds {', '.join(sorted(found))}"


def _node(wanted, others):
    if not wanted["node"]:
        yield "node: is missing; name the node, in the inventory"
    elif not NODE.fullmatch(wanted["node"]):
        yield f"node: {wanted['node']!r} cannot be the name of a node; write lower-case letters, digits and hyphens"
    same = sorted(host for host, node in others.items() if node == wanted["node"])
    if same:
        yield f"node: {wanted['node']!r} is also the node of {', '.join(same)}; no two may be called alike"


def _cluster(wanted, others):
    if not wanted["cluster"]:
        return
    if "listen" not in wanted["cluster"]:
        yield "cluster: listen: is missing; write where the other nodes reach this one, HOST:PORT"
    for name in ("listen", "address"):
        problem = _address(wanted["cluster"].get(name))
        if problem:
            yield f"cluster: {name}: {problem}"
    if not wanted["etcd"]:
        yield "etcd: is missing; a cluster needs one, name its endpoints (deploy/ansible/etcd.yml sets one up)"


def _address(text):
    if text is None:
        return ""
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        return f"{text!r} is no address with a port; write HOST:PORT"
    if re.fullmatch(r"[0-9.]+|\[.*\]", host):
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return f"{host!r} is no address"
    return ""


def _etcd(wanted, others):
    etcd = wanted["etcd"]
    if not etcd:
        return
    endpoints = etcd.get("endpoints", [])
    for endpoint in endpoints:
        if not ENDPOINT.fullmatch(endpoint):
            yield f"etcd: endpoints: {endpoint!r} is no endpoint; write https://HOST:2379"
    if not endpoints:
        yield "etcd: endpoints: is missing; name where etcd answers"
    if etcd.get("user") and not wanted["etcd_password"]:
        yield "etcd_password: is missing; etcd asks it of the user in postmeter_etcd"
    secure = any(endpoint.startswith("https:") for endpoint in endpoints)
    if secure and not wanted["etcd_tls_ca"]:
        yield "etcd_tls_ca: is missing; name the file with the CA of etcd's certificates"
    if bool(wanted["etcd_tls_certificate"]) != bool(wanted["etcd_tls_key"]):
        yield "etcd_tls_certificate: certificate and key need each other; give both or none"
    for name in TLS:
        if wanted[f"etcd_tls_{name}"]:
            yield from _no_pem(f"etcd_tls_{name}", wanted[f"etcd_tls_{name}"])


def _tls(wanted, others):
    if not wanted["cluster"] or wanted["cluster"].get("insecure") or wanted["tls_directory"]:
        return
    for name in TLS:
        if wanted[f"tls_{name}"]:
            yield from _no_pem(f"tls_{name}", wanted[f"tls_{name}"])
        else:
            yield f"tls_{name}: is missing; name the file, or let postmeter_tls_directory make one"


def _no_pem(name, path):
    problem = list(_unreadable(name, path))
    yield from problem
    if not problem:
        with open(path, encoding="utf-8", errors="replace") as file:
            kind = "PRIVATE KEY" if name.endswith("key") else "CERTIFICATE"
            if f"{kind}-----" not in file.read(1 << 20):
                yield f"{name}: {path} holds no {kind.lower()} in PEM form"


def _unreadable(name, path):
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        yield f"{name}: {path!r} on the controller cannot be read: {error.strerror}"


def _limits(wanted, others):
    yield from (f"limits: {problem}" for problem in _networks(wanted["limits"], []))


def _networks(value, place):
    """The problems of all that stands under `cidr`, wherever."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _networks(each, [*place, str(name)])
    elif isinstance(value, list):
        for each in value:
            yield from _networks(each, place)
    elif place and place[-1] == "cidr":
        try:
            ipaddress.ip_network(value)
        except ValueError as error:
            yield f"{'.'.join(place)}: {error}"


class FilterModule:
    """What Ansible looks for."""

    def filters(self):
        """Name the filters."""
        return {"postmeter_problems": postmeter_problems, "postmeter_release": postmeter_release}
