"""Imported (for its side effect) once by the server from which `RankPool` forks its ranks."""

from megatron_m1 import platform

platform.setup()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.distributed  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel  # noqa: E402
import megatron.core.transformer.moe.moe_layer  # noqa: E402
import megatron.core.transformer.transformer_block  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401  torch.optim imports it at its first use (1 s)
