"""Which layouts of a model fit on a cluster, and how long their steps should take. Arithmetic only: no torch, no GPU."""

from megatron_m1.planning.cluster import DEVICES, Cluster
from megatron_m1.planning.search import Plan, Refusal, Search, plan_layout, search
from megatron_m1.planning.step_time import StepTime, step_time

__all__ = ["DEVICES", "Cluster", "Plan", "Refusal", "Search", "StepTime", "plan_layout", "search", "step_time"]
