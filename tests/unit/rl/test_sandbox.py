"""The code sandbox and the code reward. Failing closed is tested everywhere; what needs a sandbox only where there is one."""

import json
import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_m1.config.errors import ConfigError
from megatron_m1.rl.rewards import sandbox as module
from megatron_m1.rl.rewards.code import CodeReward, last_code_block
from megatron_m1.rl.rewards.pool import RewardPool
from megatron_m1.rl.rewards.protocol import RewardRequest, RewardSpec
from megatron_m1.rl.rewards.sandbox import Sandbox, SandboxError, SandboxUnavailable, probe_sandbox, sandbox_faults
from megatron_m1.rl.rewards.seccomp import filter_program
from tests.unit.rl import sandbox_escapes
from tests.unit.rl.sandbox_escapes import CASES, LIMITS, SECRET, judge

ROOT = Path(__file__).parents[3]
FAULTS = probe_sandbox()
if FAULTS:
    warnings.warn(f"The sandbox suite does NOT RUN here and has NOT PASSED: {'; '.join(FAULTS)}", stacklevel=1)
needs_sandbox = pytest.mark.skipif(bool(FAULTS), reason=f"NOT RUN, NOT PASSED, no sandbox: {'; '.join(FAULTS)}")


def test_on_ci_a_skipped_suite_is_a_failed_one():
    if os.environ.get("CI") == "true" and shutil.which("bwrap"):
        assert not FAULTS, "bubblewrap is there, but makes no sandbox"


