"""Runs inside the sandbox under any Python 3: takes the limits, gives up the last rights, then runs /solution.py.

Argument: {"limits": {RLIMIT name: value}, "uid": int or null, "ready_fd": int, "function": name or null}. With a function,
standard input is the JSON list of its arguments and standard output its JSON result; what else it prints goes to stderr.
Standard library only; nothing of megatron_m1 is in the sandbox.
"""

import json
import os
import resource
import sys


def main() -> None:
    options = json.loads(sys.argv[1])
    for name, value in options["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if options["uid"] is not None:
        os.setgroups([])
        os.setresgid(options["uid"], options["uid"], options["uid"])
        os.setresuid(options["uid"], options["uid"], options["uid"])
    with open("/solution.py", encoding="utf-8") as file:
        source = file.read()
    os.write(options["ready_fd"], b"R")
    os.close(options["ready_fd"])
    sys.argv = ["/solution.py"]
    if options["function"] is None:
        exec(compile(source, "/solution.py", "exec"), {"__name__": "__main__"})
        return
    result_fd = os.dup(1)
    os.dup2(2, 1)
    arguments = json.load(sys.stdin)
    scope = {"__name__": "solution"}
    exec(compile(source, "/solution.py", "exec"), scope)
    result = json.dumps(scope[options["function"]](*arguments)).encode()
    with os.fdopen(result_fd, "wb") as output:
        output.write(result)


main()
