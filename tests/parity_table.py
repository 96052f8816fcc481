"""Print how far our float32 model is from its references: python -m tests.parity_table

One line per configuration and reference: ||a-b|| / ||b|| of the logits, of the worst parameter gradient, and its name.
"""

import logging

from megatron_m1 import platform


def main() -> None:
    logging.disable(logging.WARNING)
    platform.setup()
    from megatron_m1.config.schema import ParallelConfig
    from megatron_m1.engine.distributed import init_distributed, shutdown_distributed
    from megatron_m1.parallel import destroy_groups, init_groups
    from tests.unit import test_parity as parity

    init_distributed(timeout_s=60)
    groups = init_groups(ParallelConfig(), seed=parity.SEED)
    print(f"{'configuration':30s} {'reference':12s} {'logits':>8s} {'gradient':>8s}  worst gradient")
    for name, model in parity.ALL_CASES.items():
        weights, batch = parity.case_weights(name), parity.plain_batch(model)
        ours = parity.run_ours(groups, model, weights, batch)
        references = {"oracle fp64": parity.run_oracle(model, weights, batch)}
        if name in parity.CASES:
            references["transformers"] = parity.run_hf(model, weights, batch)
        for reference, outcome in references.items():
            values = parity.differences(ours, outcome)
            logits = values.pop("logits")
            worst = max(values, key=values.__getitem__)
            print(f"{name:30s} {reference:12s} {logits:8.1e} {values[worst]:8.1e}  {worst}")
    destroy_groups()
    shutdown_distributed()


if __name__ == "__main__":
    main()
