"""Every patch of platform/cpu.py: upstream still needs it, where cpu.py says, and with it core does what it should."""

import ast
import functools
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from megatron_m1 import platform
from megatron_m1.config.errors import ConfigError
from megatron_m1.platform import cpu

pytestmark = pytest.mark.skipif(platform.is_cuda(), reason="the patches are for machines without CUDA")

# Files with CUDA constants that are left alone: features that need a GPU anyway, or constants that do no harm on CPU.
LEFT_ALONE = {
    "dist_checkpointing.strategies.filesystem_async",
    "distributed.fsdp.mcore_fsdp_adapter",
    "distributed.fsdp.src.megatron_fsdp.fully_shard",
    "distributed.fsdp.src.megatron_fsdp.mixed_precision",
    "distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer",
    "distributed.fsdp.src.megatron_fsdp.utils",
    "distributed.torch_fully_sharded_data_parallel",
    "energy_monitor",
    "extensions.transformer_engine",
    "fault_injector",
    "fp8_utils",
    "full_cuda_graph",
    "fusions.fused_indices_converter",
    "models.hybrid.hybrid_block",
    "models.mimo.optimizer",
    "nccl_allocator",
    "optimizer.cpu_offloading.hybrid_optimizer",
    "optimizer.layer_wise_optimizer",
    "pipeline_parallel.combined_1f1b",
    "pipeline_parallel.fine_grained_activation_offload",
    "pipeline_parallel.hybrid_cp_schedule",
    "pipeline_parallel.utils",
    "resharding.copy_services.nixl_copy_service",
    "resharding.nvshmem_copy_service.planning.gpu_execution_planner",
    "resharding.nvshmem_copy_service.validation",
    "transformer.cuda_graphs",
    "transformer.custom_layers.batch_invariant_kernels",
    "transformer.fsdp_dtensor_checkpoint",
    "transformer.moe.moe_layer",
    "transformer.moe.paged_stash",
    "transformer.moe.token_dispatcher",
}

# What the fixes and megatron_m1/engine/adam.py work around: module, line, text that starts there.
UPSTREAM_LINES = [
    ("jit", 33, "enable_jit_fuser()"),
    ("jit", 21, "jit_fuser = torch.compile"),
    ("tensor_parallel.random", 73, "_share_storage_ext = load_inline("),
    ("tensor_parallel.random", 104, "def _get_cuda_rng_state("),
    ("tensor_parallel.random", 135, "def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1"),
    (
        "tensor_parallel.random",
        333,
        "logging.getLogger(__name__).warning('CPU RNG state changed within GPU RNG context')",
    ),
    ("tensor_parallel.random", 739, "def __init__(self, fp8=False):"),
    ("tensor_parallel.random", 740, "self.fp8 = fp8 is not None"),
    ("transformer.moe.router", 918, "@torch.compile"),
    ("transformer.moe.moe_utils", 1184, "if torch.is_tensor(tensor) and tensor.is_cuda:"),
    ("transformer.moe.token_dispatcher", 39, "maybe_move_tensor_to_cpu,"),
    (
        "models.common.embeddings.rope_utils",
        63,
        '[cp_rank, (2 * cp_size - cp_rank - 1)], device="cpu", pin_memory=True',
    ),
    (
        "dist_checkpointing.strategies.async_utils",
        565,
        "torch.cuda.set_device(rank % torch.cuda.device_count())",
    ),
    ("optimizer.distrib_optimizer", 839, "assert len(steps) == 1"),
    ("optimizer.distrib_optimizer", 1032, 's["step"] = step'),
    ("optimizer", 556, "if USING_PYTORCH_OPTIMIZER:"),
]


@functools.cache
def core_folder() -> Path:
    return Path(importlib.util.find_spec("megatron.core").origin).parent


def source_of(module: str) -> Path:
    path = core_folder().joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def lines_with_constants(source: str, constants: dict[str, str]) -> tuple[int, ...]:
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return tuple(sorted({node.lineno for node in nodes if isinstance(node.value, str) and node.value in constants}))


