"""Programs that try to get out of the code sandbox, and what must hold afterwards.

`python -m tests.unit.rl.sandbox_escapes` prints a report; it exits 1 unless every case ran and held: where there is no
sandbox no case runs, and a case that did not run has not passed.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from megatron_m1.rl.rewards.sandbox import Sandbox, SandboxLimits, SandboxOutcome, SandboxUnavailable

SECRET = "secret-7741"
LIMITS = SandboxLimits(
    wall_s=10.0, cpu_s=1, memory_bytes=192 << 20, processes=8, file_bytes=2 << 20, output_bytes=100_000
)


@dataclass
class Host:
    """What the programs are after."""

    folder: Path
    port: int
    listener: socket.socket

    def untouched(self) -> bool:
        """Nobody connected, nobody wrote, the secret is as it was."""
        try:
            self.listener.accept()
            return False
        except BlockingIOError:
            return sorted(os.listdir(self.folder)) == ["file"] and (self.folder / "file").read_text() == SECRET


@contextmanager
def host() -> Iterator[Host]:
    """A folder with a secret open to all, a listening port, and a secret in this process's environment."""
    with TemporaryDirectory(prefix="m1_host_") as name, socket.create_server(("127.0.0.1", 0)) as listener:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "file").write_text(SECRET)
        (folder / "file").chmod(0o666)
        listener.setblocking(False)
        os.environ["M1_SECRET"] = SECRET
        try:
            yield Host(folder, listener.getsockname()[1], listener)
        finally:
            del os.environ["M1_SECRET"]


# {folder}, {port} and {pid} are the host's. TRY prints "ESCAPED what" if the action gives something true.
TRY = """
import os, signal, socket, subprocess, sys, time
def attempt(what, action):
    try:
        if action():
            print("ESCAPED", what)
    except (OSError, ValueError, MemoryError):
        pass
"""


def clean(outcome: SandboxOutcome) -> bool:
    """The program ran to its end and no attempt succeeded."""
    return outcome.exit_code == 0 and outcome.stdout == b"done\n"


def stopped(outcome: SandboxOutcome) -> bool:
    return outcome.exit_code != 0


def ended_by_wall_time(outcome: SandboxOutcome) -> bool:
    return stopped(outcome) and outcome.ended == "wall" and outcome.wall_s < 3.0


@dataclass(frozen=True)
class Case:
    """A program and what its outcome must satisfy; the host must be untouched and nothing left running in any case."""

    source: str
    holds: Callable[[SandboxOutcome], bool]
    limits: SandboxLimits = LIMITS


