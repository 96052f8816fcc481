"""Import, export and verify on tiny models: bitwise, both formats, and with damaged input."""

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MiniMaxForCausalLM

from megatron_m1.checkpoint.hf import export_hf, import_hf, plan_export, plan_import, verify_hf
from megatron_m1.checkpoint.names import hf_tensors
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.load import from_yaml
from tests.hf_reference import hf_config, set_m1_slopes
from tests.model_cases import CASES, ORACLE_ONLY_CASES, random_weights

REPOSITORY = Path(__file__).parents[3]
INDEX = "model.safetensors.index.json"
MODELS = CASES | ORACLE_ONLY_CASES


def quiet(text: str) -> None:
    pass


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["gqa_1", "gqa_8", "heads_6", "shared_expert", "softmax_only"])
def test_round_trip_is_bitwise(name, dtype, write_hf, tmp_path):
    source = write_hf(MODELS[name], dtype=dtype)
    import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    export_hf(tmp_path / "native", tmp_path / "back", "minimax_m1", max_shard_bytes=20_000, log=quiet)
    before, after = tensors(source), tensors(tmp_path / "back")
    assert before.keys() == after.keys() == hf_tensors(MODELS[name], "minimax_m1").keys()
    assert all(same(before[key], after[key]) for key in before)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    result = verify_hf(tmp_path / "native", tmp_path / "back", "minimax_m1", log=quiet)
    assert (result.compared, result.mismatches, result.rounded) == (len(before), [], [])


def test_bfloat16_gates_come_back_as_bfloat16(write_hf, tmp_path):
    source = write_hf(CASES["base"])
    for file in source.glob("*.safetensors"):
        save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    export_hf(tmp_path / "native", tmp_path / "back", "minimax_m1", log=quiet)
    before, after = tensors(source), tensors(tmp_path / "back")
    assert all(same(before[key], after[key]) for key in before)


def test_dtype_option_rounds_and_says_so(write_hf, tmp_path):
    source = write_hf(CASES["base"], dtype=torch.float32)
    import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    lines: list[str] = []
    export_hf(tmp_path / "native", tmp_path / "back", "minimax_m1", dtype="bf16", log=lines.append)
    before, after = tensors(source), tensors(tmp_path / "back")
    for name, tensor in after.items():
        gate = name.endswith("moe.gate.weight")
        assert tensor.dtype == (torch.float32 if gate else torch.bfloat16)
        assert torch.equal(tensor, before[name].to(tensor.dtype))
    assert any("rounded" in line for line in lines)
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"
    result = verify_hf(tmp_path / "native", tmp_path / "back", "minimax_m1", log=quiet)
    assert result.mismatches == [] and len(result.rounded) > 50


@pytest.mark.parametrize("name", ["base", "gqa_8", "heads_6", "lightning_only_top3", "softmax_first"])
def test_transformers_loads_the_export_with_our_slopes(name, write_hf, tmp_path):
    model = CASES[name]
    source = write_hf(model, dtype=torch.float32)
    import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    export_hf(tmp_path / "native", tmp_path / "hf", "minimax", max_shard_bytes=1_000_000, log=quiet)
    loaded, info = MiniMaxForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == torch.float32
    config = loaded.config
    assert config.layer_types == hf_config(model).layer_types
    assert (config.full_attn_alpha_factor, config.linear_attn_beta_factor, config.mlp_alpha_factor) == (
        model.layernorm_full_attention_alpha,
        model.layernorm_linear_attention_beta,
        model.layernorm_mlp_alpha,
    )
    assert config.rope_parameters["rope_theta"] == model.rope_theta and config.eos_token_id is None
    weights = random_weights(model, seed=0, dtype=torch.float32)
    expert = "model.layers.1.block_sparse_moe.experts.2."
    gate_up = loaded.model.layers[1].mlp.experts.gate_up_proj[2]
    assert torch.equal(gate_up, torch.cat([weights[expert + "w1.weight"], weights[expert + "w3.weight"]]))
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])
    rebuilt, _ = MiniMaxForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    set_m1_slopes(rebuilt, model)
    ours, reference = dict(loaded.named_buffers()), dict(rebuilt.named_buffers())
    for key in ours:
        if "decay" in key or "slope" in key:
            torch.testing.assert_close(ours[key], reference[key], rtol=5e-5, atol=1e-30)


