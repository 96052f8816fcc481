"""Checkpoints of a run: exact resume, any layout into any other, and a loadable folder whatever goes wrong."""

import os
import shutil
import threading
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from megatron_m1.checkpoint.dcp import NativeReader
from megatron_m1.checkpoint.names import native_tensors
from megatron_m1.config.errors import ConfigError
from megatron_m1.platform.rank_pool import RankError
from tests.distributed.checkpoint_runs import MODEL, batches, make_trainer, steps, tiny_config, train

TP2_PP2 = {"tensor": 2, "pipeline": 2}
STEP_2, STEP_3 = "step_00000002", "step_00000003"


@pytest.fixture(scope="module")
def saved(rank_pool, tmp_path_factory):
    """A save folder with step 2, written by two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("saved")
    rank_pool.run(train, (tiny_config(folder), 2, (2,)), world=2)
    return folder


# --- exact and near resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {}),
        (2, {}),
        (2, {"distributed_optimizer": False}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, TP2_PP2),
    ],
    ids=["one rank", "DP2", "DP2 without distributed optimizer", "PP2 VPP2", "TP2xPP2"],
)
def test_the_same_layout_resumes_bit_identically(ranks, tmp_path, world, parallel, precision):
    config = tiny_config(tmp_path, precision=precision, **parallel)
    whole = ranks(world, train, config, 5, (3,), True)
    resumed = ranks(world, train, tiny_config(None, tmp_path, precision=precision, **parallel), 5, (), True)
    for before, after in zip(whole, resumed, strict=True):
        assert after.start == 3 and after.steps == before.steps[3:]
        assert before.state.keys() == after.state.keys()
        assert [name for name in before.state if not torch.equal(before.state[name], after.state[name])] == []


def test_other_layouts_continue_the_trajectory(ranks, tmp_path):
    legs = [
        (4, TP2_PP2),
        (2, {"expert": 2}),
        (1, {"distributed_optimizer": False}),
        (3, {"pipeline": 3, "last_stage_layers": 2}),
        (2, {"pipeline": 2}),
        (4, TP2_PP2),
    ]
    figures, load = [], None
    for number, (world, parallel) in enumerate(legs, start=1):
        config = tiny_config(tmp_path, load, **parallel)
        runs = ranks(world, train, config, number, (number,))
        assert {run.start for run in runs} == {number - 1}
        figures += runs[0].steps
        load = tmp_path
    whole = ranks(1, train, tiny_config(), len(legs))[0].steps
    torch.testing.assert_close(torch.tensor(figures), torch.tensor(whole), rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", [True, False], ids=["distributed to plain", "plain to distributed"])
def test_the_kind_of_optimizer_may_change(ranks, tmp_path, first):
    """bf16, where main weights differ from weights: all stored numbers survive the change to the bit."""
    before, after = tmp_path / "before", tmp_path / "after"
    ranks(2, train, tiny_config(before, precision="bf16", distributed_optimizer=first), 2, (2,))
    ranks(2, resave, tiny_config(after, before, precision="bf16", distributed_optimizer=not first))
    one, other = NativeReader(before / STEP_2), NativeReader(after / STEP_2)
    assert one.shapes == other.shapes and one.dtypes == other.dtypes
    kinds = {name.split(".")[2] for name in one.shapes if name.startswith("optimizer.")}
    assert kinds == {"param", "exp_avg", "exp_avg_sq"}
    for name, (rows, *_) in one.shapes.items():
        assert torch.equal(one.read(name, 0, rows), other.read(name, 0, rows)), name


def optimizer_tensors(rank, world, config):
    """Bytes of optimizer state that this rank holds in the host's memory to save and to load."""
    from megatron_m1.checkpoint.state import OptimizerState
    from megatron_m1.model.build import sharded_parameters

    trainer = make_trainer(config)
    weights = sharded_parameters(trainer.models)
    states = [OptimizerState(trainer.optimizer, weights, loading=loading).tensors for loading in (False, True)]
    return [sum(tensor.data.nbytes for tensor in tensors.values()) for tensors in states], sum(
        weight.data.nbytes for weight in weights.values()
    )


