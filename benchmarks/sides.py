"""The two sides of the benchmark: one training step (forward, backward, clipping, AdamW) behind one interface."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.stages import label_modules, label_stage
from megatron_m1.config.schema import Config

__all__ = ["SIDES", "Ours", "Side", "Transformers"]

Batch = list[tuple[Tensor, Tensor]]
"""One optimizer step: per micro-batch token_ids and labels, int64 [micro_batch, seq_length]."""


class Side(Protocol):
    @staticmethod
    def prepare() -> None:
        """Import what the side needs, so that the memory of the imports can be told apart."""

    def step(self, batch: Batch) -> float:
        """Loss in nats per token of one whole training step."""

    def labelled(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the steps carry stage labels."""

    def settings(self) -> dict[str, object]:
        """What was chosen beyond the configuration."""


class Transformers:
    """MiniMaxForCausalLM with torch.optim.AdamW(fused) and the parameter shapes of `config`."""

    @staticmethod
    def prepare() -> None:
        from transformers import MiniMaxForCausalLM  # noqa: F401

    def __init__(self, config: Config, *, experts: str, block_size: int) -> None:
        from transformers import MiniMaxConfig, MiniMaxForCausalLM

        model = config.model
        torch.manual_seed(config.training.seed)
        self._settings = {
            "experts": experts,
            "block_size": block_size,
            "attention": "sdpa",
            "optimizer": "AdamW(fused)",
        }
        self.module = MiniMaxForCausalLM._from_config(
            MiniMaxConfig(
                vocab_size=model.vocab_size,
                hidden_size=model.hidden_size,
                intermediate_size=model.intermediate_size,
                num_hidden_layers=model.num_hidden_layers,
                num_attention_heads=model.num_attention_heads,
                num_key_value_heads=model.num_key_value_heads,
                head_dim=model.head_dim,
                num_local_experts=model.num_local_experts,
                num_experts_per_tok=model.num_experts_per_tok,
                max_position_embeddings=config.training.seq_length,
                rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
                layer_types=["full_attention" if kind else "linear_attention" for kind in model.layer_types()],
                block_size=block_size,
                use_cache=False,
                full_attn_alpha_factor=model.layernorm_full_attention_alpha,
                full_attn_beta_factor=model.layernorm_full_attention_beta,
                linear_attn_alpha_factor=model.layernorm_linear_attention_alpha,
                linear_attn_beta_factor=model.layernorm_linear_attention_beta,
                mlp_alpha_factor=model.layernorm_mlp_alpha,
                mlp_beta_factor=model.layernorm_mlp_beta,
            ),
            attn_implementation="sdpa",
            dtype=torch.float32,
        ).train()
        self.module.set_experts_implementation(experts)
        self.aux_coefficient = 0.0 if config.moe.aux_loss == "none" else config.moe.aux_loss_coefficient
        self.clip_grad = config.optimizer.clip_grad
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for token_ids, labels in batch:
            output = self.module(token_ids, output_router_logits=self.aux_coefficient > 0)
            with label_stage("loss"):
                loss = cross_entropy(output.logits.flatten(0, 1), labels.flatten())
            total += loss.item() / len(batch)
            if self.aux_coefficient > 0:
                loss = loss + self.aux_coefficient * output.aux_loss
            (loss / len(batch)).backward()
        with label_stage("optimizer"):
            if self.clip_grad > 0:
                nn.utils.clip_grad_norm_(self.module.parameters(), self.clip_grad)
            self.optimizer.step()
        return total

    @contextlib.contextmanager
    def labelled(self) -> Iterator[None]:
        names = {
            "MiniMaxLightningAttention": "lightning attention",
            "MiniMaxAttention": "softmax attention",
            "MiniMaxTopKRouter": "router",
            "MiniMaxSparseMoeBlock": "dispatch",
            "MiniMaxExperts": "experts",
            "MiniMaxDecoderLayer": "residuals",
            "MiniMaxRMSNorm": "norm",
            "Embedding": "embedding",
        }

        def stage_of(module: nn.Module) -> str | None:
            return "head" if module is self.module.lm_head else names.get(type(module).__name__)

        with label_modules(self.module, stage_of):
            yield

    def settings(self) -> dict[str, object]:
        return dict(self._settings)


class Ours:
    """megatron_m1's Trainer on one rank, as `pretrain` runs it."""

    @staticmethod
    def prepare() -> None:
        from megatron_m1 import platform

        platform.setup()
        import megatron_m1.engine.trainer  # noqa: F401

    def __init__(self, config: Config) -> None:
        from megatron_m1.engine.distributed import init_distributed
        from megatron_m1.engine.trainer import Trainer
        from megatron_m1.parallel import init_groups

        init_distributed(config.parallel.timeout_s)
        self.lr = config.optimizer.lr
        self.trainer = Trainer(config, init_groups(config.parallel, seed=config.training.seed))

    def step(self, batch: Batch) -> float:
        micro_batches = [
            {
                "tokens": token_ids,
                "labels": labels,
                "loss_mask": torch.ones(token_ids.shape),
                "position_ids": torch.arange(token_ids.shape[1]).expand_as(token_ids).contiguous(),
            }
            for token_ids, labels in batch
        ]
        return self.trainer.train_step(micro_batches, lr=self.lr).loss

    @contextlib.contextmanager
    def labelled(self) -> Iterator[None]:
        names = {
            "LightningAttention": "lightning attention",
            "SoftmaxAttention": "softmax attention",
            "M1Router": "router",
            "MoELayer": "dispatch",
            "GroupedExperts": "experts",
            "RMSNorm": "norm",
            "TensorParallelRMSNorm": "norm",
            "LanguageModelEmbedding": "embedding",
            "M1Layer": "residuals",
        }
        (model,) = self.trainer.models

        def stage_of(module: nn.Module) -> str | None:
            return "head" if module is model.module.output_layer else names.get(type(module).__name__)

        optimizer_step = self.trainer.optimizer.step

        def labelled_step() -> object:
            with label_stage("optimizer"):
                return optimizer_step()

        with label_modules(model, stage_of):
            self.trainer.optimizer.step = labelled_step
            try:
                yield
            finally:
                self.trainer.optimizer.step = optimizer_step

    def settings(self) -> dict[str, object]:
        return {}


SIDES: dict[str, type[Side]] = {"ours": Ours, "transformers": Transformers}
