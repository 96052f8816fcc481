"""megatron-core 0.19.2 on a machine without CUDA: every patch it needs, in one file, tied to that version.

An import hook prepares each `megatron.core` module as it is loaded, so torch itself stays as it is for everyone else and
no torch call becomes slower:

1. `LITERALS`: string constants such as device='cuda' are exchanged in the module's compiled code.
2. Every core module sees a copy of the torch namespace whose `torch.cuda` speaks of the CPU (`_torch_for_core`).
3. `FIXES`: single functions that need more than that.
4. `UNCOMPILED`: modules that use torch.compile as they are imported are imported without it.

`Tensor.cuda`, which can only raise without CUDA, returns the tensor itself (a copy where a memory format is asked for).
Line numbers are those of the 0.19.2 wheel; tests/unit/platform fails when one of them no longer holds.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import logging
import sys
import time
import types
from collections.abc import Callable

import torch

from megatron_m1.config.errors import ConfigError

__all__ = ["CORE_VERSION", "FIXES", "LITERALS", "NO_TE_FIXES", "UNCOMPILED", "install"]

CORE_VERSION = "0.19.2"

DEVICE = {"cuda": "cpu"}
TYPES = {
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

# megatron.core module -> (constants to exchange, lines where they stand in 0.19.2)
LITERALS: dict[str, tuple[dict[str, str], tuple[int, ...]]] = {
    "dist_checkpointing.exchange_utils": (DEVICE, (97, 103, 105, 109, 329)),
    "dist_checkpointing.strategies.state_dict_saver": (DEVICE, (204,)),
    "distributed.param_and_grad_buffer": (DEVICE, (1145,)),
    "optimizer.clip_grads": (DEVICE | TYPES, (96, 108, 112, 174, 180, 231)),
    "optimizer.distrib_optimizer": (TYPES, (401, 466, 758)),
    "optimizer.grad_scaler": (DEVICE, (20, 111, 114, 117)),
    "optimizer.optimizer": (DEVICE | TYPES, (315, 690, 698, 702, 1009, 1028, 1249)),
    "pipeline_parallel.schedules": (DEVICE, (504, 749, 1121, 2292)),
    "rerun_state_machine": (DEVICE, (264, 268)),
    "tensor_parallel.data": (DEVICE, (37,)),
    "tensor_parallel.layers": (DEVICE, (74, 75)),
    "tensor_parallel.random": (DEVICE, (105, 124, 156, 160)),
    "transformer.utils": (DEVICE, (39, 44)),
    "utils": (DEVICE, (1332,)),
}

# router.py:918 decorates a method that only inference uses with torch.compile, and that loads Dynamo and Inductor: 4 s of
# CPU time in every process, almost half of its start.
UNCOMPILED = {"transformer.moe.router"}


def install(*, without_cuda: bool, without_te: bool) -> None:
    """Put the import hook in place, before the first import of megatron.core.

    Raises ConfigError if another megatron-core is installed, or one of its modules is already loaded.
    """
    check_version()
    loaded = [name for name in sys.modules if name == "megatron.core" or name.startswith("megatron.core.")]
    if loaded:
        raise ConfigError(
            f"megatron.core is already imported ({len(loaded)} modules) while its patches are not in place; "
            "call megatron_m1.platform.setup() before anything imports megatron"
        )
    fixes = (NO_TE_FIXES if without_te else {}) | (FIXES if without_cuda else {})
    sys.meta_path.insert(0, _CoreFinder(fixes, without_cuda=without_cuda))
    if without_cuda:
        torch.Tensor.cuda = _tensor_cuda


def check_version() -> None:
    """Raise ConfigError unless the installed megatron-core is the one the patches were written for."""
    try:
        found = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"megatron-core is not installed; pip install megatron-core=={CORE_VERSION}") from None
    if found != CORE_VERSION:
        raise ConfigError(
            f"megatron-core={found} is installed but the patches of megatron_m1/platform/cpu.py are for {CORE_VERSION}; "
            f"pip install megatron-core=={CORE_VERSION}, or review every patch and its line number for {found}"
        )


class _CoreFinder(importlib.abc.MetaPathFinder):
    def __init__(self, fixes: dict[str, tuple[Callable, ...]], *, without_cuda: bool):
        self.fixes = fixes
        self.without_cuda = without_cuda

    def find_spec(self, fullname, path, target=None):
        if not (fullname == "megatron.core" or fullname.startswith("megatron.core.")):
            return None
        name = fullname.removeprefix("megatron.core.")
        if not self.without_cuda and name not in self.fixes:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _CoreLoader(
                fullname, spec.loader.path, self.fixes.get(name, ()), without_cuda=self.without_cuda
            )
        return spec


class _CoreLoader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, fixes: tuple[Callable, ...], *, without_cuda: bool):
        super().__init__(fullname, path)
        self.fixes = fixes
        self.without_cuda = without_cuda

    def get_code(self, fullname):
        code = super().get_code(fullname)  # the cached byte code stays the upstream one
        short = fullname.removeprefix("megatron.core.")
        if not self.without_cuda or short not in LITERALS:
            return code
        exchanged = exchange_constants(code, LITERALS[short][0])
        if exchanged is code:
            raise ConfigError(f"{fullname} of megatron-core {CORE_VERSION} holds none of the constants to exchange")
        return exchanged

    def exec_module(self, module):
        short = module.__name__.removeprefix("megatron.core.")
        with _no_compile() if self.without_cuda and short in UNCOMPILED else contextlib.nullcontext():
            super().exec_module(module)
        if self.without_cuda and module.__dict__.get("torch") is torch:
            module.torch = _torch_for_core()
        for fix in self.fixes:
            fix(module)


@contextlib.contextmanager
def _no_compile():
    """Meanwhile `@torch.compile` leaves functions as they are."""
    upstream = torch.compile
    torch.compile = lambda function: function
    try:
        yield
    finally:
        torch.compile = upstream


def exchange_constants(code: types.CodeType, table: dict[str, str]) -> types.CodeType:
    """The code object with its string constants (also those in tuples and nested code) exchanged by table; the same
    object if there are none."""

    def exchange(constant):
        if isinstance(constant, types.CodeType):
            return exchange_constants(constant, table)
        if isinstance(constant, str):
            return table.get(constant, constant)
        if isinstance(constant, tuple):
            changed = tuple(exchange(item) for item in constant)
            return constant if all(a is b for a, b in zip(constant, changed, strict=True)) else changed
        return constant

    constants = tuple(exchange(constant) for constant in code.co_consts)
    if all(a is b for a, b in zip(code.co_consts, constants, strict=True)):
        return code
    return code.replace(co_consts=constants)


# --- the torch namespace that core sees ------------------------------------------------------------------------------


def _view(module: types.ModuleType, **overrides) -> types.ModuleType:
    view = types.ModuleType(module.__name__, module.__doc__)
    view.__dict__.update(module.__dict__)
    view.__dict__.update(overrides, __getattr__=functools.partial(getattr, module))
    return view


@functools.cache
def _torch_for_core() -> types.ModuleType:
    cpu = torch.device("cpu")
    stream = CpuStream()
    return _view(
        torch,
        cuda=_view(
            torch.cuda,
            Event=CpuEvent,
            Stream=CpuStream,
            current_device=lambda: cpu,
            current_stream=lambda device=None: stream,
            default_stream=lambda device=None: stream,
            get_rng_state=lambda device=None: torch.get_rng_state(),
            is_current_stream_capturing=lambda: False,
            manual_seed=torch.manual_seed,
            set_device=lambda device: None,
            set_rng_state=lambda state, device=None: torch.set_rng_state(state),
            set_stream=lambda stream: None,
            stream=_StreamContext,
            synchronize=lambda device=None: None,
        ),
    )


class CpuStream:
    """Stands for a CUDA stream where all work is done in program order."""

    def __init__(self, device=None, priority=0):
        self.device = torch.device("cpu")

    def record_event(self, event=None):
        event = event or CpuEvent()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def wait_stream(self, stream) -> None: ...

    def wait_event(self, event) -> None: ...

    def synchronize(self) -> None: ...


class CpuEvent:
    """Stands for a CUDA event; `record` notes the wall clock so that `elapsed_time` (ms) is real."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False):
        self.recorded_s = float("nan")

    def record(self, stream=None) -> None:
        self.recorded_s = time.perf_counter()

    def elapsed_time(self, end: "CpuEvent") -> float:
        return (end.recorded_s - self.recorded_s) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, stream=None) -> None: ...

    def synchronize(self) -> None: ...


