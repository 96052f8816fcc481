"""A sandbox for Python programs that nobody has read: bubblewrap namespaces, a seccomp filter, resource limits.

Inside there is /usr and the interpreter (read-only), a private writable /work, and nothing else: no network, no other
process, no environment, no capability. There is no weaker mode: a machine that cannot provide this gets SandboxUnavailable.
"""

import contextlib
import json
import math
import os
import platform
import secrets
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from megatron_m1.config.errors import ConfigError
from megatron_m1.rl.rewards.seccomp import ARCHITECTURES, filter_program

__all__ = [
    "Sandbox",
    "SandboxError",
    "SandboxLimits",
    "SandboxOutcome",
    "SandboxUnavailable",
    "probe_sandbox",
    "sandbox_faults",
]

HARNESS = Path(__file__).with_name("sandbox_harness.py")
PROBE = Path(__file__).with_name("sandbox_probe.py")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/work",
    "TMPDIR": "/work",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}
POLL_S = 0.02
PROBE_PROCESSES = 8
# Started as root, each run gets a user id of its own, so RLIMIT_NPROC (not enforced for root) counts its processes alone.
FIRST_UID, UIDS = 1 << 30, 1 << 29
REMEDY = "install Debian's or Ubuntu's package `bubblewrap` (0.6 or newer) and allow user namespaces, or leave the code reward out"


class SandboxUnavailable(ConfigError):
    """This machine cannot provide the sandbox; the message says what is missing."""


class SandboxError(RuntimeError):
    """A run did not reach the program: the sandbox's fault, no verdict on the program."""


@dataclass(frozen=True)
class SandboxLimits:
    """Per run. memory_bytes: address space of each process, and resident memory of all together. file_bytes: the size of a
    file and of all of /work. processes: threads count too. cpu_s: of each process; wall_s ends them all."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 512 << 20
    processes: int = 16
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class SandboxOutcome:
    """exit_code is 128 + n for a program killed by signal n. ended: by itself (also by a signal or its CPU limit), or stopped
    for wall time, output or memory; then exit_code is not 0."""

    exit_code: int
    ended: Literal["exit", "wall", "output", "memory"]
    stdout: bytes
    stderr: bytes
    wall_s: float


class Sandbox:
    """Runs Python programs, one at a time. Making one tests the machine. Raises SandboxUnavailable.

    python: interpreter inside the sandbox; by default the one this runs under (its base, without site-packages).
    """

    def __init__(self, limits: SandboxLimits | None = None, *, python: str | None = None) -> None:
        self.limits = limits or SandboxLimits()
        self._python = _interpreter(python)
        faults = probe_sandbox(python=str(self._python))
        if faults:
            raise SandboxUnavailable(f"No sandbox for code: {'; '.join(faults)}; {REMEDY}.")

    def run(
        self, source: str, *, stdin: bytes = b"", function: str | None = None, wall_s: float = math.inf
    ) -> SandboxOutcome:
        """Run a program with `stdin`; with `function`, call it with the JSON list in stdin, its JSON result being stdout.

        wall_s: for this run, if it is less than the limit.
        Each run has a fresh sandbox; all its processes have ended when this returns. Raises SandboxError.
        """
        limits = replace(self.limits, wall_s=min(wall_s, self.limits.wall_s))
        return _run(self._python, limits, source, stdin=stdin, function=function)


def probe_sandbox(*, python: str | None = None) -> list[str]:
    """What keeps this machine from sandboxing code, found by running a program that tries to get out; empty: nothing."""
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return [f"{sys.platform} on {platform.machine()} is not supported (Linux on {' or '.join(ARCHITECTURES)} is)"]
    if shutil.which("bwrap") is None:
        return ["bwrap is not on PATH"]
    path = _interpreter(python)
    outside = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("net", "pid", "mnt", "ipc")}
    limits = SandboxLimits(processes=PROBE_PROCESSES)
    try:
        outcome = _run(path, limits, PROBE.read_text(), stdin=b"", function=None)
        if outcome.exit_code != 0:
            raise SandboxError(
                f"{outcome.ended}, exit code {outcome.exit_code}: {outcome.stderr[-500:].decode().strip()}"
            )
        facts = json.loads(outcome.stdout)
    except (SandboxError, ValueError, OSError) as error:
        return [f"a program did not run in bwrap ({error})"]
    return sandbox_faults(facts, outside)


def sandbox_faults(facts: Mapping[str, Any], outside: Mapping[str, str]) -> list[str]:
    """What is wrong with a sandbox in which sandbox_probe.py found `facts`; outside: this process's namespaces."""
    found = [f"it shares the {name} namespace" for name, seen in facts["namespaces"].items() if seen == outside[name]]
    status = facts["status"]
    found += [f"it has {name} {status[name]}" for name in ("CapEff", "CapPrm") if int(status[name], 16)]
    if status["NoNewPrivs"] != "1" or status["Seccomp"] != "2":
        found.append("its program may gain privileges or has no seccomp filter")
    if facts["interfaces"] not in ([], ["lo"]):
        found.append(f"it has the network interfaces {facts['interfaces']}")
    if facts["processes"] > 2:
        found.append(f"it sees {facts['processes']} processes")
    if not set(facts["environment"]) <= {*ENVIRONMENT, "LC_CTYPE", "PWD"}:
        found.append(f"its environment has {facts['environment']}")
    if facts["writable"] != ["/work"]:
        found.append(f"{facts['writable']} can be written, not just /work")
    if facts["new_namespaces"]:
        found.append(f"it can make {facts['new_namespaces']} namespaces")
    if facts["forks"] >= PROBE_PROCESSES:
        found.append(f"its limit of {PROBE_PROCESSES} processes does not hold")
    return found


