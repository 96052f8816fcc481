"""AdamW for megatron-core where neither Transformer Engine nor Apex is installed.

Core's path for torch.optim.AdamW cannot resume: core/optimizer/distrib_optimizer.py:839 (0.19.2) asserts on load and
:1032 lets all parameters share one step tensor. This optimizer behaves like Apex's FusedAdam instead (one integer
`step` per parameter group), and `install_adam` makes core treat it as such.
"""

from collections.abc import Callable, Iterable

import torch

from megatron_m1.config.errors import ConfigError
from megatron_m1.platform import probe

__all__ = ["AdamW", "install_adam"]


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay on torch's fused kernels (CPU and CUDA), `step` kept in the parameter group.

    Update t of a parameter p with gradient g: m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
    p = p (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps).
    State per parameter: `exp_avg`, `exp_avg_sq`, shaped and typed as the parameter. Parameters without gradient or
    without elements are skipped; the step of their group counts on. Any eps > 0 is fine (1e-15 included).
    adam_w_mode=False adds wd*p to the gradient instead.
    Raises ConfigError for capturable=True: a captured CUDA graph needs Transformer Engine's optimizer.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        if capturable:
            raise ConfigError(
                "optimizer_cuda_graph=true needs Transformer Engine's FusedAdam; install it or set false."
            )
        self.adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """The closure's loss (None without one), after one update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            by_device_and_dtype: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None and param.numel() > 0:
                    by_device_and_dtype.setdefault((param.device, param.dtype), []).append(param)
            for (device, _), params in by_device_and_dtype.items():
                self._update(params, group, device)
        return loss

    def _update(self, params: list[torch.Tensor], group: dict, device: torch.device) -> None:
        for param in params:
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        step = torch.tensor(float(group["step"]), device=device)
        kernel = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        kernel(
            params,
            [param.grad for param in params],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [step] * len(params),
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def install_adam(*, prefer_installed: bool = True) -> str:
    """Name of the Adam that megatron-core will use from now on: "transformer_engine", "apex" or "megatron_m1".

    With prefer_installed, Transformer Engine's and then Apex's FusedAdam are left in place; otherwise, or where neither
    is usable, core gets `AdamW` of this module and takes the code path it has for Apex. Idempotent; call it before the
    optimizer is built.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if prefer_installed and distrib_optimizer.USING_TE_OPTIMIZER:
        return "transformer_engine"
    if prefer_installed and distrib_optimizer.USING_APEX_OPTIMIZER and probe().apex.present:
        return "apex"
    optimizer.Adam = AdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = AdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = False
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    return "megatron_m1"