def test_the_host_memory_of_a_save_is_shared_by_data_parallel_ranks(ranks):
    """fp32: twice the weights in moments. A rank loads the parameters of which it has a part."""
    runs = ranks(4, optimizer_tensors, tiny_config())
    weights = runs[0][1]
    assert sum(saving for (saving, _), _ in runs) == 2 * weights
    assert max(saving for (saving, _), _ in runs) < 0.35 * 2 * weights
    assert max(loading for (_, loading), _ in runs) < 0.7 * 2 * weights


def resave(rank, world, config):
    from megatron_m1.checkpoint.native import load_checkpoint, save_checkpoint

    trainer = make_trainer(config)
    save_checkpoint(trainer, config, step=load_checkpoint(trainer, config))


def test_the_weights_have_the_native_names_and_values(ranks, tmp_path):
    run = ranks(2, train, tiny_config(tmp_path, precision="bf16", expert=2), 1, (1,), True)[0]
    reader = NativeReader(tmp_path / "step_00000001")
    expected = native_tensors(MODEL, torch.bfloat16)
    stored = {
        name: (reader.shapes[name], reader.dtypes[name]) for name in reader.shapes if not name.startswith("optimizer.")
    }
    assert stored == expected
    for name, (shape, dtype) in expected.items():
        weight = reader.read(name, 0, shape[0])
        local = run.state[name]
        assert torch.equal(weight[: local.shape[0]], local)
        if dtype == torch.bfloat16:  # core would swap main weights of one shape, see state.correct_order
            assert torch.equal(reader.read(f"optimizer.state.param.{name}", 0, shape[0]).bfloat16(), weight), name


def load_weights_only(rank, world, config):
    from megatron_m1.checkpoint.native import load_checkpoint

    trainer = make_trainer(config)
    start = load_checkpoint(trainer, config, weights_only=True)
    moments = [value for part in trainer.optimizer.chained_optimizers for value in part.optimizer.state.values()]
    loaded = {name: tensor.clone() for name, tensor in trainer.parameters().items()}
    first = trainer.train_step(batches(2, trainer.groups.dp.rank(), trainer.groups.dp.size()), lr=0.0)
    after = {name: tensor.clone() for name, tensor in trainer.parameters().items()}
    return start, moments, loaded, after, first.loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_only(ranks, saved, precision):
    config = replace(tiny_config(None, saved, precision=precision))
    config.model.rope_theta *= 2  # may change when only the weights are taken over
    start, moments, loaded, after, _ = ranks(1, load_weights_only, config)[0]
    assert start == 0 and moments == []
    reader = NativeReader(saved / STEP_2)
    for name, weight in loaded.items():
        stored = reader.read(name, 0, reader.shapes[name][0]).to(weight.dtype)
        assert torch.equal(weight, stored), name
        assert torch.equal(after[name], stored), f"{name}: the optimizer still has other main weights"


# --- asynchronous saves ----------------------------------------------------------------------------------------------


def train_during_a_slow_write(rank, world, config):
    """Steps 0, 1, save, steps 2, 3 while the writers wait; names in the save folder before and after the writers go on."""
    from megatron_m1.checkpoint import writer
    from megatron_m1.checkpoint.native import Checkpointer

    go_on, write_file = threading.Event(), writer.write_file

    def slow(*arguments):
        assert go_on.wait(60)
        return write_file(*arguments)

    trainer = make_trainer(config)
    with mock.patch.object(writer, "write_file", slow), Checkpointer(config, trainer) as checkpointer:
        figures = steps(trainer, 0, 2)
        checkpointer.save(2)
        for step in (2, 3):
            figures += steps(trainer, step, step + 1)
            checkpointer.poll()
        during = sorted(os.listdir(config.checkpoint.save))
        torch.distributed.barrier()
        go_on.set()
    return figures, during, sorted(os.listdir(config.checkpoint.save))