def test_transformers_output_imports(tmp_path):
    model = CASES["gqa_8"]
    torch.manual_seed(0)
    module = MiniMaxForCausalLM(hf_config(model))
    module.save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "native", "minimax", log=quiet)
    result = verify_hf(tmp_path / "native", tmp_path / "hf", "minimax", log=quiet)
    assert result.mismatches == [] and result.compared == len(hf_tensors(model, "minimax_m1"))
    config = from_yaml(tmp_path / "native/step_00000000/config.yaml").model
    assert config.rotary_dim == config.head_dim == 8 and config.layer_types() == model.layer_types()
    export_hf(tmp_path / "native", tmp_path / "back", "minimax", log=quiet)
    again, info = MiniMaxForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    for (name, ours), theirs in zip(module.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_foreign_slopes_are_noticed_on_import(tmp_path):
    MiniMaxForCausalLM(hf_config(CASES["heads_6"])).save_pretrained(tmp_path / "hf")
    lines: list[str] = []
    import_hf(tmp_path / "hf", tmp_path / "native", "minimax", log=lines.append)
    assert sum("other decays" in line for line in lines) == 2
    with pytest.raises(ConfigError, match="--strict"):
        import_hf(tmp_path / "hf", tmp_path / "strict", "minimax", strict=True, log=quiet)
    assert not (tmp_path / "strict").exists()


def test_export_says_what_transformers_computes_differently(write_hf, tmp_path):
    import_hf(write_hf(MODELS["prenorm_shared_expert_heads_6"]), tmp_path / "native", "minimax_m1", log=quiet)
    lines: list[str] = []
    with pytest.raises(ConfigError, match="--strict"):
        export_hf(tmp_path / "native", tmp_path / "hf", "minimax", strict=True, log=lines.append)
    assert not (tmp_path / "hf").exists()
    for word in ("rotary", "postnorm", "shared expert", "decay and state", "no power of two"):
        lines.clear()
        export_hf(tmp_path / "native", tmp_path / "hf", "minimax", overwrite=True, log=lines.append)
        assert any(word in line for line in lines), word
    lines.clear()
    export_hf(tmp_path / "native", tmp_path / "m1", "minimax_m1", strict=True, log=lines.append)
    assert not any("transformers differs" in line for line in lines)


@pytest.mark.parametrize("swapped", ["experts.0.w1.weight", "q_proj.weight", "input_layernorm.weight"])
def test_verify_finds_swapped_tensors(swapped, write_hf, tmp_path):
    source = write_hf(CASES["gqa_1"], files=1)
    import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    file = source / "model-00001-of-00001.safetensors"
    weights = load_file(file)
    other = {"w1": "w3", "q_proj": "k_proj", "input_layernorm": "post_attention_layernorm"}
    name = next(key for key in weights if key.endswith(swapped))
    part = next(key for key in other if key in name)
    partner = name.replace(part, other[part])
    weights[name], weights[partner] = weights[partner], weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    result = verify_hf(tmp_path / "native", source, "minimax_m1", log=quiet)
    assert {text.split(" in ")[0] for text in result.mismatches} == {name, partner}
    assert all(str(file) in text for text in result.mismatches)


def test_verify_finds_one_flipped_bit_and_another_config(write_hf, tmp_path):
    source = write_hf(CASES["base"])
    import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    file = source / "model-00002-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert len(verify_hf(tmp_path / "native", source, "minimax_m1", log=quiet).mismatches) == 1
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"layernorm_mlp_beta": 1.25}))
    (text,) = verify_hf(tmp_path / "native", source, "minimax_m1", log=quiet).mismatches
    assert "layernorm_mlp_beta" in text


def edit_index(folder: Path, name: str, file: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].pop(name)
    if file is not None:
        index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def rewrite(folder: Path, name: str, tensor: Tensor, *, as_name: str | None = None) -> None:
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].pop(name)
    index["weight_map"][as_name or name] = file
    (folder / INDEX).write_text(json.dumps(index))
    weights = load_file(folder / file)
    weights.pop(name)
    save_file(weights | {as_name or name: tensor}, folder / file)