@pytest.mark.parametrize("module", sorted(cpu.LITERALS))
def test_upstream_literals_stand_where_the_table_says(module):
    constants, lines = cpu.LITERALS[module]
    assert lines_with_constants(source_of(module).read_text(), constants) == lines


@pytest.mark.parametrize(("module", "line", "text"), UPSTREAM_LINES)
def test_upstream_lines_that_the_fixes_work_around(module, line, text):
    assert source_of(module).read_text().splitlines()[line - 1].strip().startswith(text)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_no_other_core_file_has_gained_cuda_constants():
    found = set()
    for path in core_folder().rglob("*.py"):
        name = ".".join(path.relative_to(core_folder()).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text()
        if "cuda" in text and not name.startswith("inference."):
            found |= {name} if lines_with_constants(text, cpu.DEVICE | cpu.TYPES) else set()
    assert found == LEFT_ALONE | set(cpu.LITERALS)


def test_constants_are_exchanged_in_nested_code_defaults_and_tuples():
    source = (
        "def outer(device='cuda'):\n"
        "    def inner(kind):\n"
        "        return kind in ['torch.cuda.HalfTensor', 'torch.cuda.BFloat16Tensor'], 'no cuda here'\n"
        "    return device, inner\n"
    )
    code = compile(source, "made_up.py", "exec")
    assert cpu.exchange_constants(code, {"absent": ""}) is code
    namespace = {}
    exec(cpu.exchange_constants(code, cpu.DEVICE | cpu.TYPES), namespace)
    device, inner = namespace["outer"]()
    assert device == "cpu"
    assert inner("torch.BFloat16Tensor") == (True, "no cuda here")
    assert inner("torch.cuda.HalfTensor") == (False, "no cuda here")


def test_torch_itself_is_untouched():
    from megatron.core.optimizer import optimizer

    assert optimizer.torch is not torch
    assert optimizer.torch.zeros is torch.zeros
    assert optimizer.torch.cuda.current_device() == torch.device("cpu")
    assert optimizer.torch.cuda.is_available() is False
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()
    with pytest.raises((RuntimeError, AssertionError, TypeError)):
        torch.zeros(1, device="cuda")


def test_importing_core_does_not_load_the_compiler():
    script = (
        "import sys; from megatron_m1 import platform; platform.setup(); import megatron.core, torch; "
        "print('torch._dynamo' in sys.modules, 'torch._inductor.compile_fx' in sys.modules, torch.compile.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["False", "False", "torch"], done.stderr


def test_attributes_that_torch_loads_later_are_found():
    from megatron.core.optimizer import optimizer

    torch.made_up_for_this_test = 3
    try:
        assert optimizer.torch.made_up_for_this_test == 3
    finally:
        del torch.made_up_for_this_test
    with pytest.raises(AttributeError):
        optimizer.torch.made_up_for_this_test  # noqa: B018


def test_streams_and_events():
    from megatron.core.optimizer import optimizer

    cuda = optimizer.torch.cuda
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    side = cuda.Stream(device="cuda")
    with cuda.stream(side):
        start.record()
    side.wait_stream(cuda.current_stream())
    side.record_event(end)
    end.synchronize()
    cuda.synchronize()
    assert 0 <= start.elapsed_time(end) < 60_000


def test_tensor_and_module_cuda_stay_on_cpu():
    tensor = torch.ones(2, 3)
    assert tensor.cuda() is tensor
    assert tensor.cuda(non_blocking=True) is tensor
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_clipping_and_counting_accept_cpu_gradients():
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 2.0)
    clip_grad_by_total_norm_fp32([param], max_norm=1.0, total_norm=4.0)
    torch.testing.assert_close(param.grad, torch.full((4,), 0.5))


def test_random_tracker_forks_the_cpu_generator(caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(5)
    tracker.add("mine", 11)
    outside = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with tracker.fork("mine"):
            draws.append(torch.rand(3))
        assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(torch.cat(draws), torch.rand(6, generator=torch.Generator().manual_seed(11)))
    assert "CPU RNG state changed" not in caplog.text


def dropout_block(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(torch.tanh(x @ weight), 0.5)


def gradients_with(recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron.core.tensor_parallel.random import checkpoint

    torch.manual_seed(3)
    weight, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    if recompute:
        output = checkpoint(dropout_block, False, weight, x)
    else:
        output = dropout_block(weight, x)
    torch.rand(7)  # other random numbers between forward and backward
    output.square().sum().backward()
    return weight.grad, x.grad


@pytest.mark.parametrize("in_thread", [False, True])
def test_recompute_repeats_dropout_also_on_another_thread(in_thread):
    expected = gradients_with(recompute=False)
    results = []
    if in_thread:
        thread = threading.Thread(target=lambda: results.append(gradients_with(recompute=True)))
        thread.start()
        thread.join()
    else:
        results.append(gradients_with(recompute=True))
    for a, b in zip(results[0], expected, strict=True):
        assert torch.equal(a, b)


def test_recompute_without_output_refills_storage_and_its_views(monkeypatch):
    from megatron.core.tensor_parallel import random
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    monkeypatch.delattr(random, "load_inline")  # no C++ compiler is asked for
    torch.manual_seed(0)
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(4, 2, requires_grad=True)
    expected = torch.autograd.grad((torch.tanh(x).reshape(6, 2) @ weight[:2]).square().sum(), (x, weight))

    checkpoint = CheckpointWithoutOutput()
    assert checkpoint.fp8 is False
    activated = checkpoint.checkpoint(torch.tanh, x)
    output = activated.reshape(6, 2) @ weight[:2]
    checkpoint.discard_output_and_register_recompute(output)
    assert activated.untyped_storage().nbytes() == 0
    output.square().sum().backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(weight.grad, expected[1])


def test_split_sizes_become_integers_and_other_tensors_stay():
    from megatron.core.transformer.moe import token_dispatcher

    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 3]), as_numpy=True)
    assert sizes.tolist() == [2, 3] and not torch.is_tensor(sizes)
    kept = torch.tensor([2, 3])
    assert token_dispatcher.maybe_move_tensor_to_cpu(kept, record_stream=True) is kept
    assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def rotary_slice(rank, world):
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    embedding = torch.arange(8.0).view(8, 1, 1, 1)
    return get_pos_emb_on_this_cp_rank(embedding, 0, torch.distributed.group.WORLD).flatten()


def test_rotary_slices_without_pinned_memory(ranks):
    assert [part.tolist() for part in ranks(2, rotary_slice)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_fused_functions_are_not_compiled():
    from megatron.core import jit

    assert jit.jit_fuser is jit.noop_decorator


def write_number(path: str, number: int) -> None:
    Path(path).write_text(str(number))


def save_in_persistent_worker(rank, world, path):
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

    queue = AsyncCallsQueue(persistent=True)
    queue.schedule_async_request(AsyncRequest(write_number, (path, 42), []))
    done = queue.maybe_finalize_async_calls(blocking=True)
    queue.close()
    return len(done)


def test_persistent_async_save_ends(ranks, tmp_path):
    path = tmp_path / "number"
    assert ranks(1, save_in_persistent_worker, str(path), timeout_s=100) == [1]
    assert path.read_text() == "42"


def test_another_core_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0")
    with pytest.raises(ConfigError, match=r"megatron-core=0\.20\.0 .* pip install megatron-core==0\.19\.2"):
        platform.setup.__wrapped__()


def test_missing_core_is_refused(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"megatron-core is not installed; pip install megatron-core==0\.19\.2"):
        platform.setup.__wrapped__()


def test_setup_after_an_import_of_core_is_refused():
    importlib.import_module("megatron.core")
    finders = list(sys.meta_path)
    with pytest.raises(ConfigError, match="already imported"):
        platform.setup.__wrapped__()
    assert sys.meta_path == finders


def test_setup_is_idempotent():
    platform.setup()
    finders = list(sys.meta_path)
    platform.setup()
    assert sys.meta_path == finders