def _interpreter(python: str | None) -> Path:
    """The real file of the given interpreter, or of the one below this process's virtual environment."""
    return Path(python or getattr(sys, "_base_executable", None) or sys.executable).resolve()


def _run(python: Path, limits: SandboxLimits, source: str, *, stdin: bytes, function: str | None) -> SandboxOutcome:
    uid = FIRST_UID + secrets.randbelow(UIDS) if os.geteuid() == 0 else None
    ready, ready_inside = os.pipe()
    lifeline_inside, lifeline = os.pipe()
    sealed = [_memory_file(data) for data in (HARNESS.read_bytes(), source.encode(errors="replace"), filter_program())]
    given = _memory_file(stdin)
    options = {
        "limits": {
            "RLIMIT_CPU": limits.cpu_s,
            "RLIMIT_AS": limits.memory_bytes,
            # and the harness's two threads
            "RLIMIT_NPROC": limits.processes + 2,
            "RLIMIT_FSIZE": limits.file_bytes,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        },
        "uid": uid,
        "ready_fd": ready_inside,
        "lifeline_fd": lifeline_inside,
        "function": function,
    }
    program = [str(python), "-I", "-S", "-B", "/harness.py", json.dumps(options)]
    started = time.monotonic()
    try:
        # No environment: bwrap's own could be read in /proc/1/environ.
        process = subprocess.Popen(
            [*_bwrap(python, limits, *sealed, drop_uid=uid is not None), "--", *program],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(*sealed, ready_inside, lifeline_inside),
            env={},
        )
    finally:
        for fd in (*sealed, given, ready_inside, lifeline_inside):
            os.close(fd)
    try:
        ended, (stdout, stderr) = _watch(process, limits, started)
        wall_s = time.monotonic() - started
        if os.read(ready, 1) != b"R":
            raise SandboxError(
                f"bwrap ended with {process.returncode}: {stderr[-500:].decode(errors='replace').strip()}"
            )
    finally:
        _kill(process)
        os.close(ready)
        os.close(lifeline)
    return SandboxOutcome(process.returncode, ended, stdout, stderr, wall_s)


def _bwrap(
    python: Path, limits: SandboxLimits, harness: int, source: int, seccomp: int, *, drop_uid: bool
) -> list[str]:
    """The command up to the program. The three files are descriptors."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += [
        "--unshare-cgroup-try",
        "--as-pid-1",
        "--die-with-parent",
        "--new-session",
        "--hostname",
        "sandbox",
        "--clearenv",
    ]
    # The harness drops to a user id of its own, for which it keeps two capabilities that go with the old one.
    command += [
        "--cap-drop",
        "ALL",
        *(["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if drop_uid else ["--unshare-user"]),
    ]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(name):
            command += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            command += ["--ro-bind", name, name]
    prefix = python.parent.parent
    if not prefix.is_relative_to("/usr"):
        # Made here, or bwrap would give them the modes outside, which may be a home's 0700.
        for folder in reversed([folder for folder in prefix.parents if folder != Path("/")]):
            command += ["--perms", "0755", "--dir", str(folder)]
        command += ["--ro-bind", str(prefix), str(prefix)]
    size = ["--perms", "1777", "--size", str(limits.file_bytes)]
    command += ["--proc", "/proc", "--dev", "/dev", *size, "--tmpfs", "/dev/shm", *size, "--tmpfs", "/work"]
    command += ["--symlink", "work", "/tmp", "--perms", "0444", "--ro-bind-data", str(harness), "/harness.py"]
    command += ["--perms", "0444", "--ro-bind-data", str(source), "/solution.py"]
    command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/work", "--seccomp", str(seccomp)]
    return command


def _watch(
    process: subprocess.Popen, limits: SandboxLimits, started: float
) -> tuple[Literal["exit", "wall", "output", "memory"], tuple[bytes, bytes]]:
    """Read both outputs until the program ends or breaks a limit that the kernel does not hold; then all of it is killed."""
    assert process.stdout is not None and process.stderr is not None
    output: dict[IO[bytes], bytes] = {process.stdout: b"", process.stderr: b""}
    ended: Literal["exit", "wall", "output", "memory"] = "exit"
    with selectors.DefaultSelector() as selector, process.stdout, process.stderr:
        for pipe in output:
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)
        while ended == "exit" and selector.get_map():
            for key, _ in selector.select(POLL_S):
                chunk = os.read(key.fd, 1 << 16)
                output[key.fileobj] += chunk  # type: ignore[index]
                if not chunk:
                    selector.unregister(key.fileobj)
            if time.monotonic() - started > limits.wall_s:
                ended = "wall"
            elif max(map(len, output.values())) > limits.output_bytes:
                ended = "output"
            elif _resident_bytes(process.pid) > limits.memory_bytes:
                ended = "memory"
        if ended != "exit":
            _kill(process)
    # The pipes close when the last process inside has gone: when the first one ends, the kernel kills the others.
    process.wait()
    stdout, stderr = (data[: limits.output_bytes] for data in output.values())
    return ended, (stdout, stderr)


def _kill(process: subprocess.Popen) -> None:
    """Kill the sandbox's first process, with which all others go, and let bwrap reap it; bwrap itself if it does not end."""
    try:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
    except psutil.NoSuchProcess:
        children = []
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    try:
        process.wait(timeout=1.0 if children else 0.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _resident_bytes(pid: int) -> int:
    """Resident memory of all descendants, pages shared between them counted in each."""
    total = 0
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    for child in children:
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("sandbox")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