class TestTheRunner:
    """tests/bubblewrap.sh with a PATH of its own: no bwrap, an apt-get that writes down what it was asked."""

    APT = '#!/bin/bash\necho "$@" >>log\n[[ "$*" == *update* ]] || {install}\n'

    def run(self, folder: Path, *, install: str | None, ci: str = "true", user: int = 0) -> tuple[str, list[str]]:
        scripts = {"id": f"#!/bin/bash\necho {user}\n"}
        if install is not None:
            scripts["apt-get"] = self.APT.replace("{install}", install)
        for name, script in scripts.items():
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        for name in ("env", "timeout", "bash", "cp", "chmod"):
            (folder / name).symlink_to(shutil.which(name))
        steps = f"set -euo pipefail; source {ROOT}/tests/bubblewrap.sh; install_bubblewrap; echo tests; report_sandbox {sys.executable}"
        done = subprocess.run(
            [shutil.which("bash"), "-c", steps],
            cwd=folder,
            env={"PATH": str(folder), "CI": ci},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        asked = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
        return done.stdout, asked

    MISSING = "sandbox suite: NOT RUN, NOT PASSED (bubblewrap is missing: apt-get install bubblewrap)"

    def test_ci_installs_it_and_goes_on_if_that_fails(self, tmp_path):
        shown, asked = self.run(tmp_path, install="exit 100")
        assert ["install" in line for line in asked] == [True, False, True] and "update" in asked[1]
        assert shown.splitlines() == [
            "== bubblewrap", "apt-get install bubblewrap failed; the tests go on without it", "tests", self.MISSING,
        ]  # fmt: skip

    def test_a_bwrap_that_makes_no_sandbox_is_no_pass(self, tmp_path):
        shown, asked = self.run(tmp_path, install="{ cp id bwrap; }")
        assert len(asked) == 1 and "failed" not in shown
        assert shown.splitlines()[-1].startswith("sandbox suite: NOT RUN, NOT PASSED (a program did not run in bwrap")

    @pytest.mark.parametrize("how", [{"ci": ""}, {"user": 1000}, {"install": None}])
    def test_elsewhere_nothing_is_installed_and_the_last_line_says_so(self, tmp_path, how):
        shown, asked = self.run(tmp_path, **({"install": "exit 1"} | how))
        assert asked == [] and shown.splitlines() == ["tests", self.MISSING]

    @needs_sandbox
    def test_where_it_runs_nothing_is_said(self, tmp_path):
        (tmp_path / "bwrap").symlink_to(shutil.which("bwrap"))
        assert self.run(tmp_path, install="exit 1") == ("tests\n", [])

    def test_the_tests_run_between_the_two(self):
        script = (ROOT / "tests/run.sh").read_text()
        places = [
            script.index(part) for part in ("\ninstall_bubblewrap\n", 'step "pytest"', '\nreport_sandbox "$PYTHON"\n')
        ]
        assert places == sorted(places)


SOUND = {
    "namespaces": {"net": "net:[2]", "pid": "pid:[2]"},
    "status": {"CapEff": "0000", "CapPrm": "0000", "NoNewPrivs": "1", "Seccomp": "2"},
    "interfaces": ["lo"],
    "processes": 2,
    "environment": ["HOME", "PATH"],
    "writable": ["/work"],
    "new_namespaces": [],
    "forks": 7,
}


def fake_bwrap(folder: Path, script: str) -> str:
    """A PATH whose bwrap is this script."""
    path = folder / "bwrap"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(folder)


# Reads the harness and the program that bwrap would have shown, and runs them with no isolation at all (but as the same
# user, and trying to write in one folder only: it is the real one).
NO_ISOLATION = r"""
import os, re, sys
args = sys.argv
given = {args[i + 2]: os.read(int(args[i + 1]), 1 << 20).decode() for i, a in enumerate(args) if a == "--ro-bind-data"}
open("solution.py", "w").write(re.sub(r'\("/", .*?\)', '("/work",)', given["/solution.py"]))
harness = given["/harness.py"].replace("/solution.py", os.path.abspath("solution.py"))
program = args[args.index("--") + 1 :]
os.execv(program[0], [program[0], "-I", "-c", harness, re.sub(r'"uid": \d+', '"uid": null', program[-1])])
"""


class TestFailingClosed:
    def test_without_bwrap_nothing_runs_and_the_error_says_what_to_do(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(
            SandboxUnavailable, match=r"bwrap is not on PATH.*install Debian's or Ubuntu's package `bubblewrap`"
        ):
            Sandbox()
        with pytest.raises(ConfigError, match="bwrap is not on PATH"):
            RewardPool({"code": RewardSpec("megatron_m1.rl.rewards.code:CodeReward")}, workers=1)

    def test_without_user_namespaces_nothing_runs(self, monkeypatch, tmp_path):
        script = "import sys\nsys.exit('bwrap: No permissions to create new namespace')"
        monkeypatch.setenv("PATH", fake_bwrap(tmp_path, script))
        with pytest.raises(SandboxUnavailable, match="No permissions to create new namespace"):
            Sandbox()

    def test_a_bwrap_that_isolates_nothing_is_found_out(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", fake_bwrap(tmp_path, NO_ISOLATION))
        with pytest.raises(SandboxUnavailable, match="it shares the net namespace"):
            Sandbox()

    @pytest.mark.parametrize(
        "change, words",
        [
            ({"namespaces": {"net": "net:[1]", "pid": "pid:[2]"}}, "shares the net namespace"),
            ({"status": {**SOUND["status"], "CapEff": "0040"}}, "CapEff"),
            ({"status": {**SOUND["status"], "Seccomp": "0"}}, "seccomp"),
            ({"status": {**SOUND["status"], "NoNewPrivs": "0"}}, "privileges"),
            ({"interfaces": ["eth0", "lo"]}, "eth0"),
            ({"processes": 90}, "90 processes"),
            ({"environment": ["AWS_KEY"]}, "AWS_KEY"),
            ({"writable": ["/usr", "/work"]}, "/usr"),
            ({"writable": []}, "can be written"),
            ({"new_namespaces": ["user"]}, "user"),
            ({"forks": 64}, "limit of 8 processes"),
        ],
    )
    def test_each_fault_that_the_probe_can_find_is_one(self, change, words):
        outside = {"net": "net:[1]", "pid": "pid:[1]"}
        assert sandbox_faults(SOUND, outside) == []
        assert any(words in fault for fault in sandbox_faults({**SOUND, **change}, outside))

    def test_the_report_counts_what_did_not_run_as_not_passed(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["report"])
        assert sandbox_escapes.main() == 1
        report = capsys.readouterr().out
        assert report.count("NOT RUN") == len(CASES) and f"0 of {len(CASES)} held; NOT PASSED" in report

    def test_the_filter_exists_for_both_architectures_only(self):
        assert (
            len(filter_program("x86_64")) == len(filter_program("aarch64")) and len(filter_program("x86_64")) % 8 == 0
        )
        assert filter_program("x86_64") != filter_program("aarch64")
        with pytest.raises(KeyError):
            filter_program("riscv64")


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(LIMITS)


@needs_sandbox
@pytest.mark.parametrize("name", CASES)
def test_escapes_are_held(sandbox, name):
    assert judge(sandbox, CASES[name]) is None
    assert sandbox.limits == LIMITS, "the next test's too"


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="the suite above ran unprivileged")
@pytest.mark.skipif(
    not Path("/usr/bin/python3").exists(), reason="NOT RUN, NOT PASSED unprivileged: no /usr/bin/python3"
)
def test_escapes_are_held_by_an_unprivileged_sandbox():
    command = [sys.executable, "-m", "tests.unit.rl.sandbox_escapes", "--unprivileged"]
    report = subprocess.run(command, capture_output=True, text=True)
    if "NOT RUN" in report.stdout:
        pytest.skip(f"NOT RUN, NOT PASSED: {report.stdout.splitlines()[0]}")
    assert report.returncode == 0, report.stdout + report.stderr


@needs_sandbox
class TestRuns:
    def test_programs_get_their_input_and_a_working_folder(self, sandbox):
        source = "import os\nopen('x', 'w').write('y')\nprint(input()[::-1], os.getcwd(), os.listdir())"
        assert sandbox.run(source, stdin=b"abc\n").stdout == b"cba /work ['x']\n"
        assert sandbox.run("import os\nprint(os.listdir())").stdout == b"[]\n"

    def test_functions_are_called_and_what_they_print_is_no_result(self, sandbox):
        outcome = sandbox.run("def f(a, b):\n print('noise')\n return (a, b)", stdin=b'[1, "x"]', function="f")
        assert (outcome.stdout, outcome.stderr, outcome.exit_code) == (b'[1, "x"]', b"noise\n", 0)

    def test_exit_codes(self, sandbox):
        assert sandbox.run("raise SystemExit(3)").exit_code == 3
        assert sandbox.run("import os\nos.kill(os.getpid(), 9)").exit_code == 137
        assert b"ZeroDivisionError" in sandbox.run("1 / 0").stderr

    def test_a_sandbox_that_fails_is_an_error_and_no_verdict(self, sandbox, monkeypatch, tmp_path):
        monkeypatch.setenv("PATH", fake_bwrap(tmp_path, "raise SystemExit('bwrap: broken')"))
        with pytest.raises(SandboxError, match="bwrap: broken"):
            sandbox.run("print(1)")
        with pytest.raises(SandboxError):
            module._run(Path("/no/python"), LIMITS, "", stdin=b"", function=None)


ADD = "```python\ndef add(a, b):\n    return a + b\n```"
CALLS = [
    {"function": "add", "arguments": [1, 2], "expected": 3},
    {"function": "add", "arguments": [[1], [2]], "expected": [1, 2]},
]
LINES = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10"}]


@pytest.fixture(scope="module")
def reward() -> CodeReward:
    return CodeReward(limits={"wall_s": 2.0, "cpu_s": 1})


def block(source: str) -> str:
    return f"<think>hm</think>Here:\n```python\n{source}\n```\n"


@needs_sandbox
@pytest.mark.parametrize(
    "response, tests, value, passed",
    [
        (f"<think>hm</think>{ADD}", CALLS, 1, 1.0),
        (block("print(sum(map(int, input().split())))"), LINES, 1, 1.0),
        (block("print(3)"), LINES, 0, 0.5),
        (block("def add(a, b):\n    return a - b"), CALLS, 0, 0.0),
        (f"<think>{ADD}</think>I do not know", CALLS, 0, 0.0),
        (f"<think>{ADD}", CALLS, 0, 0.0),
        (block("def other(): pass"), CALLS, 0, 0.0),
        (block("syntax error"), CALLS, 0, 0.0),
        (block("x = '\ud800 \0'"), CALLS, 0, 0.0),
        (block("def add(a, b):\n    while True: pass"), CALLS, 0, 0.0),
        (block("def add(a, b):\n    return object()"), CALLS, 0, 0.0),
        (block("import sys\nsys.exit(0)"), CALLS, 0, 0.0),
        (block("import os\nos._exit(0)"), LINES, 0, 0.0),
        (block("class Yes:\n    __eq__ = lambda a, b: True\ndef add(a, b):\n    return Yes()"), CALLS, 0, 0.0),
        (block("def add(a, b):\n    return True"), [{"function": "add", "arguments": [0, 1], "expected": 1}], 0, 0.0),
    ],
)
def test_code_reward(reward, response, tests, value, passed):
    score = reward(RewardRequest("code", "", response, {"tests": tests}))
    assert (score.value, score.parts["passed_share"]) == (value, passed)


# Looks for the expected result wherever a program can: files, other processes, its own memory and frames.
SEARCH = """
import gc, os, sys
def secret():
    found = []
    for folder, _, names in os.walk("/"):
        if folder.startswith(("/usr", "/sys", sys.prefix)):
            continue
        for name in names:
            try:
                if os.path.getsize(folder + "/" + name) < 1 << 20:
                    fd = os.open(folder + "/" + name, os.O_RDONLY | os.O_NONBLOCK)
                    found.append(os.read(fd, 1 << 16))
                    os.close(fd)
            except OSError:
                pass
    frame = sys._getframe()
    while frame:
        found.append(repr((frame.f_locals, frame.f_globals)).encode())
        frame = frame.f_back
    found += [repr(o)[:5000].encode() for o in gc.get_objects() if isinstance(o, (dict, list, str))]
    for text in found:
        at = text.find(b"secret" + b"-")
        if at >= 0:
            return text[at : at + 11].decode()
    return "not found"
"""


@needs_sandbox
def test_the_tests_cannot_be_read(reward):
    task = {"tests": [{"function": "secret", "arguments": [], "expected": SECRET}]}
    outcome = reward.sandbox.run(SEARCH, stdin=b"[]", function="secret")
    assert json.loads(outcome.stdout) == "not found", outcome
    assert reward(RewardRequest("code", "", block(SEARCH), task)).value == 0
    shown = block(SEARCH + f"\nhint = '{SECRET}'")
    assert reward(RewardRequest("code", "", shown, task)).value == 1, "the search finds what is there"


@needs_sandbox
def test_code_reward_in_the_pool():
    spec = RewardSpec("megatron_m1.rl.rewards.code:CodeReward", {"limits": {"wall_s": 1.0}})
    hang = block("import time\ntime.sleep(60)")
    with RewardPool({"code": spec}, workers=2, timeout_s=5.0) as pool:
        good, bad = (RewardRequest("code", "", r, {"tests": CALLS}) for r in (f"<think>hm</think>{ADD}", hang))
        assert [result.value for result in pool.score([good, bad, good])] == [1.0, 0.0, 1.0]
        assert "at least one test" in pool.score([RewardRequest("code", "", ADD, {"tests": []})])[0].reward_error


@needs_sandbox
@pytest.mark.parametrize(
    "source, passed",
    [
        ("import time\nprint(sum(map(int, input().split())))\ntime.sleep(0.5)", 0.05),
        ("while True: pass", 0.0),
        ("import time\ntime.sleep(60)", 0.0),
    ],
)
def test_programs_too_slow_for_all_their_tests_get_0_and_no_error(source, passed):
    slow = RewardRequest("code", "", block(source), {"tests": LINES * 10})
    with RewardPool({"code": RewardSpec("megatron_m1.rl.rewards.code:CodeReward")}, workers=1, timeout_s=3.0) as pool:
        (result,) = pool.score([slow])
        assert result.reward_error is None and result.value == 0.0 and pool.replaced == 0
        assert passed <= result.score.parts["passed_share"] < 0.5 and result.score.parts["out_of_time"] == 1.0


@needs_sandbox
def test_a_test_that_may_outlast_the_pool_is_refused():
    spec = RewardSpec("megatron_m1.rl.rewards.code:CodeReward", {"limits": {"wall_s": 8.0}})
    with pytest.raises(ConfigError, match=r"may take 10 s.*killed after rl.reward_timeout_s=10; raise that or lower"):
        RewardPool({"code": spec}, workers=1, timeout_s=10.0)


@needs_sandbox
def test_killing_a_worker_ends_its_sandbox():
    spec = RewardSpec("tests.unit.rl.reward_cases:PatientWithCode")
    hang = block("import os, time\nos.fork()\ntime.sleep(60)")
    with RewardPool({"code": spec}, workers=1, timeout_s=0.7, max_error_share=1.0) as pool:
        assert "killed after" in pool.score([RewardRequest("code", "", hang, {"tests": CALLS})])[0].reward_error
        assert sandbox_escapes.left_running() == []


def test_last_code_block():
    assert last_code_block("```python\na\n```\ntext\n```\nb\n```") == "b\n"
    assert last_code_block("```cpp\na\n```") is None
    assert last_code_block("```python\na\n```\n```cpp\nb\n```") == "a\n"
    assert last_code_block("```python\na\n```\n```python\nb") == "a\n"
    assert last_code_block("```python\n" * 200_000) is None
    assert last_code_block("```python\na") is None
    assert last_code_block("no code") is None
    with pytest.raises(ValueError, match="limits"):
        CodeReward(limits={"wall": 1})