W1 = "model.layers.2.block_sparse_moe.experts.3.w1.weight"


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def test_damaged_input_is_named_and_leaves_nothing(write_hf, tmp_path):
    source = write_hf(CASES["base"])
    healthy = {file: file.read_bytes() for file in source.iterdir()}
    shard = shard_of(source, W1)

    def truncate() -> None:
        shard.write_bytes(healthy[shard][: len(healthy[shard]) // 2])

    def truncate_in_the_header() -> None:
        shard.write_bytes(healthy[shard][:100])

    expert_4 = W1.replace("experts.3", "experts.4")
    damages = [
        (shard.unlink, "model.layers.* is missing"),
        (truncate, "model.layers.* is damaged or truncated"),
        (truncate_in_the_header, "model.layers.* is damaged or truncated"),
        (lambda: edit_index(source, W1, "model-00003-of-00003.safetensors"), f"{W1} is not in .*model-00003"),
        (lambda: edit_index(source, W1, "../secret.safetensors"), "only .safetensors files of the same folder"),
        (lambda: edit_index(source, W1, None), f"{W1} is missing from"),
        (lambda: rewrite(source, W1, torch.zeros(3, 3)), rf"{W1} in .*{shard.name} has shape \(3, 3\).*\(40, 48\)"),
        (lambda: rewrite(source, W1, torch.zeros(40, 48), as_name=expert_4), f"{expert_4} in .* num_local_experts=4"),
        (lambda: rewrite(source, W1, torch.zeros(40, 48).double()), f"{W1} in .*{shard.name} has dtype F64"),
        (lambda: (source / INDEX).write_text('{"weight_map": '), "index.json is damaged"),
    ]
    for damage, message in damages:
        damage()
        with pytest.raises(ConfigError, match=message):
            import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
        assert not (tmp_path / "native").exists(), message
        for file, content in healthy.items():
            file.write_bytes(content)
    import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)


def test_pickled_weights_are_refused(write_hf, tmp_path):
    source = write_hf(CASES["base"])
    for file in [*source.glob("*.safetensors"), source / INDEX]:
        file.unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, source / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled"):
        import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)


