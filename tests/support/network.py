"""Recorder of the addresses that a command connects to and the host names that it looks up."""

import ipaddress
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import CHECKOUT

_DETECTED_CI = ("TF_BUILD", "GITHUB_ACTIONS", "JENKINS_URL", "CI")
"""Variables with which ONNX Runtime recognizes a build server, where it sends nothing."""
_CONNECT = re.compile(r'connect\(.*?(?:inet_addr\("|inet_pton\(AF_INET6, ")([^"]+)"')
_PORT = re.compile(r"sin6?_port=htons\((\d+)\)")
_SENT = re.compile(r'(?:sendto|sendmsg|sendmmsg)\(.*?"((?:[^"\\]|\\.)*)"')
_QUERY = b"\1\0\0\1\0\0\0\0\0\0"
"""Header of a DNS query, after its id: recursion desired, one question."""


@dataclass(frozen=True)
class Traffic:
    """Network use of a command and all its children."""

    addresses: set[str]
    """Addresses outside of loopback that were passed to connect()."""
    names: set[str]
    """Host names in DNS queries; `?` for a query that cannot be read."""
    stored: list[str]
    """Files under the home directory of the command that ONNX Runtime's telemetry wrote."""
    output: str


def why_not() -> str | None:
    """The reason why commands cannot be recorded here; None if they can."""
    if shutil.which("strace") is None:
        return "no strace: apt-get install strace"
    done = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True)
    return None if done.returncode == 0 else "strace may not trace processes here"


def record(command: list[object], home: Path, **environment: str) -> Traffic:
    """Run a command from the checkout, with an empty home directory and without telemetry settings.

    Args:
        command: the program and its arguments.
        home: directory to create.
        environment: further variables.
    """
    home.mkdir()
    log = home.with_suffix(".strace")
    dropped = (*_DETECTED_CI, "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    dropped += ("HF_HUB_DISABLE_TELEMETRY", "RAY_USAGE_STATS_ENABLED")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    traced = ["strace", "-f", "--seccomp-bpf", "-qq", "-s", "300", "-o", str(log)]
    traced += ["-e", "trace=connect,sendto,sendmsg,sendmmsg", *map(str, command)]
    done = subprocess.run(
        traced,
        cwd=CHECKOUT,
        env=kept | {"HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    addresses, names, asked = set(), set(), False
    for line in log.read_text(errors="replace").splitlines():
        if found := _CONNECT.search(line):
            address = ipaddress.ip_address(found[1])
            address = getattr(address, "ipv4_mapped", None) or address
            if (port := _PORT.search(line)) and port[1] == "53":
                asked = True
            elif not (address.is_loopback or address.is_unspecified):
                addresses.add(str(address))
        elif found := _SENT.search(line):
            names |= _names(found[1].encode("latin-1", "replace").decode("unicode_escape"))
    if asked and not names:
        names.add("?")
    stored = [str(path.relative_to(home)) for path in home.rglob("*onnxruntime*.db*")]
    return Traffic(addresses, names, stored, done.stdout)


def _names(text: str) -> set[str]:
    """The host name of a DNS query; empty for other messages."""
    message = text.encode("latin-1", "replace")
    if message[2:12] != _QUERY:
        return set()
    labels, rest = [], message[12:]
    while rest and rest[0]:
        labels.append(rest[1 : 1 + rest[0]].decode("latin-1"))
        rest = rest[1 + rest[0] :]
    return {".".join(labels)}
