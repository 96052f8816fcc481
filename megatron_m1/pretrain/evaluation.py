"""Held-out loss."""

import math

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_m1.config.schema import Config
from megatron_m1.data.batches import MicroBatches, evaluation_steps
from megatron_m1.data.dataset import build_dataset
from megatron_m1.engine.trainer import Trainer

__all__ = ["Evaluation"]


class Evaluation:
    """loss(trainer) -> token-mean negative log-likelihood, nats, over the same held-out samples every time.

    Raises FloatingPointError on every rank if it is not finite.
    """

    def __init__(self, config: Config, groups: ProcessGroupCollection) -> None:
        self.config, self.groups = config, groups
        self.enabled = bool(config.data.valid) and config.evaluation.batches > 0
        if not self.enabled:
            return
        training = config.training
        dataset = build_dataset(
            config.data,
            seq_length=training.seq_length,
            seed=training.seed,
            split="valid",
            vocab_size=config.model.vocab_size,
        )
        self.steps = evaluation_steps(dataset, config.evaluation.batches, training.global_batch)
        self.batches = MicroBatches(dataset, document_boundaries=config.data.document_boundaries)

    def loss(self, trainer: Trainer) -> float:
        training, total, count = self.config.training, 0.0, 0
        for index in range(self.steps):
            share = self.batches.step(
                index * training.global_batch,
                training.global_batch,
                training.micro_batch,
                self.groups.dp.rank(),
                self.groups.dp.size(),
            )
            loss, tokens = trainer.evaluate(share)
            total, count = total + loss * tokens, count + tokens
        mean = total / max(count, 1)
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"valid_loss={mean} is not finite; resume from an earlier checkpoint with a lower optimizer.lr"
            )
        return mean