def test_damaged_native_file_is_named_and_export_leaves_nothing(write_hf, tmp_path):
    step = import_hf(write_hf(CASES["base"]), tmp_path / "native", "minimax_m1", log=quiet)
    file = step / "__0_3.distcp"
    healthy = file.read_bytes()
    flipped = bytearray(healthy)
    weights = load_file(shard_of(tmp_path / "source", W1))[W1].view(torch.uint8).numpy().tobytes()
    flipped[healthy.index(weights) + 17] ^= 1
    for content, message in ((healthy[: len(healthy) // 2], "damaged"), (bytes(flipped), "damaged"), (None, "missing")):
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match=message) as caught:
            export_hf(tmp_path / "native", tmp_path / "hf", "minimax_m1", log=quiet)
        assert "decoder.layers.2." in str(caught.value) and file.name in str(caught.value)
        assert not list((tmp_path / "hf").glob("*model*")) and not list((tmp_path / "hf").glob(".*"))


def test_checkpoint_of_another_model_is_refused(write_hf, tmp_path):
    step = import_hf(write_hf(CASES["base"]), tmp_path / "native", "minimax_m1", log=quiet)
    config = (step / "config.yaml").read_text()
    for old, new, message in (
        ("intermediate_size: 40", "intermediate_size: 48", "shape"),
        ("shared_intermediate_size: 0", "shared_intermediate_size: 8", "shared_mlp.* is missing"),
    ):
        assert old in config
        (step / "config.yaml").write_text(config.replace(f"\n  {old}", f"\n  {new}"))
        with pytest.raises(ConfigError, match=message):
            export_hf(tmp_path / "native", tmp_path / "hf", "minimax_m1", log=quiet)


def test_existing_output_is_kept_unless_overwritten(write_hf, tmp_path):
    source = write_hf(CASES["base"])
    step = import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    (step / "mark").touch()
    with pytest.raises(ConfigError, match="--overwrite"):
        import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    assert (step / "mark").exists()
    import_hf(source, tmp_path / "native", "minimax_m1", overwrite=True, log=quiet)
    assert not (step / "mark").exists() and (tmp_path / "native/latest").read_text().strip() == step.name
    assert {path.name for path in (tmp_path / "native").iterdir()} == {"latest", step.name}

    export_hf(step, tmp_path / "hf", "minimax_m1", max_shard_bytes=20_000, log=quiet)
    before = sorted(path.name for path in (tmp_path / "hf").iterdir())
    (tmp_path / "hf/notes.md").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        export_hf(step, tmp_path / "hf", "minimax_m1", log=quiet)
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted([*before, "notes.md"])
    export_hf(step, tmp_path / "hf", "minimax_m1", overwrite=True, log=quiet)
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json", "notes.md", INDEX, "model-00001-of-00001.safetensors",
    }  # fmt: skip


def test_interrupted_conversion_leaves_no_final_name(write_hf, tmp_path, monkeypatch):
    source = write_hf(CASES["base"])
    import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)

    def interrupt(*_: object, **__: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_m1.checkpoint.hf_files.HfWriter.finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_hf(tmp_path / "native", tmp_path / "hf", "minimax_m1", log=quiet)
    assert not list((tmp_path / "hf").glob("*.safetensors*")) and not list((tmp_path / "hf").glob(".*"))
    monkeypatch.setattr("megatron_m1.checkpoint.dcp.NativeWriter.finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_hf(source, tmp_path / "second", "minimax_m1", log=quiet)
    assert list((tmp_path / "second").iterdir()) == []


def test_written_files_are_valid_safetensors_and_bounded(write_hf, tmp_path):
    import_hf(write_hf(CASES["base"]), tmp_path / "native", "minimax_m1", log=quiet)
    export_hf(tmp_path / "native", tmp_path / "hf", "minimax_m1", max_shard_bytes=30_000, log=quiet)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(tmp_path / "hf" / file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            sizes = [handle.get_tensor(key).nbytes for key in handle.keys()]  # noqa: SIM118
            assert sum(sizes) <= 30_000 or len(sizes) == 1
            total += sum(sizes)
    assert total == index["metadata"]["total_size"]


def test_plans_are_exact_and_write_nothing(write_hf, tmp_path):
    model = CASES["base"]
    source = write_hf(model)
    plan = plan_import(source, tmp_path / "native", "minimax_m1")
    assert not (tmp_path / "native").exists()
    counts = {name: math.prod(shape) for name, shape in hf_tensors(model, "minimax_m1").items()}
    gates = sum(count for name, count in counts.items() if name.endswith("moe.gate.weight"))
    assert plan.read_bytes == 2 * sum(counts.values()) + 2 * gates
    assert plan.write_bytes == plan.read_bytes + 2 * counts["lm_head.weight"]
    step = import_hf(source, tmp_path / "native", "minimax_m1", log=quiet)
    files = [path for path in tmp_path.joinpath("native").rglob("*") if path.is_file()]
    assert plan.files == len(files), sorted(path.name for path in files)
    assert sum(path.stat().st_size for path in step.glob("*.distcp")) >= plan.write_bytes
    export = plan_export(tmp_path / "native", tmp_path / "hf", "minimax_m1", max_shard_bytes=30_000)
    assert not (tmp_path / "hf").exists()
    export_hf(tmp_path / "native", tmp_path / "hf", "minimax_m1", max_shard_bytes=30_000, log=quiet)
    assert export.files == len(list((tmp_path / "hf").iterdir()))
    assert export.write_bytes == sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))


@pytest.fixture
def tool(capsys) -> Callable[..., tuple[int, str, str]]:
    """tool(*arguments) -> exit code, standard output, standard error of tools/convert_checkpoint.py."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", REPOSITORY / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = module.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_command_line(write_hf, tmp_path, tool):
    source, native, out = write_hf(CASES["base"]), tmp_path / "native", tmp_path / "out"
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    common = ("--checkpoint", native, "--format", "minimax_m1")
    code, output, _ = tool("import", "--hf", source, *common, "--plan")
    assert code == 0 and "bytes" in output and not native.exists()
    assert tool("import", "--hf", source, *common)[0] == 0
    code, output, _ = tool("export", "--hf", out, *common, "--plan")
    assert code == 0 and "bytes" in output and not out.exists()
    assert tool("export", "--hf", out, *common, "--max-shard-size", "20KB", "--tokenizer", tokenizer)[0] == 0
    assert (out / "tokenizer.json").exists()
    code, output, _ = tool("verify", "--hf", out, *common)
    assert code == 0 and " 0 differences" in output
    file = sorted(out.glob("*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, output, _ = tool("verify", "--hf", out, *common)
    assert code == 1 and file.name in output and ", 1 differences" in output


def test_command_line_as_a_process_ends_bad_input_with_one_line(tmp_path):
    command = [
        sys.executable,
        "tools/convert_checkpoint.py",
        "import",
        "--hf",
        tmp_path / "no",
        "--checkpoint",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
