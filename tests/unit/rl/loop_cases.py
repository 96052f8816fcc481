"""A tiny policy and fixed samples for the tests of the RL loop."""

from array import array

import numpy as np
import torch

from megatron_m1.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RLConfig,
    TaskSource,
    TrainingConfig,
)
from megatron_m1.rl.samples import Sample
from megatron_m1.rl.tasks import Task

VOCAB = 264


def tiny_config(parallel: dict | None = None, **rl: object) -> Config:
    """Two layers, four experts; 8 prompts x 4 samples in 2 updates; packs of 2 * 64 tokens."""
    return Config(
        model=ModelConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=32, num_local_experts=4, attn_type_list=[0, 1], rotary_dim=4,
        ),
        moe=MoEConfig(aux_loss="none"),
        parallel=ParallelConfig(**(parallel or {})),
        training=TrainingConfig(steps=2, seed=3, micro_batch=2, global_batch=16, seq_length=64, precision="fp32"),
        optimizer=OptimizerConfig(lr=3e-3, eps=1e-15, weight_decay=0.0),
        data=DataConfig(),
        rl=RLConfig(
            tasks=[TaskSource("sort", size=2)],
            **({"samples_per_prompt": 4, "updates_per_batch": 2, "max_new_tokens": 4, "slots": 32} | rl),
        ),
    )  # fmt: skip


def fixed_samples(groups: int = 4, per_group: int = 4) -> list[Sample]:
    """Random tokens of ragged lengths, with rewards of both kinds in every group and random experts, which no gate would choose."""
    generator = torch.Generator().manual_seed(11)
    samples = []
    for number in range(groups * per_group):
        group = number // per_group
        prompt = torch.randint(0, VOCAB, (3 + 2 * group,), generator=generator).tolist()
        count = int(torch.randint(1, 12, (), generator=generator))
        response = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
        passed = len(prompt) + count - 1
        routing = torch.rand(passed, 2, 4, generator=generator).topk(2).indices.numpy().astype(np.uint8)
        logprobs = -5.0 + torch.randn(count, generator=generator).numpy().astype(np.float32)
        samples.append(
            Sample(
                number, group, "0", Task("", "exact"), tuple(prompt), array("i", response), logprobs, "eos", "", routing,
                reward=float(number % per_group < 1 + group % 3),
            )
        )  # fmt: skip
    return samples
