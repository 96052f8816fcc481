"""`python -m megatron_m1 COMMAND ...`, alone or under torchrun.

commands:
  pretrain --config FILE [--key value ...]   train; with --dry-run [--world-size N] only say what would be done
  rl --config FILE [--key value ...]         reinforcement learning from a checkpoint; --dry-run as for pretrain
  generate --checkpoint DIR --prompts FILE.jsonl --output FILE.jsonl [options]
  equality [--ranks N]                       table of every parallel layout against one rank
  doctor                                     what is installed, which backends are used, and why
Each command prints its own options with --help.
"""

import logging
import os
import sys
from datetime import timedelta

from megatron_m1.config.errors import ConfigError

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; 1 if the equality table is out of bounds; 2 for bad input (a ConfigError, told once per job); 3 for
    a loss or gradient that is not finite; 4 if another rank died or hangs; 130 for Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, options = (argv[0], argv[1:]) if argv else ("--help", [])
    _show_choices()
    try:
        return _dispatch(command, options)
    except ConfigError as error:
        _tell_once(f"error: {error}", same_on_the_node=True)
        return 2
    except FloatingPointError as error:
        _tell_once(f"error: {error}")
        return 3
    except KeyboardInterrupt:
        _tell_once("interrupted")
        return 130
    except RuntimeError as error:
        from megatron_m1.engine.distributed import lost_a_rank

        if not lost_a_rank(error):
            raise
        _tell_once(
            "error: another rank has died or does not answer; its own output, if any, says why. The job ends, checkpoints on "
            f"disk are untouched. ({' '.join(str(error).split())[:200]})"
        )
        return 4


def _dispatch(command: str, options: list[str]) -> int:
    """Imports only what the command needs: `doctor` and dry runs must work where training cannot."""
    if command in ("-h", "--help"):
        print(__doc__)
    elif command == "doctor":
        from megatron_m1.platform import doctor_report

        print(doctor_report())
    elif command == "pretrain" and "--dry-run" in options:
        from megatron_m1.engine.dry_run import main as dry_run

        dry_run([option for option in options if option != "--dry-run"])
    elif command == "pretrain":
        from megatron_m1.pretrain import main as pretrain

        pretrain(options)
    elif command == "rl" and "--dry-run" in options:
        from megatron_m1.rl.dry_run import main as rl_dry_run

        rl_dry_run([option for option in options if option != "--dry-run"])
    elif command == "rl":
        from megatron_m1.rl.loop import main as rl

        rl(options)
    elif command == "generate":
        from megatron_m1.generation import main as generate

        generate(options)
    elif command == "equality":
        from megatron_m1.engine.equality_table import main as equality

        return equality(options)
    else:
        raise ConfigError(f"{command} is not a command; use pretrain, rl, generate, equality or doctor.")
    return 0


def _show_choices() -> None:
    """On stderr of the job's first rank: what `auto` takes, which kernels and methods log at level INFO, once each."""
    if os.environ.get("RANK", "0") == "0":
        for package in ("megatron_m1", "m1_kernels"):
            logger = logging.getLogger(package)
            logger.setLevel(logging.INFO)
            if not logger.handlers:
                logger.addHandler(logging.StreamHandler())


def _tell_once(message: str, *, same_on_the_node: bool = False) -> None:
    """Print to stderr, on one rank of the job only: the first that gets here, known through the job's store.

    Without a store (srun, before the ranks have met) every rank prints, so that no message is lost; with
    same_on_the_node only the first of each node, since its ranks read the same files.
    """
    rank, world_size = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        print(message, file=sys.stderr, flush=True)
    elif _first_to_tell(without_store=not same_on_the_node or os.environ.get("LOCAL_RANK", "0") == "0"):
        print(f"[rank {rank}] {message}", file=sys.stderr, flush=True)


def _first_to_tell(*, without_store: bool) -> bool:
    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store: dist.Store
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        elif dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
        else:
            return without_store
        return store.add(f"megatron_m1/told/{attempt}", 1) == 1
    except (dist.DistError, KeyError, RuntimeError):
        return True  # who holds the store is gone already: better told twice than never


if __name__ == "__main__":
    sys.exit(main())