@pytest.mark.parametrize(
    "parallel", [{}, {"distributed_optimizer": False}], ids=["distributed optimizer", "plain optimizer"]
)
def test_training_goes_on_during_an_asynchronous_save(ranks, tmp_path, parallel):
    config = tiny_config(tmp_path, **parallel)
    config.checkpoint.async_save = True
    runs = ranks(2, train_during_a_slow_write, config)
    for _, during, after in runs:
        assert during == [f"{STEP_2}.partial"] and after == ["latest", STEP_2]
    resumed = ranks(2, train, tiny_config(None, tmp_path, **parallel), 4)
    assert resumed[0].start == 2 and resumed[0].steps == runs[0][0][2:]


def fail_in_the_background(rank, world, config):
    """The message that `poll` raises when the last rank cannot write; then save again."""
    from megatron_m1.checkpoint import writer
    from megatron_m1.checkpoint.native import Checkpointer

    trainer = make_trainer(config)
    steps(trainer, 0, 1)
    checkpointer = Checkpointer(config, trainer)
    full = mock.patch.object(writer, "write_file", side_effect=OSError(28, "No space left on device"))
    with full if rank == world - 1 else mock.MagicMock():
        checkpointer.save(1)
        with pytest.raises(ConfigError) as failure:
            while True:
                checkpointer.poll()
    checkpointer.save(1)
    checkpointer.finish()
    return str(failure.value)


