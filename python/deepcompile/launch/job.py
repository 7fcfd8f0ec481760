# SPDX-License-Identifier: Apache-2.0
"""Runs the processes that start a job's nodes, shows their output, ends them all together.

A member is an ssh to one host, or the srun of all nodes. The first failure ends the others
and gives the exit code; so does a signal. Whatever happens here, no member outlives run().
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import UserError
from .node import BEAT_S, GRACE_S, STARTED
from .output import Labelled, Output, outputs

STOP_S = GRACE_S + 10
"""How long members have to end once they were asked to, in seconds."""
ABANDON_S = 5
"""The same after an error here, when their output is no longer read."""
TICK_S = 0.1
CHUNKS = 16
"""Most reads of 64 KiB, a pipe's content, before another member's turn."""
SSH_FAILED = 255


@dataclass
class Member:
    """A process and where its output goes."""

    name: str
    command: Sequence[str]
    output: Output | Labelled
    announces: bool
    """Whether it says STARTED before anything else, and ends with its standard input."""
    process: subprocess.Popen | None = None
    started: bool = False
    held: dict[bool, bytes] = field(default_factory=lambda: {False: b"", True: b""})
    """Output from before it started: a shell's greeting, or why it could not."""

    def start(self) -> None:
        try:
            self.process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE if self.announces else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that the terminal's Ctrl-C comes to us alone
            )
        except OSError as error:
            raise UserError(
                f"[launch] {self.command[0]}: cannot be run ({error.strerror}). Install it."
            ) from None
        self.started = not self.announces

    def feed(self, data: bytes, is_error: bool) -> None:
        if self.started:
            self.output.write(data, is_error)
            return
        self.held[is_error] += data
        mark = f"{STARTED}\n".encode()
        before, found, after = self.held[False].partition(mark)
        if found:
            self.started = True
            self.output.write(before + after, False)
            self.output.write(self.held[True], True)

    def beat(self) -> None:
        """Lets its host know that we are here."""
        if self.announces and not self.process.stdin.closed:
            try:
                os.write(self.process.stdin.fileno(), b".")
            except (BrokenPipeError, BlockingIOError):
                pass  # it is ending, or has enough to read

    def stop(self) -> None:
        """Asks it to end, with all that it started."""
        if self.announces:
            self.process.stdin.close()
        elif self.process.poll() is None:
            self.process.terminate()

    def why_not_started(self, code: int) -> UserError:
        said = self.held[True].decode(errors="replace").strip().splitlines() or ["no reason given"]
        last = said[-1].strip().rstrip(".")
        if code == SSH_FAILED:
            return UserError(
                f"[launch] {self.name}: cannot be reached over ssh: {last}. "
                "`ssh -o BatchMode=yes` to it must work from here without a question."
            )
        return UserError(
            f"[launch] {self.name}: could not start (exit code {code}): {last}. The folder, Python "
            "and deepcompile must be there as they are here: see --workdir, --python, --env."
        )


class Job:
    """All members of a job."""

    def __init__(self, members: Sequence[Member]):
        self.members = list(members)
        self.code = 0
        self.error: UserError | None = None
        self.reason = ""
        self.deadline: float | None = None
        self.signals: list[int] = []
        self.selector = selectors.DefaultSelector()

    def run(self) -> int:
        """Runs all of them to their end; returns the exit code."""
        before = {
            number: signal.signal(number, lambda signum, _frame: self.signals.append(signum))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) is not signal.SIG_IGN  # as under nohup
        }
        try:
            for member in self.members:
                member.start()
                self._watch(member)
            self._until_all_ended()
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.error is not None:
            raise self.error
        if self.reason:  # again: the nodes' accounts of being ended stand between
            print(f"deepcompile launch: {self.reason}", file=sys.stderr, flush=True)
        return self.code

    def _watch(self, member: Member) -> None:
        if member.process.stdin is not None:
            os.set_blocking(member.process.stdin.fileno(), False)
        for pipe, is_error in ((member.process.stdout, False), (member.process.stderr, True)):
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe, selectors.EVENT_READ, (member, is_error))

    def _until_all_ended(self) -> None:
        running = list(self.members)
        beaten = 0.0
        while running:
            self._pump(TICK_S)
            if time.monotonic() - beaten > BEAT_S:
                beaten = time.monotonic()
                for member in running:
                    member.beat()
            for member in [m for m in running if m.process.poll() is not None]:
                running.remove(member)
                self._pump(0)  # what it said last; a pipe may stay open in a child of ssh's
                self._ended(member, member.process.returncode)
            self._obey(running)

    def _pump(self, timeout: float) -> None:
        for key, _ in self.selector.select(timeout) if self.selector.get_map() else ():
            member, is_error = key.data
            for _ in range(CHUNKS):
                try:
                    data = os.read(key.fd, 1 << 16)
                except BlockingIOError:
                    break
                if not data:
                    self.selector.unregister(key.fileobj)
                    break
                member.feed(data, is_error)
        if not self.selector.get_map():
            time.sleep(timeout)

    def _ended(self, member: Member, code: int) -> None:
        """Takes note of an end; the first bad one decides."""
        code = code if code >= 0 else 128 - code
        if self.deadline is not None or (code == 0 and member.started):
            return
        self.code = code or 1
        if not member.started:
            self.error = member.why_not_started(code)
        if member.announces and code == SSH_FAILED:
            self._stop(f"the connection to {member.name} was lost")
        else:
            self._stop(f"{member.name} ended with exit code {code}")

    def _obey(self, running: Sequence[Member]) -> None:
        """Signals: the first asks all to end, the second insists. Time over: as the second."""
        if self.signals and self.deadline is None:
            self.code = 128 + self.signals[0]
            self._stop(f"ended by {signal.Signals(self.signals[0]).name}")
        late = self.deadline is not None and time.monotonic() > self.deadline
        if late or len(self.signals) > 1:
            for member in running:
                member.process.kill()

    def _stop(self, reason: str) -> None:
        self.reason = reason
        if len(self.members) > 1 and not self.error:
            text = f"deepcompile launch: {reason}; ending all nodes"
            print(text, file=sys.stderr, flush=True)
        self.deadline = time.monotonic() + STOP_S
        for member in self.members:
            member.stop()

    def _end_all(self) -> None:
        """Leaves nothing behind, also after an error of ours. A killed ssh ends its host's part."""
        for member in self.members:
            if member.process is not None:
                member.stop()
        for member in self.members:
            if member.process is not None:
                try:
                    member.process.wait(ABANDON_S)
                except subprocess.TimeoutExpired:
                    member.process.kill()
                    member.process.wait()
                member.process.stdout.close()
                member.process.stderr.close()
        self.selector.close()
        for member in self.members:
            member.output.close()


def over_ssh(
    names: Sequence[str], commands: Sequence[Sequence[str]], log_dir: str | None
) -> list[Member]:
    """One member a host."""
    to = outputs(names, log_dir)
    return [
        Member(name, command, output, announces=True)
        for name, command, output in zip(names, commands, to, strict=True)
    ]


def under_srun(names: Sequence[str], command: Sequence[str], log_dir: str | None) -> Member:
    """The one member that starts all nodes; its lines say which node they are from."""
    return Member("srun", command, Labelled(outputs(names, log_dir)), announces=False)
