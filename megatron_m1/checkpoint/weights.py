"""The weights alone of a native checkpoint, into whatever layout the model has."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from megatron_m1.checkpoint.dcp import NativeReader
from megatron_m1.config.errors import ConfigError
from megatron_m1.model.build import sharded_parameters

__all__ = ["load_weights", "step_folder", "stored_precision"]


def step_folder(checkpoint: Path) -> Path:
    """The step folder that `checkpoint` is, or that its `latest` names. Raises ConfigError if there is none."""
    if (checkpoint / ".metadata").is_file():
        return checkpoint
    pointer = checkpoint / "latest"
    if not pointer.is_file():
        what = "has neither `latest` nor .metadata" if checkpoint.is_dir() else "does not exist"
        raise ConfigError(f"--checkpoint={checkpoint} {what}; name a folder that training or an import has written.")
    step = checkpoint / pointer.read_text(encoding="utf-8").strip()
    if not (step / ".metadata").is_file():
        raise ConfigError(
            f"{pointer} names {step.name}, which is no complete checkpoint; name a step folder of {checkpoint}."
        )
    return step


def stored_precision(step: Path) -> str:
    """`fp32` or `bf16`: what the matrices in the step folder are stored in."""
    dtypes = NativeReader(step).dtypes
    name = "embedding.word_embeddings.weight"
    if name not in dtypes:
        raise ConfigError(f"{name} is missing from {step}; it is not a checkpoint of this program.")
    return "bf16" if dtypes[name] == torch.bfloat16 else "fp32"


def load_weights(step: Path, models: list[torch.nn.Module]) -> None:
    """Fill the parameters of this rank's model chunks from the step folder; every rank of the job must take part.

    Values are cast to the dtype of the parameters. Raises ConfigError, on every rank that holds the tensor, for one that is
    missing or has another shape, and for files that cannot be read.
    """
    parameters = sharded_parameters(models)
    reader = NativeReader(step)
    for name, sharded in parameters.items():
        if name not in reader.shapes:
            raise ConfigError(
                f"{name} is missing from {step}, though its config.yaml asks for it; use another checkpoint."
            )
        if reader.shapes[name] != tuple(sharded.global_shape):
            raise ConfigError(
                f"{name} in {step} has shape {list(reader.shapes[name])}; its config.yaml implies "
                f"{list(sharded.global_shape)}; the file was changed or belongs to another checkpoint."
            )
    destinations = {name: sharded.data for name, sharded in parameters.items()}
    try:
        loaded = dist_checkpointing.load(dict(parameters), str(step))
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ConfigError(f"the weights in {step} cannot be read ({reason}); the checkpoint is damaged.") from error
    with torch.no_grad():
        for name, destination in destinations.items():
            if loaded[name].data_ptr() != destination.data_ptr():
                destination.copy_(loaded[name])