def test_a_failed_background_write_is_raised_on_every_rank(ranks, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = tiny_config(tmp_path)
    config.checkpoint.async_save = True
    messages = ranks(2, fail_in_the_background, config)
    assert len(set(messages)) == 1
    assert "step_00000001.partial" in messages[0] and "rank 1" in messages[0] and "No space left" in messages[0]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_00000001", STEP_2]


def fail_at_the_end(rank, world, config):
    from megatron_m1.checkpoint import native, writer

    trainer = make_trainer(config)
    steps(trainer, 0, 1)
    target = writer.filesystem_async.FileSystemWriterAsync
    with (
        mock.patch.object(target, "finish", side_effect=OSError(28, "No space left on device")),
        pytest.raises(ConfigError) as failure,
    ):
        native.save_checkpoint(trainer, config, step=3)
    return str(failure.value)


def test_a_failure_of_rank_0_at_the_end_is_raised_on_every_rank(ranks, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    messages = ranks(2, fail_at_the_end, tiny_config(tmp_path))
    assert len(set(messages)) == 1 and "No space left" in messages[0]
    assert (tmp_path / "latest").read_text().strip() == STEP_2


# --- killed while saving ---------------------------------------------------------------------------------------------


def dying(point: str) -> AbstractContextManager:
    """Patch that kills the process at a point of the save, as kill -9 would."""
    from megatron_m1.checkpoint import folders, writer

    def die(*arguments):
        os._exit(9)

    def write_half(transforms, number, bucket):
        results = write_file(transforms, number, bucket)
        os.truncate(bucket[0], os.path.getsize(bucket[0]) // 2)
        assert results
        os._exit(9)

    def write_half_the_pointer(final):
        (final.parent / ".latest.0.tmp").write_text("step_")
        os._exit(9)

    write_file = writer.write_file
    owner, name, action = {
        "before the files": (writer, "write_file", die),
        "in a file": (writer, "write_file", write_half),
        "before .metadata": (writer.Writing, "_write_metadata", die),
        "before the manifest": (writer.manifest, "write_manifest", die),
        "before the rename": (folders, "publish", die),
        "before the pointer": (folders, "write_latest", die),
        "in the pointer": (folders, "write_latest", write_half_the_pointer),
        "before the retention": (folders, "remove_old", die),
    }[point]
    return mock.patch.object(owner, name, action)


def die_while_saving(rank, world, config, point, victim, step):
    from megatron_m1.checkpoint.native import Checkpointer

    trainer = make_trainer(config)
    checkpointer = Checkpointer(config, trainer)
    steps(trainer, checkpointer.load(), step)
    if rank == victim:
        with dying(point):
            checkpointer.save(step)
            checkpointer.finish()
    checkpointer.save(step)
    checkpointer.finish()


@pytest.mark.parametrize(
    ("point", "victim", "survivor", "background"),
    [
        ("before the files", 0, 2, False),
        ("in a file", 1, 2, False),
        ("in a file", 1, 2, True),
        ("before .metadata", 0, 2, False),
        ("before the manifest", 0, 2, False),
        ("before the rename", 0, 2, False),
        ("before the rename", 0, 2, True),
        ("before the pointer", 0, 2, False),
        ("in the pointer", 0, 2, False),
        ("before the retention", 0, 3, False),
    ],
)
def test_a_kill_leaves_a_loadable_checkpoint(ranks, saved, tmp_path, point, victim, survivor, background):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = tiny_config(tmp_path, tmp_path)
    config.checkpoint.async_save = background
    with pytest.raises(RankError, match=f"rank {victim} of 2 died with exit code 9"):
        ranks(2, die_while_saving, config, point, victim, 3)
    resumed = ranks(2, train, config, 4, (3, 4))
    assert {run.start for run in resumed} == {survivor}
    assert {name for name in os.listdir(tmp_path) if name.startswith("step_")} == {STEP_2, STEP_3, "step_00000004"}
    assert (tmp_path / "latest").read_text() == "step_00000004\n"


def test_a_kill_while_a_step_is_saved_anew(ranks, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    with pytest.raises(RankError, match="died with exit code 9"):
        ranks(2, die_between_renames, tiny_config(tmp_path))
    assert not (tmp_path / STEP_2).exists() and (tmp_path / "latest").read_text() == f"{STEP_2}\n"
    resumed = ranks(2, train, tiny_config(tmp_path, tmp_path), 3, (3,))
    assert resumed[0].start == 2
    assert sorted(os.listdir(tmp_path)) == ["latest", STEP_2, STEP_3]


def die_between_renames(rank, world, config):
    from megatron_m1.checkpoint import native

    rename = os.rename

    def rename_then_die(source, target):
        rename(source, target)
        if str(target).endswith(".replaced"):
            os._exit(9)

    with mock.patch.object(os, "rename", rename_then_die):
        native.save_checkpoint(make_trainer(config), config, step=2)


def test_retention_keeps_the_newest(ranks, tmp_path):
    config = tiny_config(tmp_path)
    config.checkpoint.keep, config.checkpoint.async_save = 2, True
    (tmp_path / "step_00000009").mkdir()  # of an earlier run: not ours to remove
    ranks(1, train, config, 4, (1, 2, 3, 4))
    assert sorted(os.listdir(tmp_path)) == ["latest", STEP_3, "step_00000004", "step_00000009"]


# --- bad input -------------------------------------------------------------------------------------------------------


def load_each(rank, world, cases):
    """{case: (message on this rank)} of loading with each configuration; "loaded" where nothing was wrong."""
    from megatron_m1.checkpoint.native import load_checkpoint
    from megatron_m1.parallel import destroy_groups

    messages, trainers = {}, {}
    for name, (config, checksums) in cases.items():
        key = (config.training.precision, config.model.num_hidden_layers, config.model.vocab_size)
        if key not in trainers:
            destroy_groups()
            trainers[key] = make_trainer(config)
        trainers[key].config = config
        try:
            load_checkpoint(trainers[key], config, checksums=checksums)
            messages[name] = "loaded"
        except ConfigError as error:
            messages[name] = str(error)
    return messages


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_bad_checkpoints_are_named_on_every_rank(ranks, saved, tmp_path):
    def case(name, change, checksums=True, **model):
        folder = tmp_path / name.replace(" ", "_").replace(".", "_")
        shutil.copytree(saved, folder)
        change(folder, folder / STEP_2)
        config = tiny_config(None, folder)
        config.model = replace(config.model, **model)
        cases[name] = (config, checksums)
        return config

    cases: dict = {}
    nothing = lambda save, step: None  # noqa: E731
    case("good", nothing)
    case("good without checksums", nothing, checksums=False)
    case("init may differ", nothing, init="normal", init_std=0.5)
    case("missing file", lambda save, step: (step / "__1_0.distcp").unlink())
    case("truncated", lambda save, step: os.truncate(step / "__0_0.distcp", 200_000), checksums=False)
    case("flipped bit", lambda save, step: flip(step / "__0_0.distcp", 300_000))
    case("flipped header", lambda save, step: flip(step / "__0_0.distcp", 0), checksums=False)
    case("metadata missing", lambda save, step: (step / ".metadata").unlink())
    case("metadata damaged", lambda save, step: flip(step / ".metadata", 1000))
    case("manifest missing", lambda save, step: (step / "manifest.json").unlink())
    case("manifest damaged", lambda save, step: (step / "manifest.json").write_text("{"))
    case("config missing", lambda save, step: (step / "config.yaml").unlink())
    case("pointer missing", lambda save, step: (save / "latest").unlink())
    case("pointer to nothing", lambda save, step: (save / "latest").write_text("step_00000007\n"))
    case("folder missing", lambda save, step: shutil.rmtree(save))
    case("another model", nothing, vocab_size=128, rope_theta=1e4)
    case("config of another model", lambda save, step: rewrite_model(step, vocab_size=128), vocab_size=128)
    case("another precision", nothing).training.precision = "bf16"
    case("another batch", nothing).training.global_batch = 8

    answers = ranks(2, load_each, cases)
    assert answers[0] == answers[1]
    expected = {
        "good": ["loaded"],
        "good without checksums": ["loaded"],
        "init may differ": ["loaded"],
        "missing file": ["__1_0.distcp", "which holds ", "is missing"],
        "truncated": ["__0_0.distcp has 200,000 of ", "it lacks (part of) "],
        "flipped bit": ["__0_0.distcp is damaged: the checksum of ", "is not that of manifest.json"],
        "flipped header": ["__0_0.distcp is damaged: the checksum of "],
        "metadata missing": [".metadata is missing"],
        "metadata damaged": [".metadata is damaged"],
        "manifest missing": ["manifest.json is missing"],
        "manifest damaged": ["manifest.json cannot be read"],
        "config missing": ["config.yaml cannot be read"],
        "pointer missing": ["holds no file `latest`"],
        "pointer to nothing": ["latest names 'step_00000007'", STEP_2],
        "folder missing": ["folder_missing does not exist"],
        "another model": ["model.vocab_size=128 (checkpoint: 64)", "model.rope_theta=10000.0 (checkpoint: 10000000.0)"],
        "config of another model": ["embedding.word_embeddings.weight has shape [64, 32]", "wants [128, 32]"],
        "another precision": ["is torch.float32 in", "wants torch.bfloat16", "training.precision"],
        "another batch": ["8 sequences were consumed in 2 steps", "say 16", "from_step=2"],
    }
    for name, parts in expected.items():
        assert all(part in answers[0][name] for part in parts), (name, answers[0][name])


def rewrite_model(step: Path, **changes) -> None:
    content = yaml.safe_load((step / "config.yaml").read_text())
    content["model"] |= changes
    (step / "config.yaml").write_text(yaml.safe_dump(content))


def load_imported(rank, world, config):
    """(message of a full load, steps of a load of the weights) of a checkpoint that holds weights only."""
    from megatron_m1.checkpoint.native import load_checkpoint

    trainer = make_trainer(config)
    with pytest.raises(ConfigError) as failure:
        load_checkpoint(trainer, config)
    return str(failure.value), load_checkpoint(trainer, config, weights_only=True), full_weights(trainer)


def full_weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.parameters().items()}


def test_imported_weights(ranks, tmp_path):
    from megatron_m1.checkpoint.dcp import NativeWriter

    step = tmp_path / "step_00000000"
    step.mkdir()
    (tmp_path / "latest").write_text("step_00000000\n")
    (step / "config.yaml").write_text(yaml.safe_dump({"model": asdict(MODEL)}))
    values = {name: torch.randn(shape) for name, (shape, _) in native_tensors(MODEL, torch.bfloat16).items()}
    with NativeWriter(step) as writer:
        writer.start_file()
        for name, value in values.items():
            writer.write(name, tuple(value.shape), 0, value)
        writer.finish({})
    message, start, weights = ranks(1, load_imported, tiny_config(None, tmp_path))[0]
    assert "holds weights only" in message and "checkpoint.weights_only=true" in message
    assert start == 0 and weights.keys() == values.keys()
    assert all(torch.equal(weights[name], values[name]) for name in values)


# --- the traps of megatron-core, put back ----------------------------------------------------------------------------


def mutant(name: str) -> AbstractContextManager:
    """Patch that puts a trap back."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_m1.checkpoint import state
    from megatron_m1.engine import trainer as engine_trainer
    from megatron_m1.model.experts import GroupedExperts

    def torch_adam():
        optimizer.Adam = distrib_optimizer.Adam = torch.optim.AdamW
        optimizer.USING_PYTORCH_OPTIMIZER = True
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = False

    def mark_only_under_expert_parallelism(self, *arguments, **options):
        construct(self, *arguments, **options)
        for weight in self.parameters():
            weight.allreduce = self.ep_group.size() == 1

    def forget_the_step(self, loaded, *, step):
        restore(self, loaded, step=0)

    construct, restore = GroupedExperts.__init__, state.OptimizerState.restore
    return {
        "none": lambda: mock.MagicMock(),
        "A: Adam of torch": lambda: mock.patch.object(engine_trainer, "install_adam", torch_adam),
        "A: step lost": lambda: mock.patch.object(state.OptimizerState, "restore", forget_the_step),
        "C: experts unmarked": lambda: mock.patch.object(
            GroupedExperts, "__init__", mark_only_under_expert_parallelism
        ),
    }[name]()


def train_mutant(rank, world, config, last, save_at, name):
    with mutant(name):
        run = train(rank, world, config, last, save_at)
    assert run.optimizers == 2, "experts have an optimizer of their own in every layout"
    return run.steps


def resume_one_rank_in_ep2(ranks, folder, name):
    """The check that every mutant must fail: one rank saves after two steps, EP2 continues as one rank would."""
    whole = ranks(1, train_mutant, tiny_config(folder), 4, (2,), name)[0]
    resumed = ranks(2, train_mutant, tiny_config(None, folder, expert=2), 4, (), name)[0]
    torch.testing.assert_close(torch.tensor(resumed), torch.tensor(whole[2:]), rtol=1e-5, atol=0)


def test_one_rank_resumes_in_ep2(ranks, tmp_path):
    resume_one_rank_in_ep2(ranks, tmp_path, "none")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("A: Adam of torch", "KeyError: 'step'"),
        ("A: step lost", "not close"),
        ("C: experts unmarked", "an optimizer of their own"),
    ],
)
def test_that_check_fails_with_a_trap_put_back(ranks, tmp_path, name, reason):
    with pytest.raises((RankError, AssertionError), match=reason):
        resume_one_rank_in_ep2(ranks, tmp_path, name)


def save_with_confused_order(rank, world, config):
    from megatron_m1.checkpoint import state

    with mock.patch.object(state, "correct_order", lambda part: None):
        return train(rank, world, config, 1, (1,))


def test_core_confuses_parameters_of_mixed_precision(ranks, tmp_path):
    """If this fails, core's order is right and state.correct_order can go."""
    with pytest.raises(RankError, match="must match the existing size"):
        ranks(1, save_with_confused_order, tiny_config(tmp_path, precision="bf16"))


def test_full_state_sees_every_number(ranks, tmp_path):
    """The bitwise tests compare something: weights, main weights, both moments, step, generators."""
    state = ranks(1, train, tiny_config(), 1, (), True)[0].state
    kinds = {name.split()[0] for name in state}
    assert {"main", "exp_avg", "exp_avg_sq", "step", "rng", "embedding.word_embeddings.weight"} <= kinds
