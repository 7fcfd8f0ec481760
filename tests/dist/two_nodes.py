# SPDX-License-Identifier: Apache-2.0
"""Two machines on one: network namespaces joined by a cable, an ssh server in each.

They share files and process ids with this machine, but not the network: node-0 is 10.77.0.1,
node-1 is 10.77.0.2, and there is no way to 10.77.0.9, which ssh knows as node-2. The servers
have their own keys and configuration; nothing outside ``folder`` changes but the namespaces,
which close() removes.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NOWHERE = "10.77.0.9"
PORT = 2222
TOOLS = ("ip", "ssh", "ssh-keygen", "sshd")
SERVER = """\
Port {port}
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""
CLIENT = """\
Host {name}
  HostName {address}
  Port {port}
  User root
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
"""

STAND_IN = """\
import os, subprocess, sys
node = int(sys.argv[sys.argv.index("--node-rank") + 1])
command = [sys.executable, *sys.argv[sys.argv.index("29500") + 1 :]]
ranks = [
    subprocess.Popen(command, env={**os.environ, "RANK": str(r)}, start_new_session=True)
    for r in (2 * node, 2 * node + 1)
]
sys.exit(max(rank.wait() for rank in ranks))
"""


def with_stand_in(folder: Path) -> dict[str, str]:
    """An environment with a stand-in for torchrun that starts at once: two ranks, as is."""
    package = folder / "torch" / "distributed"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "run.py").write_text(STAND_IN)
    return {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def tool(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def why_not() -> str | None:
    """Why there can be no two nodes on this machine; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for name in TOOLS:
        if tool(name) is None:
            return f"{name} is not installed (Debian: iproute2, openssh-client, openssh-server)"
    name = f"dc{os.getpid()}-try"
    done = subprocess.run([tool("ip"), "netns", "add", name], capture_output=True, text=True)
    if done.returncode != 0:
        return f"no network namespaces here: {done.stderr.strip()}"
    cable = ["link", "add", "eth0", "netns", name, "type", "veth", "peer", "eth1", "netns", name]
    inside = ["netns", "exec", name, "true"]
    tried = [
        subprocess.run([tool("ip"), *words], capture_output=True, text=True)
        for words in (cable, inside)
    ]
    run("ip", "netns", "del", name)
    for done, what in zip(tried, ("veth pairs", "running in a network namespace"), strict=True):
        if done.returncode != 0:
            return f"{what}: does not work here: {done.stderr.strip()}"
    return None


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [tool(name), *arguments], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout


class NoServer(Exception):
    """sshd does not run on this machine, with what it said."""


class TwoNodes:
    """The namespaces, cable and servers; close() ends them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.spaces = [f"dc{os.getpid()}-{i}" for i in range(2)]
        self.servers: list[subprocess.Popen] = []
        self.ssh_config = folder / "ssh_config"
        try:
            self._cable()
            self._keys()
            self._servers()
        except BaseException:
            self.close()
            raise

    def _cable(self) -> None:
        for space in self.spaces:
            run("ip", "netns", "add", space)
        one, two = self.spaces
        cable = ["type", "veth", "peer", "name", "eth0", "netns", two]
        run("ip", "link", "add", "eth0", "netns", one, *cable)
        for space, address in zip(self.spaces, ADDRESSES, strict=True):
            run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                run("ip", "-n", space, "link", "set", device, "up")

    def _keys(self) -> None:
        for name in ("host_key", "key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        public = (self.folder / "host_key.pub").read_text()
        known = "".join(f"[{address}]:{PORT} {public}" for address in (*ADDRESSES, NOWHERE))
        (self.folder / "known_hosts").write_text(known)
        hosts = enumerate((*ADDRESSES, NOWHERE))
        facts = {"folder": self.folder, "port": PORT}
        self.ssh_config.write_text(
            "".join(CLIENT.format(name=f"node-{i}", address=a, **facts) for i, a in hosts)
        )

    def _servers(self) -> None:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for space, address in zip(self.spaces, ADDRESSES, strict=True):
            config = self.folder / f"{space}.conf"
            config.write_text(SERVER.format(port=PORT, address=address, folder=self.folder))
            log = self.folder / f"{space}.log"
            log.touch()
            command = [tool("sshd"), "-D", "-f", str(config), "-E", str(log)]
            self.servers.append(subprocess.Popen(self.inside(space, *command)))
        for i in range(2):
            self._wait_for(i)

    def _wait_for(self, i: int) -> None:
        login = ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes", f"node-{i}", "true"]
        deadline = time.monotonic() + 10
        while True:
            done = subprocess.run(
                self.inside(self.spaces[0], *login), capture_output=True, text=True, timeout=10
            )
            if done.returncode == 0:
                return
            if time.monotonic() > deadline or self.servers[i].poll() is not None:
                log = (self.folder / f"{self.spaces[i]}.log").read_text()
                raise NoServer(f"no ssh to node-{i}: {done.stderr}{log}")
            time.sleep(0.05)

    def inside(self, space: str, *command: str) -> list[str]:
        return [tool("ip"), "netns", "exec", space, *command]

    def hostfile(self, nodes: int = 2, slots: int = 2) -> str:
        path = self.folder / f"hosts{nodes}x{slots}"
        path.write_text("".join(f"node-{i} slots={slots}\n" for i in range(nodes)))
        return str(path)

    @property
    def launcher(self) -> list[str]:
        """What `deepcompile launch` has to know of these nodes."""
        ssh = ["--ssh-args", shlex.join(["-F", str(self.ssh_config)])]
        return [*ssh, "--master-addr", ADDRESSES[0], "--env", "GLOO_SOCKET_IFNAME=eth0"]

    def launch(
        self, *arguments: str, nodes: int = 2, **options
    ) -> contextlib.AbstractContextManager[subprocess.Popen]:
        """`deepcompile launch` on node-0, with two ranks on each node."""
        command = [sys.executable, "-m", "deepcompile", "launch", "--hostfile"]
        return self.start(*command, self.hostfile(nodes), *self.launcher, *arguments, **options)

    @contextlib.contextmanager
    def start(self, *command: str, **options) -> Iterator[subprocess.Popen]:
        """A command on node-0; killed at the end if it still runs."""
        with subprocess.Popen(
            self.inside(self.spaces[0], *command),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # What a shell starts in the background, these tests for one, ignores it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **options,
        ) as job:
            try:
                yield job
            finally:
                job.kill()

    def left(self, patience_s: float = 0.0) -> list[str]:
        """What runs on the nodes beside the servers, after waiting for it to end."""
        deadline = time.monotonic() + patience_s
        while True:
            pids = {
                int(p) for space in self.spaces for p in run("ip", "netns", "pids", space).split()
            }
            pids -= {server.pid for server in self.servers}
            lines = [f"{pid}: {_command(pid)}" for pid in sorted(pids) if _command(pid)]
            if not lines or time.monotonic() > deadline:
                return lines
            time.sleep(0.05)

    def close(self) -> None:
        for server in self.servers:
            server.terminate()
            server.wait(10)
        for space in self.spaces:
            try:
                for pid in run("ip", "netns", "pids", space).split():
                    os.kill(int(pid), signal.SIGKILL)
                run("ip", "netns", "del", space)
            except (subprocess.CalledProcessError, ProcessLookupError):
                continue


def _command(pid: int) -> str:
    """A process's command line; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""
