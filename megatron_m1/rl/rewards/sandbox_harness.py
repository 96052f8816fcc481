"""The first process of the sandbox, under any Python 3: takes the limits, gives up the last rights, runs /solution.py.

Argument: {"limits": {RLIMIT name: value}, "uid": int or null, "ready_fd", "lifeline_fd": int, "function": name or null}.
With a function, standard input is the JSON list of its arguments and standard output its JSON result; what else it prints
goes to stderr. When the other end of lifeline_fd closes, the sandbox ends.
The program is a child: the kernel lets nothing inside signal this first process, nothing can look into it as it is not
dumpable, and when it ends, all others are killed. Standard library only; nothing of megatron_m1 is in the sandbox.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import threading

PR_SET_DUMPABLE = 4


def main() -> None:
    options = json.loads(sys.argv[1])
    with open("/solution.py", encoding="utf-8") as file:
        source = file.read()
    libc = ctypes.CDLL(None)
    for name, value in options["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if options["uid"] is not None:
        os.setgroups([])
        os.setresgid(options["uid"], options["uid"], options["uid"])
        os.setresuid(options["uid"], options["uid"], options["uid"])
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_DUMPABLE) failed")
    # With a handler (Python's for SIGINT) the first process could be signalled from inside.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    program = os.fork()
    os.write(options["ready_fd"], b"R")
    os.close(options["ready_fd"])
    if program == 0:
        os.close(options["lifeline_fd"])
        run(source, options["function"])
        return
    # Not PR_SET_PDEATHSIG: bwrap, its capabilities dropped, may not signal another user.
    threading.Thread(target=end_with_owner, args=(options["lifeline_fd"],), daemon=True).start()
    while True:
        pid, status = os.wait()
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def end_with_owner(lifeline_fd: int) -> None:
    os.read(lifeline_fd, 1)
    os._exit(1)


def run(source: str, function: str | None) -> None:
    sys.argv = ["/solution.py"]
    if function is None:
        exec(compile(source, "/solution.py", "exec"), {"__name__": "__main__"})
        return
    result_fd = os.dup(1)
    os.dup2(2, 1)
    arguments = json.load(sys.stdin)
    scope: dict = {"__name__": "solution"}
    exec(compile(source, "/solution.py", "exec"), scope)
    result = json.dumps(scope[function](*arguments)).encode()
    with os.fdopen(result_fd, "wb") as output:
        output.write(result)


if __name__ == "__main__":
    main()