class _StreamContext:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        return self.stream

    def __exit__(self, *exception):
        return None


def _tensor_cuda(self, device=None, non_blocking=False, memory_format=torch.preserve_format):
    return self.to(device="cpu", memory_format=memory_format)


# --- fixes of single modules -----------------------------------------------------------------------------------------


def _no_compiler(jit: types.ModuleType) -> None:
    """jit.py:33 makes `jit_fuser` torch.compile, which needs a C++ compiler and minutes of compile time on CPU."""
    jit.disable_jit_fuser()


def _rng_is_cpu_rng(random: types.ModuleType) -> None:
    """tensor_parallel/random.py:104,135: the tracked generator is the CPU's; :333 warns whenever it is used."""
    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    logging.getLogger(random.__name__).addFilter(
        lambda record: record.msg != "CPU RNG state changed within GPU RNG context"
    )


def _recompute_without_extension(random: types.ModuleType) -> None:
    """tensor_parallel/random.py:73 compiles C++ at run time (`share_storage`); here the storage is refilled by a copy,
    which keeps views and version counters alike."""

    def share_storage(target: torch.Tensor, source: torch.Tensor) -> None:
        refilled, filled = target.untyped_storage(), source.untyped_storage()
        refilled.resize_(filled.nbytes())
        refilled.copy_(filled)

    random._get_share_storage = lambda: share_storage


