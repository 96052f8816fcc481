"""Write demonstrations of the tasks of an RL configuration, many of them wrong: a policy that starts from them knows how an answer
looks and gives right ones sometimes.

python tools/rl_demonstrations.py --config examples/configs/rl_tiny_cpu.yaml --output demonstrations.jsonl --count 20000 --right-share 0.35

Each line is {"text": prompt + answer}. A wrong answer has the right one's characters in another order; to a puzzle of reasoning-gym it is
that of another puzzle. Held-out prompts are not among them.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.load import from_yaml
from megatron_m1.rl.tasks import Task, TaskMix


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--right-share", type=float, default=0.35, help="of the demonstrations (0.35)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        config = from_yaml(options.config)
        if any(source.kind == "file" for source in config.rl.tasks):
            raise ConfigError("rl.tasks: those of a file have no answers to demonstrate; take them out.")
        tasks, rng = TaskMix(config.rl, seed=options.seed), random.Random(options.seed)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", encoding="utf-8") as file:
        for number in range(options.count):
            task = tasks.task(number)
            answer = answer_to(task) if rng.random() < options.right_share else wrong_answer(task, tasks, rng)
            file.write(json.dumps({"text": task.prompt + answer}) + "\n")
    return 0


def answer_to(task: Task) -> str:
    """What the task's own reward takes for right."""
    if "entry" in task.task:
        return f"<answer>{task.task['entry']['answer']}</answer>"
    return task.task["answer"]


def wrong_answer(task: Task, tasks: TaskMix, rng: random.Random) -> str:
    """An answer of the right form, which may by chance be right."""
    if "entry" in task.task:
        return answer_to(tasks.task(rng.randrange(2**31)))
    return "".join(rng.sample(task.task["answer"], len(task.task["answer"])))


if __name__ == "__main__":
    sys.exit(main())
