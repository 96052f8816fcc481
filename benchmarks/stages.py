"""Where the time of a training step goes, by part of the model."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["label_modules", "label_stage", "stage_seconds"]

PREFIX = "stage:"


def label_stage(name: str) -> record_function:
    """Context manager: operators run inside belong to stage `name` (the innermost), and so do their gradients."""
    return record_function(PREFIX + name)


@contextlib.contextmanager
def label_modules(module: nn.Module, stage_of: Callable[[nn.Module], str | None]) -> Iterator[None]:
    """Label the forward of every submodule for which stage_of gives a name, while the context is open."""
    open_labels: list[record_function] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            open_labels.append(label_stage(name))
            open_labels[-1].__enter__()

        return hook

    def leave(*_: object) -> None:
        open_labels.pop().__exit__(None, None, None)

    for child in module.modules():
        if (name := stage_of(child)) is not None:
            handles += [child.register_forward_pre_hook(enter(name)), child.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stage_seconds(step: Callable[[], object]) -> dict[str, dict[str, float]]:
    """{stage: {"forward": s, "backward": s}} of one call of `step`, in seconds; `other` is what no stage claims.

    A gradient operator belongs to the stage of its forward operator (same autograd sequence number). The profiler slows
    small operators down, so the shares say more than the sum.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = list(profiler.events())
    stage_of_sequence = {
        event.sequence_nr: stage
        for event in events
        if event.sequence_nr >= 0 and not is_backward(event) and (stage := enclosing_stage(event)) is not None
    }
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event in events:
        if event.name.startswith(PREFIX):
            continue
        node = enclosing_backward(event)
        if node is not None:
            stage = enclosing_stage(event) or stage_of_sequence.get(node.sequence_nr, "other")
            seconds[stage]["backward"] += event.self_cpu_time_total / 1e6
        else:
            seconds[enclosing_stage(event) or "other"]["forward"] += event.self_cpu_time_total / 1e6
    return {stage: dict(times) for stage, times in sorted(seconds.items())}


def is_backward(event: FunctionEvent) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def enclosing_backward(event: FunctionEvent | None) -> FunctionEvent | None:
    while event is not None and not is_backward(event):
        event = event.cpu_parent
    return event


def enclosing_stage(event: FunctionEvent | None) -> str | None:
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        event = event.cpu_parent
    return None


def self_test() -> None:
    """The stages of a two-layer network, as an example and a check: python -m benchmarks.stages."""
    network = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 4096))
    with label_modules(network, lambda m: {512: "small", 4096: "large"}.get(getattr(m, "out_features", 0))):
        seconds = stage_seconds(lambda: network(torch.randn(512, 512, requires_grad=True)).sum().backward())
    print(seconds)
    assert seconds["large"]["backward"] > seconds["small"]["backward"] > 0


if __name__ == "__main__":
    self_test()
