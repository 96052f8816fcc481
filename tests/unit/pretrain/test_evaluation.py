import pytest

from megatron_m1.config.schema import Config, DataConfig, EvaluationConfig, TrainingConfig


class Trainer:
    """Takes the mean of the first tokens of the sequences for their loss, over the `size` ranks of which this is one."""

    def __init__(self, loss=None):
        self.loss = loss
        self.seen = []

    def evaluate(self, micro_batches):
        firsts = [int(row[0]) for batch in micro_batches for row in batch["tokens"]]
        tokens = int(sum(batch["loss_mask"].sum() for batch in micro_batches))
        self.seen.append(firsts)
        return (sum(firsts) / len(firsts) if self.loss is None else self.loss), tokens


def evaluate(rank, world, values, loss=None):
    """(mean, first tokens of the sequences by step) of two evaluations."""
    from megatron_m1.config.schema import ParallelConfig
    from megatron_m1.parallel import init_groups
    from megatron_m1.pretrain.evaluation import Evaluation

    config = Config(
        data=DataConfig(mock=True, valid=["held out"]),
        training=TrainingConfig(seq_length=8, global_batch=4, micro_batch=1),
        evaluation=EvaluationConfig(**values),
    )
    evaluation = Evaluation(config, init_groups(ParallelConfig(), seed=1))
    if not evaluation.enabled:
        return None
    results = []
    for _ in range(2):
        trainer = Trainer(loss)
        try:
            mean = evaluation.loss(trainer)
        except FloatingPointError as error:
            mean = str(error)
        results.append((mean, trainer.seen))
    return results


def test_the_same_samples_every_time_shared_among_the_ranks(ranks):
    ((alone, again),) = ranks(1, evaluate, {"batches": 3})
    assert alone == again
    mean, seen = alone
    assert [len(step) for step in seen] == [4, 4, 4]
    assert mean == pytest.approx(sum(map(sum, seen)) / 12)
    shares = ranks(2, evaluate, {"batches": 3})
    for step in range(3):
        together = [first for (_, mine), _ in shares for first in mine[step]]
        assert sorted(together) == sorted(seen[step])


def test_off_without_batches(ranks):
    assert ranks(1, evaluate, {"batches": 0}) == [None]


def test_a_loss_that_is_not_finite_is_an_error(ranks):
    for loss in (float("nan"), float("inf")):
        ((first, _),) = ranks(1, evaluate, {"batches": 1}, loss)
        assert f"valid_loss={loss} is not finite" in first[0]
