"""Checkpoints of a training run: sharded, atomic, loadable in any layout.

SAVE/step_XXXXXXXX/ is megatron-core's `torch_dist` format with our config.yaml and manifest.json; SAVE/latest names the newest. The
number is that of the steps done. A rank takes host memory for what it writes: of the optimizer's state its share among the
data-parallel ranks, of the weights what replica 0 has. Every function but `check_save_folder` is collective over the world, and
an error on one rank is raised on all.
"""

import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_m1.checkpoint import folders, manifest
from megatron_m1.checkpoint.state import (
    OptimizerState,
    Trained,
    optimizer_step,
    rng_state,
    set_rng_state,
)
from megatron_m1.checkpoint.together import from_rank_0, together
from megatron_m1.checkpoint.writer import Writing
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import CheckpointConfig, Config, ModelConfig
from megatron_m1.model.build import sharded_parameters

__all__ = ["Checkpointer", "check_save_folder", "load_checkpoint", "save_checkpoint"]

NOT_ARCHITECTURE = {"init", "init_std"}
CHANGEABLE = {"rope_theta", "max_position_embeddings"}
"""Model keys that may change when only the weights are taken over (context extension)."""


class Checkpointer:
    """Saves, asynchronously if `checkpoint.async_save`, to `checkpoint.save` and loads from `checkpoint.load`.

    Call `poll` after every step and `finish` at the end, or use it as a context manager: leaving it without an error, or with a
    FloatingPointError, finishes.
    trainer: an engine.trainer.Trainer.  checksums: compare those of every file when loading (reads the checkpoint once more, spread
    over the ranks); without it only presence and size are checked beforehand.
    """

    def __init__(self, config: Config, trainer: Trained, *, checksums: bool = True) -> None:
        self.config, self.trainer, self.checksums = config, trainer, checksums
        self.stage_state: dict[str, Any] = {}
        """What `load` found of the `stage_state` given to `save`."""
        self._writing: Writing | None = None

    def save(self, step: int, *, stage_state: dict[str, Any] | None = None) -> None:
        """Save the state after `step` steps. An asynchronous save before it is finished first.

        stage_state: what else the stage needs to go on, JSON values, the same on every rank.
        """
        self.finish()
        background = self.config.checkpoint.async_save
        self._writing = _start(
            self.trainer, self.config, step=step, background=background, stage_state=stage_state or {}
        )
        if not background:
            self.finish()

    def poll(self) -> None:
        """Publish an asynchronous save whose files all ranks have written. Raises ConfigError on every rank if writing failed."""
        if self._writing is not None and self._writing.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait for an asynchronous save and publish it; nothing to do without one. Raises like `poll`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.publish()

    def load(self) -> int:
        """Number of steps done: 0 without `checkpoint.load`, else as `load_checkpoint`."""
        if self.config.checkpoint.load is None:
            return 0
        step, self.stage_state = _load(self.trainer, self.config, None, None, self.checksums)
        return step

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or kind is FloatingPointError:  # every rank raises it, and what was saved before it is good
            self.finish()


def check_save_folder(checkpoint: CheckpointConfig) -> None:
    """Raises ConfigError if this rank cannot write to `checkpoint.save`, or make it, and if a run from step 0 would put its steps
    among those that it holds. Not collective."""
    if checkpoint.save is None:
        return
    save = Path(checkpoint.save)
    try:
        with tempfile.TemporaryFile(dir=next(folder for folder in (save, *save.parents) if folder.exists())):
            pass
    except OSError as error:
        raise ConfigError(
            f"checkpoint.save={save} cannot be written to: {error.strerror}; name another folder."
        ) from None
    pointer = save / folders.LATEST
    from_step_0 = checkpoint.load is None or checkpoint.weights_only
    if from_step_0 and pointer.exists():
        fresh = ", with checkpoint.weights_only=false" if checkpoint.weights_only else ""
        raise ConfigError(
            f"checkpoint.save={checkpoint.save} holds the steps of another run (newest: {pointer.read_text().strip()}), which a "
            f"run from step 0 would replace; set checkpoint.load to it to continue that run{fresh}, or checkpoint.save to another folder."
        )


def save_checkpoint(trainer: Trained, config: Config, *, step: int) -> Path:
    """Write the state after `step` steps to checkpoint.save; returns the final folder once `latest` names it."""
    return _start(trainer, config, step=step, background=False, stage_state={}).publish()


def load_checkpoint(
    trainer: Trained,
    config: Config,
    *,
    path: str | Path | None = None,
    weights_only: bool | None = None,
    checksums: bool = True,
) -> int:
    """Load weights, optimizer and (in the same layout) random number generators; returns the number of steps done.

    path: a save folder (its `latest` is taken) or a step folder; None: checkpoint.load. weights_only (None: the configuration's):
    leave all but the weights fresh and return 0; dtypes may then differ. checksums: see Checkpointer.
    Raises ConfigError for a missing or damaged file, naming it and the tensor; for another architecture, naming the keys; for
    tensors that are missing or of other shape or dtype; and if the data position would not be the saved one. What was in
    memory is then unusable if reading had begun.
    """
    return _load(trainer, config, path, weights_only, checksums)[0]


