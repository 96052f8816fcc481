"""Training, loading and checking tokenizers."""

import json
from pathlib import Path

import pytest
import tokenizers

from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import DataConfig
from megatron_m1.data.dataset import TokenDataset
from megatron_m1.data.token_file import TokenFileWriter, token_dtype
from megatron_m1.data.tokenizer import EOD_TOKEN, Tokenizer
from megatron_m1.data.train_tokenizer import train_tokenizer

TEXT = "def f(x):\n    return x + 1\n\n" * 40 + "class A:\n    pass  # naïve 中文 🙂\n" * 20


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "tok", vocab_size=290, globs=[])
    return tmp_path / "tok"


def test_training_is_deterministic(directory: Path, tmp_path: Path) -> None:
    train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "again", vocab_size=290, globs=[])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_round_trip_and_eod(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    assert tokenizer.vocab_size == 290 and tokenizer.eod_id == 0
    text = " \n\x00 any text: Ωß 🙂\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([*tokenizer.encode("a"), 0]) == "a"
    assert tokenizer.decode([0], skip_special=False) == EOD_TOKEN


def test_special_tokens_in_text_are_text(directory: Path) -> None:
    """A document that spells <eod> must not be able to end itself."""
    tokenizer = Tokenizer(directory)
    ids = tokenizer.encode(f"a{EOD_TOKEN}b")
    assert 0 not in ids and tokenizer.decode(ids) == f"a{EOD_TOKEN}b"
    assert 0 in tokenizer.encode(f"a{EOD_TOKEN}b", parse_special=True)
    assert 0 not in tokenizer.encode(EOD_TOKEN)


def test_stored_truncation_is_not_applied(directory: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(directory / "tokenizer.json"))
    assert len(Tokenizer(directory).encode("def f(x): return x + 1 class")) > 9
    assert len(Tokenizer(directory).encode("x")) == 1


def test_transformers_reads_it(directory: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(directory))
    assert theirs.eos_token == EOD_TOKEN and theirs.eos_token_id == 0
    assert theirs(TEXT)["input_ids"] == Tokenizer(directory).encode(TEXT)
    assert theirs.decode(theirs(TEXT)["input_ids"]) == TEXT


def test_eod_is_found(directory: Path) -> None:
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "!"}}))
    assert Tokenizer(directory).eod_id == Tokenizer(directory).backend.token_to_id("!")
    assert Tokenizer(directory, eod_token=EOD_TOKEN).eod_id == 0
    config.unlink()
    assert Tokenizer(directory).eod_id == 0
    with pytest.raises(ConfigError, match=r"'</s>' is not in .*tokenizer\.json"):
        Tokenizer(directory, eod_token="</s>")


def test_bad_tokenizers(directory: Path, tmp_path: Path) -> None:
    Tokenizer(directory, model_vocab_size=290)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=289 is smaller than the 290 tokens"):
        Tokenizer(directory, model_vocab_size=289)
    with pytest.raises(ConfigError, match=r"nowhere/tokenizer\.json does not exist"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists; choose another --output"):
        train_tokenizer([str(tmp_path / "text.txt")], directory, vocab_size=290, globs=[])
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "x", vocab_size=256, globs=[])
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(directory)


def test_files_of_another_tokenizer_are_refused(directory: Path, tmp_path: Path) -> None:
    sha256 = Tokenizer(directory).sha256
    for name, digest in (("right", sha256), ("wrong", "0" * 64)):
        with TokenFileWriter(tmp_path / name, token_dtype(300), metadata={"tokenizer_sha256": digest}) as writer:
            writer.add_document(list(range(20)))
    options = {"seq_length": 4, "seed": 1, "split": "train", "vocab_size": 300}
    config = DataConfig(train=[str(tmp_path / "right")], tokenizer=str(directory))
    assert TokenDataset(config, **options).windows == 4
    config.train = [str(tmp_path / "wrong")]
    with pytest.raises(ConfigError, match="wrong was made with another tokenizer"):
        TokenDataset(config, **options)
