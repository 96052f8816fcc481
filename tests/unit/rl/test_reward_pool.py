import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_m1.config.errors import ConfigError
from megatron_m1.rl.rewards.pool import RewardPool, TooManyRewardErrors
from megatron_m1.rl.rewards.protocol import RewardRequest, RewardSpec

SPEC = {"r": RewardSpec("tests.unit.rl.reward_cases:Misbehaving", {"base": 1.0})}


@pytest.fixture(scope="module")
def pool():
    with RewardPool(SPEC, workers=2, timeout_s=0.5, memory_bytes=2 << 30, max_error_share=1.0) as pool:
        yield pool


def ask(response: str, **task) -> RewardRequest:
    return RewardRequest("r", "prompt", response, task)


def gone(pid: int, within_s: float = 3.0) -> bool:
    """True if the process ends in time; a zombie that waits for init has ended."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_results_come_in_order_with_parts(pool):
    results = pool.score([ask("x" * i, value=i) for i in range(20)])
    assert [result.value for result in results] == [1.0 + i for i in range(20)]
    assert results[7].score.parts == {"length": 7.0}
    assert pool.score([]) == []


def test_errors_are_never_a_number_and_the_others_are_judged(pool):
    before = pool.replaced
    results = pool.score(
        [ask(r) for r in ("raise", "ok", "hang", "die", "memory", "ok", "nan", "print", "sleep", "ok")]
    )
    by_kind = [result.reward_error for result in results]
    assert [error is None for error in by_kind] == [False, True, False, False, False, True, False, True, False, True]
    assert "RuntimeError: verifier bug" in by_kind[0]
    assert "killed after 0.5 s" in by_kind[2] and "killed after 0.5 s" in by_kind[8]
    assert "died with exit code 7" in by_kind[3]
    assert "MemoryError" in by_kind[4]
    assert "nan" in by_kind[6]
    assert pool.replaced - before == 3
    assert [result.score is None for result in results] == [error is not None for error in by_kind]
    with pytest.raises(ValueError, match="verifier bug"):
        _ = results[0].value


def test_an_interpreter_that_is_held_is_killed_in_time(pool):
    start = time.monotonic()
    assert "killed" in pool.score([ask("bignum")])[0].reward_error
    assert time.monotonic() - start < 3.0


def test_workers_are_reused(pool):
    pids = {result.value for result in pool.score([ask("pid")] * 10)}
    assert len(pids) <= 2
    assert {result.value for result in pool.score([ask("pid")] * 10)} <= pids


def test_killing_a_worker_kills_what_it_started(pool, tmp_path):
    pid_file = tmp_path / "pid"
    assert "killed" in pool.score([ask("child", pid_file=str(pid_file))])[0].reward_error
    assert gone(int(pid_file.read_text()))


def test_a_worker_killed_while_idle_is_replaced(pool):
    victim = int(pool.score([ask("pid")])[0].value)
    os.kill(victim, signal.SIGKILL)
    assert gone(victim)
    results = pool.score([ask("ok")] * 6)
    assert sum(result.reward_error is not None for result in results) <= 1
    assert all(result.reward_error is None for result in pool.score([ask("ok")] * 6))


def test_too_many_errors_stop_the_run():
    with RewardPool(SPEC, workers=1, timeout_s=2.0, max_error_share=0.2, error_window=20) as pool:
        pool.score([ask("raise")] * 2 + [ask("ok")] * 8)
        with pytest.raises(TooManyRewardErrors, match=r"3 of the last 11 .*\n.*verifier bug"):
            pool.score([ask("raise")])
        with pytest.raises(ConfigError, match="is not among"):
            pool.score([RewardRequest("other", "", "")])


@pytest.mark.parametrize(
    "target, message",
    [
        ("tests.unit.rl.reward_cases:Unmakeable", r"with options={}: ValueError: no data"),
        ("no.such:Module", r"cannot be imported \(ModuleNotFoundError: No module named 'no'\)"),
        ("tests.unit.rl.reward_cases:Missing", "the module has no Missing"),
        ("tests.unit.rl.reward_cases", "must be module:Class"),
        ("tests.unit.rl.reward_cases:NoReward", "its instances need __call__"),
        (
            "tests.unit.rl.reward_cases:Patient",
            "may take 2 s, and its worker is killed after rl.reward_timeout_s=2; raise",
        ),
    ],
)
def test_a_reward_that_cannot_be_made_stops_at_the_start(target, message):
    with pytest.raises(ConfigError, match=f"A reward cannot be made: r: target={target}.*{message}"):
        RewardPool({"r": RewardSpec(target)}, workers=1, timeout_s=2.0)


def test_rewards_know_their_time_and_must_give_a_score(pool):
    assert pool.score([ask("time")])[0].value == pool.timeout_s
    assert "returned float, not a Score" in pool.score([ask("number")])[0].reward_error


def test_a_slow_replacement_holds_nobody_up(tmp_path):
    slow = tmp_path / "slow"
    spec = {"r": RewardSpec("tests.unit.rl.reward_cases:Misbehaving", {"slow": str(slow)})}
    with RewardPool(spec, workers=2, timeout_s=0.6, max_error_share=1.0) as pool:
        slow.touch()
        results = pool.score([ask("hang")] + [ask("nap")] * 8)
        assert [result.reward_error is None for result in results] == [False] + [True] * 8
        assert pool.replaced == 1 and max(result.wall_s for result in results) < 1.5
        assert pool.score([ask("hang"), ask("hang")])[1].reward_error  # nobody is ready: the next one waits
        assert pool.score([ask("ok")])[0].value == 0.0


def test_a_replacement_that_cannot_start_stops_the_run(tmp_path):
    slow = tmp_path / "slow"
    spec = {"r": RewardSpec("tests.unit.rl.reward_cases:Misbehaving", {"slow": str(slow)})}
    with RewardPool(spec, workers=1, timeout_s=0.5, max_error_share=1.0) as pool:
        slow.touch()
        pool._start_timeout_s = 1.0
        with pytest.raises(ConfigError, match="did not start within 1 s"):
            pool.score([ask("hang"), ask("ok")])


def test_what_was_answered_in_time_counts_however_late_it_is_read(monkeypatch):
    with RewardPool(SPEC, workers=1, timeout_s=0.5, max_error_share=1.0) as pool:
        monkeypatch.setattr(pool, "_wait", lambda busy: time.sleep(1.0))
        assert pool.score([ask("ok")])[0].value == 1.0 and pool.replaced == 0


def test_workers_end_when_the_trainer_is_killed():
    script = textwrap.dedent(
        """
        import time
        from megatron_m1.rl.rewards.pool import RewardPool
        from megatron_m1.rl.rewards.protocol import RewardRequest, RewardSpec
        pool = RewardPool({"r": RewardSpec("tests.unit.rl.reward_cases:Misbehaving")}, workers=1)
        print(int(pool.score([RewardRequest("r", "", "pid")])[0].value), flush=True)
        time.sleep(100)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as trainer:
        worker = int(trainer.stdout.readline())
        trainer.kill()
    assert gone(worker)
