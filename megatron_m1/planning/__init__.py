"""Which layouts of a model fit on a cluster, and which of them is fastest. Arithmetic only: no torch, no GPU."""

from megatron_m1.planning.search import Plan, Refusal, Search, plan_layout, search

__all__ = ["Plan", "Refusal", "Search", "plan_layout", "search"]
