# SPDX-License-Identifier: Apache-2.0
"""`deepcompile launch`: hostfiles, node lists, commands; and jobs, with ssh and srun faked.

tests/dist/test_launch_nodes.py has them for real.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_nodes import with_stand_in

from deepcompile.errors import UserError
from deepcompile.launch import commands, hosts, options, slurm
from deepcompile.launch.output import Labelled, Output, outputs

HOSTS = """\
# the cluster
node-0 slots=8

me@node-1   slots=4   # the old one
fe80::1 slots=2
"""
AWKWARD = 'it\'s "$HOME" `id` \\ ; two  words *'


def test_hostfile():
    found = hosts.parse(HOSTS, "hosts")
    assert [(h.name, h.slots) for h in found] == [("node-0", 8), ("me@node-1", 4), ("fe80::1", 2)]
    assert found[1].chosen == (0, 1, 2, 3) and not found[1].partial


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("node-0 slots=8\nnode-1\n", 2, ["node-1 has no slots", "`node-1 slots=8`"]),
        ("\n# x\nnode-0 slots=none", 3, ["slots=none is not a positive number"]),
        ("node-0 slots=0", 1, ["slots=0 is not a positive number"]),
        ("node-0 slots=-2", 1, ["slots=-2 is not a positive number"]),
        ("node-0 slots=2.5", 1, ["slots=2.5 is not a positive number"]),
        ("node-0 slots=", 1, ["slots= is not a positive number"]),
        ("a slots=1\nb slots=1\n\na slots=2", 4, ["a is there already, in line 1"]),
        ("node-0 slots=8 gpus=8", 1, ["gpus is not a key", "slots"]),
        ("node-0:2", 1, ["slots are a key", "`node-0 slots=2`"]),
        ("fe80::2", 1, ["`fe80::2 slots=8`"]),
        ("node-0 slots=8 slots=9", 1, ["slots is given twice"]),
        ("node-0 8", 1, ["'8' is not key=value", "`node-0 slots=8`"]),
        ("-oProxyCommand=x slots=8", 1, ["'-oProxyCommand=x' is no host name"]),
        ("slots=8", 1, ["'slots=8' is no host name"]),
    ],
)
def test_bad_lines_are_named_with_their_number(text: str, line: int, parts: list[str]):
    with pytest.raises(UserError) as caught:
        hosts.parse(text, "my/hosts")
    assert str(caught.value).startswith(f"[launch] my/hosts:{line}: ")
    for part in parts:
        assert part in str(caught.value)


def test_open_mpis_upper_limits_are_read_over():
    found = hosts.parse("a slots=4 max_slots=8\nb max-slots=4 slots=2", "hosts")
    assert [(host.name, host.slots) for host in found] == [("a", 4), ("b", 2)]


def test_a_hostfile_of_windows_begins_with_a_mark(tmp_path: Path):
    (tmp_path / "hosts").write_bytes(b"\xef\xbb\xbfnode-0 slots=2\r\nnode-1 slots=2\r\n")
    assert [host.name for host in hosts.read(str(tmp_path / "hosts"))] == ["node-0", "node-1"]


def test_hostfile_that_is_empty_or_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="names no host"):
        hosts.parse("# nothing\n\n", "hosts")
    with pytest.raises(UserError, match="cannot be read .No such file"):
        hosts.read(str(tmp_path / "none"))


def chosen(include=(), exclude=(), number=None, ranks=None) -> dict[str, tuple[int, ...]]:
    found = hosts.select(hosts.parse(HOSTS, "hosts"), include, exclude, "hosts")
    found = hosts.with_ranks(hosts.first(found, number, "hosts"), ranks)
    return {host.name: host.chosen for host in found}


def test_include_exclude_and_numbers():
    assert chosen(["fe80::1,node-0:0,2-3"]) == {"node-0": (0, 2, 3), "fe80::1": (0, 1)}
    assert chosen(["node-0:1", "node-0:5"]) == {"node-0": (1, 5)}
    assert list(chosen(exclude=["node-0"])) == ["me@node-1", "fe80::1"]
    assert chosen(["node-0,fe80::1:0"], ["node-0:4-7"]) == {
        "node-0": (0, 1, 2, 3),
        "fe80::1": (0,),
    }
    assert list(chosen(exclude=["fe80::1:0,1"])) == ["node-0", "me@node-1"]
    assert list(chosen(number=2)) == ["node-0", "me@node-1"]
    assert chosen(["node-0:2-5"], ranks="2") == {"node-0": (2, 3)}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"include": ["node-9"]}, "--include node-9: is not in hosts. Its nodes: node-0, me@node"),
        ({"exclude": ["node-9:0"]}, "--exclude node-9: is not in hosts"),
        ({"include": ["node-0:8"]}, "node-0: has no slot 8. It has 0 to 7"),
        ({"include": ["node-0:3-1"]}, "has no slot 3-1"),
        ({"include": ["node-0:x"]}, "'x' is no slot. Write `node-0:0,2-3`"),
        ({"include": ["node-0:"]}, "'' is no slot"),
        ({"exclude": ["node-0,me@node-1,fe80::1"]}, "leaves no host"),
        ({"number": 4}, "--num-nodes 4: 3 nodes of hosts can take part"),
        ({"include": ["node-0"], "number": 3}, "--num-nodes 3: 1 node of hosts can take part"),
        ({"ranks": "4"}, "--nproc-per-node 4: fe80::1 has 2 slots"),
        ({"ranks": "gpu"}, "--nproc-per-node gpu: give a positive number"),
    ],
)
def test_wrong_choices(asked: dict, said: str):
    with pytest.raises(UserError) as caught:
        chosen(**asked)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("compact", "names"),
    [
        ("node[01-03,07],gpu5", "node01 node02 node03 node07 gpu5"),
        ("login", "login"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("a-[1-2]-ib,b", "a-1-ib a-2-ib b"),
        ("r[1-2]n[01-02]", "r1n01 r1n02 r2n01 r2n02"),
        ("c[098-101]", "c098 c099 c100 c101"),
    ],
)
def test_slurm_lists(compact: str, names: str):
    assert slurm.expand(compact) == names.split()
    environ = {"SLURM_JOB_NODELIST": compact, "PATH": "/nowhere"}
    assert [host.name for host in slurm.nodes(environ)] == names.split()


@pytest.mark.parametrize(
    ("compact", "said"),
    [
        ("node[1-3", "brackets do not match"),
        ("node1-3]", "brackets do not match"),
        ("node[3-1]", "3-1 runs backwards"),
        ("node[a-c]", "'a-c' is neither"),
        (",", "names no node"),
    ],
)
def test_wrong_slurm_lists(compact: str, said: str):
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST") as caught:
        slurm.expand(compact)
    assert said in str(caught.value)


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_slurm_asks_scontrol_and_counts_gpus(tmp_path: Path):
    program(tmp_path, "scontrol", 'test "$*" = "show hostnames x[1-2]" && echo one && echo two')
    environ = {"SLURM_JOB_NODELIST": "x[1-2]", "PATH": f"{tmp_path}:/bin"}
    assert [host.name for host in slurm.nodes(environ)] == ["one", "two"]
    program(tmp_path, "scontrol", "echo Invalid hostlist >&2; exit 1")
    with pytest.raises(UserError, match="scontrol show hostnames .*: Invalid hostlist"):
        slurm.nodes(environ)
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST is not set"):
        slurm.nodes({})
    with pytest.raises(UserError, match="--include one:0: Slurm gives out the slots"):
        hosts.select([hosts.Host("one", None)], ["one:0"], [], "--slurm")
    for text in ("8", "a100:8", "gpu:a100:8(S:0-1)"):
        assert slurm.ranks_per_node({"SLURM_GPUS_PER_NODE": text}) == "8"
    with pytest.raises(UserError, match="Give --nproc-per-node"):
        slurm.ranks_per_node({"SLURM_GPUS_ON_NODE": "0"})


def test_arguments_are_told_apart():
    alone = ["--nproc-per-node", "2", "--log-dir", "x", "train.py", "--hostfile", "mine"]
    assert options.parse(alone) is None
    request = options.parse(
        ["--tee", "3", "--hostfile=h", "-m", "--log_dir", "logs", "pkg.train",
         "--slurm", "--env", "A", "--", "--nnodes"]
    )  # fmt: skip
    assert request.torchrun == [
        *["--tee", "3", "-m", "pkg.train"],
        *["--slurm", "--env", "A", "--", "--nnodes"],
    ]
    assert (request.hostfile, request.slurm, request.log_dir) == ("h", False, "logs")
    short = options.parse(["--slurm", "--ssh-args=-i key", "--env", "A", "--env", "B=1", "t.py"])
    assert (short.env, short.ssh_args, short.torchrun) == (["A", "B=1"], "-i key", ["t.py"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hostfile", "h", "--nnodes", "2", "t.py"], "--nnodes: the launcher sets it"),
        (["--slurm", "--rdzv_id=3", "t.py"], "--rdzv-id: the launcher sets it"),
        (["--slurm", "--max_restarts", "1", "t.py"], "the first failure ends the job"),
        (["--hostfile", "h", "--slurm", "t.py"], "Give one of them"),
        (["--env", "A=1", "t.py"], "--env: needs --hostfile or --slurm"),
        (["--hostfile", "h"], "script: is missing"),
        (["--slurm", "--nproc-per-node", "two", "t.py"], "--nproc-per-node two: give a positive"),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], said: str):
    with pytest.raises(UserError) as caught:
        options.parse(arguments)
    assert said in str(caught.value)


def test_variables():
    environ = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": "a:/b", "X": "1"}
    found = commands.forwarded({**environ, "OMP_NUM_THREADS": "2"}, ["X", "NCCL_DEBUG=WARN"])
    assert found == {
        **{"NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "2", "X": "1"},
        "PYTHONPATH": f"{os.path.abspath('a')}:/b",
    }
    memory = {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ALLOC_CONF": "b:2"}
    assert commands.forwarded({**memory, "PYTORCH_TEST": "1"}, []) == memory
    with pytest.raises(UserError, match="--env Y: is not set here"):
        commands.asked_for(environ, ["Y"])
    with pytest.raises(UserError, match="--env 1A=x: write it as"):
        commands.asked_for(environ, ["1A=x"])
    with pytest.raises(UserError, match="--ssh-args"):
        commands.split("'", "--ssh-args")


def show(tmp_path: Path) -> str:
    """A stand-in for Python: writes its arguments and the variable GREETING."""
    text = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('GREETING')]))"
    (tmp_path / "show.py").write_text(text)
    return str(program(tmp_path, "python", f'exec {sys.executable} {tmp_path}/show.py "$@"'))


def test_a_host_gets_what_was_asked_word_by_word(tmp_path: Path):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    request = options.parse(
        ["--hostfile", "h", "--ssh-port", "22", "--ssh-args", "-i 'my key'", "--master-port", "77",
         "--python", show(tmp_path), "--workdir", str(folder), "train.py", AWKWARD]
    )  # fmt: skip
    found = hosts.select(hosts.parse(HOSTS, "h"), ["node-0:1,3", "fe80::1"], [], "h")
    command = commands.ssh(request, found, 1, {"GREETING": AWKWARD})
    assert command[:5] == ["ssh", "-i", "my key", "-p", "22"] and command[-2] == "fe80::1"
    assert "BatchMode=yes" in command and "CUDA_VISIBLE_DEVICES" not in command[-1]
    done = subprocess.run(["/bin/sh", "-c", command[-1]], capture_output=True, text=True)
    arguments, greeting = json.loads(done.stdout)
    assert greeting == AWKWARD
    assert arguments[:4] == ["-m", "deepcompile.launch.node", "-m", "torch.distributed.run"]
    assert arguments[4:] == [
        *["--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "2"],
        *["--master-addr", "node-0", "--master-port", "77", "train.py", AWKWARD],
    ]
    first = commands.on_host(request, found, 0, {})
    assert "CUDA_VISIBLE_DEVICES=1,3 " in first and "--nproc-per-node 2" in first
    assert commands.master_address(request, "me@node-1") == "node-1"
    assert commands.master_address(request, "fe80::1") == "[fe80::1]"


def test_srun_gets_what_was_asked_word_by_word(tmp_path: Path):
    request = options.parse(
        ["--slurm", "--python", show(tmp_path), "--workdir", "/somewhere", "--env",
         f"GREETING={AWKWARD}", "--srun-args", "--mem=0 --gres='gpu:8'", "train.py", AWKWARD]
    )  # fmt: skip
    command = commands.srun(request, ["n1", "n2"], "8", {})
    assert command[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert command[4] == "--nodelist=n1,n2"
    assert {"--chdir=/somewhere", "--kill-on-bad-exit=1", "--mem=0", "--gres=gpu:8"} < {*command}
    environ = {**os.environ, "SLURM_PROCID": "1"}
    done = subprocess.run(command[-3:], capture_output=True, text=True, env=environ)
    arguments, greeting = json.loads(done.stdout)
    assert greeting == AWKWARD and arguments[2:6] == ["--nnodes", "2", "--node-rank", "1"]
    assert arguments[6:] == [
        *["--nproc-per-node", "8", "--master-addr", "n1", "--master-port", "29500"],
        *["train.py", AWKWARD],
    ]


def test_output_keeps_lines_apart(capfdbinary, tmp_path: Path):
    node = Output(b"[n1] ", None)
    for part in (b"one\ntw", b"o\r", b"\nbar 1\rbar 2\r", b"end"):
        node.write(part, False)
    node.close()
    expected = b"[n1] one\n[n1] two\r\n[n1] bar 1\r[n1] bar 2\r[n1] end\n"
    assert capfdbinary.readouterr().out == expected
    dealt = Labelled(outputs(["n0", "n1"], str(tmp_path / "logs")))
    dealt.write(b"0: first\n1: se", False)
    dealt.write(b"cond\nsrun: error\n 0: a: b", False)
    dealt.close()
    said = capfdbinary.readouterr()
    assert said.out == b"first\na: b\n" and said.err == b"srun: error\n"
    assert (tmp_path / "logs" / "n1.log").read_bytes() == b"second\n"
    with pytest.raises(UserError, match="--log-dir /dev/null/x: cannot be written"):
        outputs(["n0"], "/dev/null/x")


SAY = "os.write(1, f'rank {rank}\\n'.encode())"  # in one piece, since ranks share a pipe


class Cluster:
    """ssh and srun that run everything here; node "gone" has no ssh, "bare" no Python."""

    SSH = 'for last; do :; done\ncase "$*" in *" gone "*) echo No route to host >&2; exit 255;;\n'
    SSH += "*' bare '*) echo sh: python: not found >&2; exit 127;; esac\n"
    SSH += 'echo "a greeting"; exec /bin/sh -c "$last"'
    SRUN = 'for last; do :; done\nfor i in 0 1; do SLURM_PROCID=$i /bin/sh -c "$last" 2>&1 |'
    SRUN += " while IFS= read -r line; do printf '%s\\n' \"$i: $line\"; done & done; wait\n"
    SRUN += "echo srun: bye >&2; exit 9"

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = with_stand_in(folder)
        self.env["PATH"] = f"{folder}:{self.env['PATH']}"
        self.env["SLURM_JOB_NODELIST"] = "n[0-1]"
        program(folder, "ssh", self.SSH)
        program(folder, "srun", self.SRUN)
        program(folder, "scontrol", "echo n0; echo n1")

    def launch(self, names: str, script: str, *more: str, **env: str):
        hostfile, path = self.folder / "hosts", self.folder / "script.py"
        hostfile.write_text("".join(f"{name} slots=2\n" for name in names.split()))
        path.write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + script)
        nodes = ["--hostfile", str(hostfile)] if names else ["--slurm", "--nproc-per-node", "2"]
        command = [sys.executable, "-m", "deepcompile", "launch", *nodes, *more, str(path)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=100, env={**self.env, **env}
        )


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_a_job_over_ssh(cluster: Cluster):
    done = cluster.launch("n0 n1", SAY)
    assert done.returncode == 0, done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if "greeting" not in line)
    assert lines == ["[n1] rank 2", "[n1] rank 3", "rank 0", "rank 1"]


def test_the_first_failure_ends_the_others_and_gives_its_code(cluster: Cluster):
    done = cluster.launch("n0 n1 n2", "rank == 3 and sys.exit(5)\nrank < 2 and time.sleep(60)")
    assert done.returncode == 5, done.stderr
    assert done.stderr.splitlines()[0] == (
        "deepcompile launch: n1 ended with exit code 5; ending all nodes"
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("n0 gone", "[launch] gone: cannot be reached over ssh: No route to host. "),
        ("bare n0", "[launch] bare: could not start (exit code 127): sh: python: not found. "),
    ],
)
def test_nodes_that_do_not_start(cluster: Cluster, names: str, said: str):
    done = cluster.launch(names, "time.sleep(60)")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"deepcompile: error: {said}")


def test_a_job_under_slurm(cluster: Cluster):
    done = cluster.launch("", SAY)
    assert sorted(done.stdout.splitlines()) == ["[n1] rank 2", "[n1] rank 3", "rank 0", "rank 1"]
    assert "srun: bye" in done.stderr and done.returncode == 9
    none = cluster.launch("", "", PATH="/nowhere")
    assert "[launch] srun: cannot be run (No such file" in none.stderr and none.returncode == 2


def test_dry_run_prints_commands_and_starts_nothing(cluster: Cluster):
    over_ssh = cluster.launch("n0 n1", "1 / 0", "--dry-run", "--env", "A=b c")
    assert over_ssh.returncode == 0
    assert re.findall(r"^# .*", over_ssh.stdout, re.M) == ["# n0: 2 ranks", "# n1: 2 ranks"]
    assert over_ssh.stdout.count("A=b c") == 2
    assert len(re.findall(r"^ssh .* n[01] 'cd .*--node-rank [01] ", over_ssh.stdout, re.M)) == 2
    under_slurm = cluster.launch("", "1 / 0", "--dry-run", PATH="/nowhere")
    assert "# 2 nodes: n0, n1\nsrun --nodes=2 " in under_slurm.stdout
    assert '--node-rank "$SLURM_PROCID"' in under_slurm.stdout and under_slurm.returncode == 0


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "parent":
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
open(f"{__file__}.{sys.argv[1]}", "w").write(str(os.getpid()))
time.sleep(100)
"""


@pytest.mark.parametrize("how", ["closes", "falls silent"])
def test_a_node_ends_all_it_started_when_the_launcher_is_gone(tmp_path: Path, how: str):
    """Even processes that left their session and do not heed SIGTERM."""
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    code = "import sys; from deepcompile.launch import node; node.GRACE_S = node.SILENCE_S = 0.3; "
    code += "sys.exit(node.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(script), "parent"]
    node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with node:
        files = [Path(f"{script}.{name}") for name in ("parent", "child")]
        deadline = time.monotonic() + 30
        while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert node.stdout.readline() == "deepcompile: node started\n" and node.poll() is None
        if how == "closes":
            node.stdin.close()
        else:
            node.stdin.write(".")
            node.stdin.flush()
        assert node.wait(30) == 128 + signal.SIGKILL
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_nodes_exit_code_is_its_commands():
    for end, code in (("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("0", 0)):
        command = [sys.executable, "-m", "deepcompile.launch.node", "-c", f"import os, sys; {end}"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        ) as node:
            assert node.wait(30) == code
