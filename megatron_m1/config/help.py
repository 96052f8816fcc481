"""What `--help` says of every key: the docstrings of the schema. Which key does what an option of Megatron-LM does."""

import ast
import inspect
import typing

from jsonargparse import ArgumentParser

from megatron_m1.config import schema

__all__ = ["MEGATRON_OPTIONS", "describe_keys", "key_texts"]

MEGATRON_OPTIONS = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "bf16": "training.precision",
    "context_parallel_size": "parallel.context",
    "data_path": "data.train",
    "decoder_last_pipeline_num_layers": "parallel.last_stage_layers",
    "eval_interval": "evaluation.every_steps",
    "eval_iters": "evaluation.batches",
    "exit_duration_in_mins": "training.exit_after_s",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert_tensor",
    "ffn_hidden_size": "model.intermediate_size",
    "finetune": "checkpoint.weights_only",
    "global_batch_size": "training.global_batch",
    "init_method_std": "model.init_std",
    "kv_channels": "model.head_dim",
    "log_interval": "logging.every_steps",
    "lr_decay_iters": "schedule.decay_steps",
    "lr_decay_style": "schedule.kind",
    "lr_warmup_iters": "schedule.warmup_steps",
    "micro_batch_size": "training.micro_batch",
    "mock_data": "data.mock",
    "moe_aux_loss_coeff": "moe.aux_loss_coefficient",
    "moe_expert_capacity_factor": "moe.capacity_factor",
    "moe_ffn_hidden_size": "model.intermediate_size",
    "moe_router_topk": "model.num_experts_per_tok",
    "moe_token_dispatcher_type": "moe.dispatcher",
    "moe_z_loss_coeff": "moe.z_loss_coefficient",
    "norm_epsilon": "model.rms_norm_eps",
    "num_experts": "model.num_local_experts",
    "num_layers": "model.num_hidden_layers",
    "num_query_groups": "model.num_key_value_heads",
    "num_virtual_stages_per_pipeline_rank": "parallel.virtual_pipeline",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "rampup_batch_size": "training.batch_ramp",
    "recompute_granularity": "training.recompute",
    "recompute_num_layers": "training.recompute_layers",
    "rotary_base": "model.rope_theta",
    "save_interval": "checkpoint.every_steps",
    "sequence_parallel": "parallel.sequence",
    "tensor_model_parallel_size": "parallel.tensor",
    "tensorboard_dir": "logging.dir",
    "tokenizer_model": "data.tokenizer",
    "train_data_path": "data.train",
    "train_iters": "training.steps",
    "use_distributed_optimizer": "parallel.distributed_optimizer",
    "valid_data_path": "data.valid",
}
"""Options of Megatron-LM's pretrain_gpt.py (underscores for hyphens) that have another name here."""


def describe_keys(parser: ArgumentParser) -> None:
    """Put the docstrings of sections and keys, and a short usage line, into the help of `parser`."""
    texts = key_texts()
    parser.usage = "%(prog)s COMMAND [--config FILE ...] [--section.key VALUE ...]"
    for action in parser._actions:
        if action.help is None and action.dest in texts:
            action.help = texts[action.dest].replace("%", "%%")
    sections = {str(kind): name for name, kind in _sections().items()}
    for group in parser._action_groups:
        name = sections.get(group.title or "")
        if name is not None:
            group.title, group.description = name, texts.get(name)


def key_texts() -> dict[str, str]:
    """The docstrings of the dotted keys and sections (`model`) that have one, each on one line."""
    classes = {node.name: node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)}
    texts = {}
    for section, kind in _sections().items():
        node = classes[kind.__name__]
        texts[section] = ast.get_docstring(node) or ""
        for statement, following in zip(node.body, node.body[1:]):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[f"{section}.{key}"] = text
    return {key: " ".join(text.split()) for key, text in texts.items() if text}


def _sections() -> dict[str, type]:
    return typing.get_type_hints(schema.Config)