CASES = {
    "network": Case(
        TRY
        + """
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", {port}), timeout=1))
attempt("address", lambda: socket.create_connection(("1.1.1.1", 53), timeout=1))
attempt("name", lambda: socket.getaddrinfo("example.com", 80))
attempt("interfaces", lambda: [name for _, name in socket.if_nameindex() if name != "lo"])
attempt("raw", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
for family in set(range(64)) - {1, 2, 10, 16}:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        attempt("family %d" % family, lambda: socket.socket(family, kind))
print("done")
""",
        clean,
    ),
    "files outside": Case(
        TRY
        + """
attempt("read", lambda: open("{folder}/file").read())
attempt("list", lambda: os.listdir("{folder}"))
for path in ("/etc/passwd", "/etc/shadow", os.path.join("/root", ".bashrc"), "/home", "/var", "/sys", "/boot"):
    attempt(path, lambda: os.stat(path))
for folder in ("/", "/usr", "/usr/lib", "/dev", "/proc/sys/kernel", sys.prefix, "/root"):
    attempt("write " + folder, lambda: open(folder + "/x", "w"))
for path in ("/harness.py", "/solution.py", "/usr/bin/env", sys.executable):
    attempt("change " + path, lambda: open(path, "a"))
    attempt("remove " + path, lambda: os.unlink(path) is None)
    attempt("mode " + path, lambda: os.chmod(path, 0o777) is None)
attempt("device", lambda: os.mknod("d", 0o60666, os.makedev(8, 0)) is None)
attempt("disk", lambda: [n for n in os.listdir("/dev") if n.startswith(("sd", "vd", "nvme", "mem", "kmsg"))])
print("done")
""",
        clean,
    ),
    "symlinks": Case(
        TRY
        + """
os.symlink("{folder}/file", "link")
os.symlink("/proc/1/root{folder}/file", "link2")
os.symlink("../../../../..{folder}", "folder")
for name in ("link", "link2", "folder/file", "/proc/self/root{folder}/file", "/proc/1/cwd{folder}/file"):
    attempt(name, lambda: open(name).read())
    attempt("write " + name, lambda: open(name, "a"))
attempt("hard link", lambda: os.link("{folder}/file", "hard") is None)
print("done")
""",
        clean,
    ),
    "proc": Case(
        TRY
        + """
for pid in filter(str.isdigit, os.listdir("/proc")):
    for name in ("environ", "cmdline", "maps", "stack"):
        attempt(pid + name, lambda: b"secret-" + b"7741" in open("/proc/" + pid + "/" + name, "rb").read())
    if pid != str(os.getpid()):
        attempt(pid + " memory", lambda: open("/proc/" + pid + "/mem", "rb+"))
        attempt(pid + " files", lambda: os.listdir("/proc/" + pid + "/fd"))
        attempt(pid + " root", lambda: os.listdir(os.path.join("/proc", pid, "root", "home")))
attempt("host's process", lambda: os.stat("/proc/{pid}/cmdline") if {pid} > 100 else None)
attempt("more than two processes", lambda: sum(map(str.isdigit, os.listdir("/proc"))) > 2)
attempt("sysrq", lambda: open("/proc/sysrq-trigger", "w").write("h"))
attempt("sysctl", lambda: open("/proc/sys/kernel/hostname", "w").write("x"))
attempt("kcore", lambda: open("/proc/kcore", "rb").read(1))
attempt("oom", lambda: open("/proc/1/oom_score_adj", "w").write("-1000"))
print("done")
""",
        clean,
    ),
    "privileges": Case(
        TRY
        + """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for flag in (0x10000000, 0x00020000, 0x40000000):
    attempt("unshare %x" % flag, lambda: libc.unshare(flag) == 0)
    attempt("clone %x" % flag, lambda: libc.syscall(56, flag | 17, 0, 0, 0, 0) > 0 if os.uname().machine == "x86_64" else 0)
attempt("mount", lambda: libc.mount(b"none", b"/work", b"tmpfs", 0, None) == 0)
attempt("chroot", lambda: libc.chroot(b"/work") == 0)
attempt("trace", lambda: libc.ptrace(0, 0, 0, 0) == 0)
attempt("root", lambda: os.setuid(0) is None if os.getuid() else None)
attempt("group", lambda: os.setgroups([0]) is None)
attempt("hostname", lambda: socket.sethostname("x") is None)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
attempt("capabilities", lambda: int(status["CapEff"], 16) | int(status["CapPrm"], 16))
import resource
for name in ("RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CPU"):
    attempt(name, lambda: resource.setrlimit(getattr(resource, name), (-1, -1)) is None)
print("done")
""",
        clean,
    ),
    "signals": Case(
        TRY
        + """
attempt("host", lambda: os.kill({pid}, 9) is None if {pid} > 100 else None)
for number in range(1, 32):
    attempt("first process", lambda: os.kill(1, number) is None and not os.path.exists("/proc/1"))
time.sleep(0.1)
print("done", flush=True)
os.kill(-1, signal.SIGKILL)
os.killpg(0, signal.SIGKILL)
""",
        lambda outcome: stopped(outcome) and outcome.stdout == b"done\n",
    ),
    "fork bomb": Case(
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
        stopped,
        limits=replace(LIMITS, wall_s=0.8),
    ),
    "threads": Case(
        TRY
        + """
import threading
started = []
try:
    for _ in range(100):
        thread = threading.Thread(target=time.sleep, args=(5,), daemon=True)
        thread.start()
        started.append(thread)
except RuntimeError:
    pass
attempt("threads", lambda: len(started) >= 8)
print("done", flush=True)
os._exit(0)
""",
        clean,
        replace(LIMITS, memory_bytes=1 << 30),  # stacks and allocator arenas are address space
    ),
    "sleeping children": Case(
        TRY
        + """
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(s, signal.SIG_IGN)
            time.sleep(60)
        os._exit(0)
print("done", flush=True)
""",
        lambda outcome: clean(outcome) and outcome.wall_s < 5.0,
    ),
    "huge output": Case(
        "while True: print('x' * 10000)",
        lambda outcome: stopped(outcome) and outcome.ended == "output" and len(outcome.stdout) <= LIMITS.output_bytes,
    ),
    "huge errors": Case(
        "import os\nwhile True: os.write(2, b'x' * 10000)",
        lambda outcome: stopped(outcome) and outcome.ended == "output" and len(outcome.stderr) <= LIMITS.output_bytes,
    ),
    "memory": Case("x = bytearray(1 << 30)\nprint(len(x))", lambda o: stopped(o) and b"MemoryError" in o.stderr),
    "memory over processes": Case(
        "import os, time\nfor _ in range(3): os.fork()\nx = bytearray(100 << 20)\ntime.sleep(60)",
        lambda outcome: stopped(outcome) and outcome.ended == "memory",
    ),
    "memory that no limit counts": Case(
        TRY
        + """
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
BLOCK = 64 << 20
def system_v():
    kept = 0
    for _ in range(8):
        number = libc.shmget(0, ctypes.c_size_t(BLOCK), 0o1600)
        if number < 0:
            return kept
        address = libc.shmat(number, None, 0)
        if address not in (None, ctypes.c_void_p(-1).value):
            ctypes.memset(address, 1, BLOCK)
            libc.shmdt(ctypes.c_void_p(address))
        kept += 1
    return kept
def anonymous_files():
    for n in range(8):
        fd = os.memfd_create("x%d" % n)
        os.truncate(fd, 1 << 20)
        return fd
attempt("System V memory", system_v)
attempt("anonymous files", anonymous_files)
attempt("secret memory", lambda: libc.syscall(447, 0) >= 0)
attempt("message queue", lambda: libc.msgget(0, 0o1600) >= 0)
attempt("semaphores", lambda: libc.semget(0, 1, 0o1600) >= 0)
MQ_OPEN = {"x86_64": 240, "aarch64": 180}[os.uname().machine]
attempt("posix queue", lambda: libc.syscall(MQ_OPEN, b"q", os.O_CREAT | os.O_RDWR, 0o600, None) >= 0)
print("done")
""",
        clean,
    ),
    "disk": Case(
        TRY
        + """
def fill(folder):
    total = 0
    try:
        for i in range(100):
            with open(folder + "/f%d" % i, "wb") as file:
                for _ in range(10):
                    total += file.write(bytes(100_000))
                    file.flush()
    except OSError:
        pass
    return total > 3_000_000
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for folder in ("/work", "/tmp", "/dev/shm", "/dev", "/"):
    attempt(folder, lambda: fill(folder))
print("done")
""",
        clean,
    ),
    "busy loop": Case("while True: pass", lambda outcome: stopped(outcome) and outcome.ended == "exit"),
    "sleep": Case("import time\ntime.sleep(60)", ended_by_wall_time, replace(LIMITS, wall_s=0.5)),
}