def _load(
    trainer: Trained, config: Config, path: str | Path | None, weights_only: bool | None, checksums: bool
) -> tuple[int, dict[str, Any]]:
    """(steps done, stage_state)"""
    weights_only = config.checkpoint.weights_only if weights_only is None else weights_only
    folder, metadata = _open(Path(path or config.checkpoint.load or ""), checksums)
    with together():
        _check_model(folder, config.model, weights_only)
    weights = sharded_parameters(trainer.models)
    wanted: dict[str, Any] = dict(weights)
    saved: dict[str, Any] = {}
    if not weights_only:
        with together():
            saved = _saved_position(folder, trainer)
        optimizer = OptimizerState(trainer.optimizer, weights, loading=True)
        wanted |= optimizer.tensors
    with together():
        _check_tensors(folder, metadata, wanted, same_dtype=not weights_only)
    same_layout = saved.get("layout") == _layout(trainer)
    if same_layout:
        wanted["rng_state"] = rng_state()
    with together():
        loaded = _read(folder, metadata, wanted)
        for name, weight in weights.items():
            weight.data.detach().copy_(loaded[name])
    if weights_only:
        if hasattr(trainer, "optimizer"):
            trainer.optimizer.reload_model_params()
        return 0, {}
    optimizer.restore(loaded, step=saved["optimizer_step"])
    if same_layout:
        set_rng_state(loaded["rng_state"])
    return saved["step"], saved.get("stage_state", {})


def _start(trainer: Trained, config: Config, *, step: int, background: bool, stage_state: dict[str, Any]) -> Writing:
    trainer.complete_parameters()
    weights = sharded_parameters(trainer.models)
    state: dict[str, Any] = {
        "tensors": weights | OptimizerState(trainer.optimizer, weights, loading=False).tensors,
        "rng_state": rng_state(),
        "training": {
            "step": step,
            "optimizer_step": optimizer_step(trainer.optimizer),
            "consumed_samples": trainer.consumed_samples(step),
            "layout": _layout(trainer),
            "stage_state": stage_state,
        },
    }
    return Writing(state, config, step=step, background=background)


def _layout(trainer: Trained) -> dict[str, int]:
    """Sizes that decide which rank holds what."""
    groups = trainer.groups
    sizes = {name: getattr(groups, name).size() for name in ("tp", "pp", "cp", "ep", "expt_tp", "dp")}
    return sizes | {"world": dist.get_world_size(), "chunks": len(trainer.models)}


def _open(path: Path, checksums: bool) -> tuple[Path, Metadata]:
    """The step folder and its `.metadata`, after all of its files were checked, spread over the ranks."""
    folder = path
    with together():
        if dist.get_rank() == 0:
            folder = folders.resolve(path)
    folder = from_rank_0(folder)
    metadata = None
    with together():
        metadata = manifest.read_metadata(folder)
        manifest.verify(folder, metadata, share=dist.get_rank(), shares=dist.get_world_size(), contents=checksums)
    assert metadata is not None
    return folder, metadata


def _check_model(folder: Path, model: ModelConfig, weights_only: bool) -> None:
    path = folder / "config.yaml"
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        saved = asdict(ModelConfig()) | stored
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; use another checkpoint.") from None
    except (yaml.YAMLError, TypeError, KeyError):
        raise ConfigError(f"{path} has no section `model`; restore it or use another checkpoint.") from None
    ours = asdict(model)
    ignored = NOT_ARCHITECTURE | (CHANGEABLE if weights_only else set())
    if saved["attn_type_list"] is None or ours["attn_type_list"] is None:
        saved["attn_type_list"] = _layer_types(saved)
        ours["attn_type_list"] = model.layer_types()
    different = [
        f"model.{key}={ours.get(key)} (checkpoint: {saved.get(key)})"
        for key in dict.fromkeys([*ours, *saved])
        if key not in ignored and ours.get(key) != saved.get(key)
    ]
    if different:
        raise ConfigError(
            f"{folder} holds another model: {'; '.join(different)}. Use its config.yaml or another checkpoint."
        )


def _layer_types(saved: dict[str, Any]) -> list[int]:
    return ModelConfig(
        num_hidden_layers=saved["num_hidden_layers"], attn_type_list=saved["attn_type_list"]
    ).layer_types()


def _saved_position(folder: Path, trainer: Trained) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch remarks that this rank reads by itself, as it shall
        saved = dist_checkpointing.load_common_state_dict(str(folder)).get("training")
    if saved is None:
        raise ConfigError(f"{folder} holds weights only (it was imported); set checkpoint.weights_only=true.")
    step, consumed = saved["step"], saved["consumed_samples"]
    ours = trainer.consumed_samples(step)
    if ours != consumed:
        raise ConfigError(
            f"{folder}: {consumed} sequences were consumed in {step} steps, but training.global_batch and batch_ramp say {ours}; "
            f"to change the batch from here on, keep them and add a batch_ramp stage with from_step={step}."
        )
    return saved


def _check_tensors(folder: Path, metadata: Metadata, wanted: dict[str, ShardedTensor], *, same_dtype: bool) -> None:
    for name, tensor in wanted.items():
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise ConfigError(
                f"{name} is not in {folder}; use a checkpoint of this model or set checkpoint.weights_only=true."
            )
        if tuple(stored.size) != tuple(tensor.global_shape):
            raise ConfigError(
                f"{name} has shape {list(stored.size)} in {folder}, the model wants {list(tensor.global_shape)}; "
                "use its config.yaml or another checkpoint."
            )
        if same_dtype and stored.properties.dtype != tensor.dtype:
            raise ConfigError(
                f"{name} is {stored.properties.dtype} in {folder}, the model wants {tensor.dtype}; keep training.precision, or set "
                "checkpoint.weights_only=true to start from the converted weights."
            )


def _read(folder: Path, metadata: Metadata, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return dist_checkpointing.load(dict(wanted), str(folder), validate_access_integrity=False)
    except (Exception, CheckpointException) as error:
        manifest.verify(folder, metadata)  # names the damage
        raise ConfigError(f"{folder} cannot be read ({error}); use another checkpoint.") from error
