"""Model- and data-parallel process groups."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_m1 import platform
from megatron_m1.config.schema import ParallelConfig

__all__ = ["destroy_groups", "group_sizes", "init_groups"]


def init_groups(parallel: ParallelConfig, *, seed: int) -> ProcessGroupCollection:
    """Process groups of this rank for the layout `parallel`; torch.distributed must be initialised.

    Also seeds core's random-number tracker, which its parallel layers and recomputation fork from.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=parallel.timeout_s / 60,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if groups.cp.size() > 1:
        # NCCL makes the communicator with the first operation, in which all ranks of the group must take part; ours may be a message
        # between two.
        dist.all_reduce(torch.zeros(1, device=platform.device()), group=groups.cp)
    return groups


def group_sizes(groups: ProcessGroupCollection) -> dict[str, int]:
    """Actual number of ranks in every process group of this rank, by name."""
    return {
        "world": dist.get_world_size(),
        "tensor": groups.tp.size(),
        "pipeline": groups.pp.size(),
        "context": groups.cp.size(),
        "data": groups.dp.size(),
        "expert": groups.ep.size(),
        "expert_tensor": groups.expt_tp.size(),
        "expert_data": groups.expt_dp.size(),
    }


def destroy_groups() -> None:
    """Forget the model-parallel groups, so that another layout can be initialised in this process."""
    parallel_state.destroy_model_parallel()