def judge(sandbox: Sandbox, case: Case) -> str | None:
    """What did not hold; None if all did."""
    with host() as target:
        values = {"{folder}": str(target.folder), "{port}": str(target.port), "{pid}": str(os.getpid())}
        source = case.source
        for name, value in values.items():
            source = source.replace(name, value)
        usual = sandbox.limits
        sandbox.limits = case.limits
        try:
            outcome = sandbox.run(source)
        finally:
            sandbox.limits = usual
        if not case.holds(outcome):
            return f"outcome {outcome}"
        if not target.untouched():
            return "the host was reached"
    left = left_running()
    return f"left running: {left}" if left else None


def left_running(within_s: float = 1.0) -> list[int]:
    """Sandboxed processes below this one, or without a parent, that have not ended."""
    end = time.monotonic() + within_s
    while True:
        here = {child.pid for child in psutil.Process().children(recursive=True)}
        every = [p.info for p in psutil.process_iter(["pid", "ppid", "cmdline"])]
        sandboxed = [p for p in every if "/harness.py" in (p["cmdline"] or [])]
        left = [p["pid"] for p in sandboxed if p["pid"] in here or p["ppid"] == 1]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)


def main() -> int:
    """Print HELD, ESCAPED or NOT RUN for each case. Returns 0 only if all held."""
    python = None
    if "--unprivileged" in sys.argv[1:]:
        python = "/usr/bin/python3"
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    try:
        sandbox = Sandbox(LIMITS, python=python)
    except SandboxUnavailable as error:
        print(error)
        results = dict.fromkeys(CASES, "NOT RUN")
    else:
        results = {
            name: "ESCAPED: " + fault if (fault := judge(sandbox, case)) else "HELD" for name, case in CASES.items()
        }
    for name, result in results.items():
        print(f"{name:28} {result}")
    held = sum(result == "HELD" for result in results.values())
    print(f"{held} of {len(CASES)} held; {'PASSED' if held == len(CASES) else 'NOT PASSED'}")
    return 0 if held == len(CASES) else 1


if __name__ == "__main__":
    sys.exit(main())