def _recompute_without_fp8(random: types.ModuleType) -> None:
    """tensor_parallel/random.py:740: the default fp8=False counts as "fp8 given" and needs TE's names (NameError)."""
    random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)


def _split_sizes_to_host(token_dispatcher: types.ModuleType) -> None:
    """moe_utils.py:1184: only CUDA tensors are turned into numpy, but all_to_all and split want plain integers."""
    upstream = token_dispatcher.maybe_move_tensor_to_cpu

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return upstream(tensor, as_numpy=as_numpy, record_stream=record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu


def _no_pinned_memory(rope_utils: types.ModuleType) -> None:
    """rope_utils.py:63: torch.tensor(..., pin_memory=True) needs an accelerator."""
    tensor = torch.tensor
    rope_utils.torch = _view(
        rope_utils.torch, tensor=lambda data, *, pin_memory=False, **options: tensor(data, **options)
    )


def _async_worker_without_device(async_utils: types.ModuleType) -> None:
    """async_utils.py:565: the spawned worker takes a rank modulo 0 devices and dies; nobody notices (never ends)."""
    async_utils.torch = _view(async_utils.torch, cuda=_view(async_utils.torch.cuda, device_count=lambda: 1))
    async_utils.PersistentAsyncCaller.upstream_async_loop = staticmethod(async_utils.PersistentAsyncCaller.async_loop)
    async_utils.PersistentAsyncCaller.async_loop = staticmethod(persistent_async_loop)


def persistent_async_loop(*args) -> None:
    """Body of the spawned checkpoint worker: a new process, so the patches come first."""
    from megatron_m1.platform import setup

    setup()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    PersistentAsyncCaller.upstream_async_loop(*args)


def _uneven_collectives(mappings: types.ModuleType) -> None:
    """tensor_parallel/mappings.py:154,197: all_gather and reduce_scatter of unequal parts (experts under ETP and EP), which
    NCCL does and gloo refuses; one broadcast or reduction per rank does the same."""
    dist = torch.distributed

    def all_gather(outputs, tensor, group):
        for rank, output in zip(dist.get_process_group_ranks(group), outputs, strict=True):
            if rank == dist.get_rank():
                output.copy_(tensor)
            dist.broadcast(output, src=rank, group=group)

    def reduce_scatter(output, tensors, group):
        for rank, tensor in zip(dist.get_process_group_ranks(group), tensors, strict=True):
            part = tensor.clone()
            dist.reduce(part, dst=rank, group=group)
            if rank == dist.get_rank():
                output.copy_(part)

    mappings.torch = _view(
        mappings.torch, distributed=_view(dist, all_gather=all_gather, reduce_scatter=reduce_scatter)
    )


def _nothing_to_exchange_alone(param_and_grad_buffer: types.ModuleType) -> None:
    """distributed/param_and_grad_buffer.py:515,712: in a data-parallel group of one rank the shard is the buffer itself;
    NCCL then does nothing, gloo copies every gradient and weight there and back."""

    def skipping(collective):
        def run(output, tensor, *args, group, async_op=False, **options):
            if group.size() == 1 and not async_op and output.data_ptr() == tensor.data_ptr():
                return None
            return collective(output, tensor, *args, group=group, async_op=async_op, **options)

        return run

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, skipping(getattr(param_and_grad_buffer, name)))


NO_TE_FIXES: dict[str, tuple[Callable, ...]] = {"tensor_parallel.random": (_recompute_without_fp8,)}
FIXES: dict[str, tuple[Callable, ...]] = {
    "dist_checkpointing.strategies.async_utils": (_async_worker_without_device,),
    "distributed.param_and_grad_buffer": (_nothing_to_exchange_alone,),
    "jit": (_no_compiler,),
    "models.common.embeddings.rope_utils": (_no_pinned_memory,),
    "tensor_parallel.mappings": (_uneven_collectives,),
    "tensor_parallel.random": (_rng_is_cpu_rng, _recompute_without_extension, _recompute_without_fp8),
    "transformer.moe.token_dispatcher": (_split_sizes_to_host,),
}
