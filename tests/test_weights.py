"""Weight files: tensors and modules there and back; what does not fit is named before it takes memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dalle import files, manifest, weights
from dalle.config import Config


class Widths(Config):
    d_in: int
    d_out: int


class Layer(nn.Module):
    def __init__(self, config: Widths) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.d_in, config.d_out)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "linear.weight": torch.randn(3, 2, generator=random),
        "linear.bias": torch.randn(3, generator=random),
        "steps": torch.tensor(7),
        "mask": torch.tensor([False, True]),
    }


@pytest.fixture
def model(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    folder = tmp_path / "model"
    weights.save_component(folder / "dvae", Widths(d_in=2, d_out=3), tensors)
    weights.save_component(folder / "clip", Widths(d_in=2, d_out=3), tensors)
    manifest.write_manifest(folder)
    return folder


def load(folder: Path | str) -> Layer:
    return weights.load_module(folder, Widths, Layer, "dvae")


def message_of(call: Callable[[], object], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_survive_the_round_trip_as_they_are(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "float": table,
        "tied": table,
        "transposed": table.T,
        "row": table[1],
        "bfloat16": table.bfloat16(),
        "integer": torch.tensor(5),
        "boolean": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    weights.save_tensors(tmp_path / "a.safetensors", tensors, metadata={"step": "3"})
    loaded = weights.load_tensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.detach())
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"step": "3"}


def test_a_truncated_safetensors_file_is_one_line_at_every_length(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    path = tmp_path / "a.safetensors"
    weights.save_tensors(path, tensors)
    data = path.read_bytes()
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        line = message_of(lambda: weights.load_tensors(path))
        assert line.startswith(f"{path}: not a whole safetensors file (")


@pytest.mark.parametrize("data", [b"PK\x03\x04" + b"\0" * 100, b"\xff" * 64, b"\x02" + b"\0" * 7 + b"{}x"])
def test_junk_is_no_safetensors_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert "not a whole safetensors file" in message_of(lambda: weights.load_tensors(tmp_path / "a"))


def test_tensors_sha256_sees_names_dtypes_shapes_and_bytes_only(tensors: dict[str, Tensor]) -> None:
    tensors |= {"half": torch.ones(2, 3).bfloat16(), "empty": torch.zeros(0)}
    digest = weights.tensors_sha256(tensors)
    assert weights.tensors_sha256(dict(reversed(tensors.items()))) == digest
    assert weights.tensors_sha256(tensors | {"linear.weight": tensors["linear.weight"].T.clone().T}) == digest
    ones = tensors["half"]
    others = [
        {"half": ones.half()},
        {"half": ones.T},
        {"half": ones.view(torch.int16)},
        {"half": -ones},
        {"other": ones},
    ]
    assert len({digest, *(weights.tensors_sha256(tensors | other) for other in others)}) == 6


# Components


def test_a_component_survives_the_round_trip(
    model: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors["linear.bias"] = tensors["linear.bias"].bfloat16()
    weights.save_component(model / "dvae", Widths(d_in=2, d_out=3), tensors)
    manifest.write_manifest(model)
    monkeypatch.chdir(model / "dvae")
    for folder in (model / "dvae", str(model / "dvae"), ".", "../dvae"):
        loaded = load(folder)
        assert loaded.config == Widths(d_in=2, d_out=3) and not loaded.training
        assert loaded.linear.bias.dtype == torch.float32  # the module's
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, tensors[name].to(value.dtype))


def test_a_component_alone_needs_no_manifest(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    weights.save_component(tmp_path / "dvae", Widths(d_in=2, d_out=3), tensors)
    assert load(tmp_path / "dvae").config.d_out == 3


def test_a_wrong_config_is_refused_before_the_weights_are_read(model: Path) -> None:
    (model / "manifest.json").unlink()
    files.write_json(model / "dvae/config.json", {"d_inn": 2, "d_out": 3})
    (model / "dvae/model.safetensors").write_bytes(b"junk")
    line = message_of(lambda: load(model / "dvae"))
    assert line == f"{model}/dvae/config.json: d_inn is not a setting; did you mean d_in?"


def test_a_missing_component_is_named(model: Path) -> None:
    line = message_of(lambda: load(model / "transformer"))
    assert line == f"{model}/transformer: no such folder"


def test_load_strict_copies_every_tensor_and_casts_floats(tensors: dict[str, Tensor]) -> None:
    layer = Layer(Widths(d_in=2, d_out=3)).double()
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in tensors.items()}
    weights.load_strict(layer, half, "dvae")
    assert layer.linear.weight.dtype == torch.float64
    for key, value in layer.state_dict().items():
        assert torch.equal(value, half[key].to(value.dtype))
    layer.state_dict()["linear.bias"].zero_()
    assert half["linear.bias"].all()  # a copy, not the same memory


def test_load_strict_lists_all_that_does_not_fit_and_copies_nothing(tensors: dict[str, Tensor]) -> None:
    layer = Layer(Widths(d_in=2, d_out=3))
    before = weights.tensors_sha256(layer.state_dict())
    del tensors["linear.bias"]
    tensors |= {"linear.weight": torch.zeros(4, 2), "steps": torch.tensor(1.5), "extra": torch.zeros(1)}
    assert message_of(lambda: weights.load_strict(layer, tensors, "model/dvae")) == (
        "model/dvae: the weights do not fit the model: missing: linear.bias; unexpected: extra; "
        "shape: linear.weight [4, 2], not [3, 2]; dtype: steps torch.float32, not torch.int64"
    )
    assert weights.tensors_sha256(layer.state_dict()) == before


def test_a_long_list_of_wrong_tensors_is_shortened() -> None:
    layer = Layer(Widths(d_in=2, d_out=3))
    tensors = {f"t{i}": torch.zeros(1) for i in range(9)} | layer.state_dict()
    line = message_of(lambda: weights.load_strict(layer, tensors, "dvae"))
    assert line.endswith("unexpected: t0, t1, t2, t3 and 5 more")


def test_weights_of_another_size_are_refused_before_memory_is_taken(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "manifest.json").unlink()
    files.write_json(model / "dvae/config.json", {"d_in": 10**7, "d_out": 10**7})  # 400 TB
    monkeypatch.setattr(weights, "load_tensors", lambda _: pytest.fail("the tensors were read"))
    assert message_of(lambda: load(model / "dvae")) == (
        "dvae: the weights do not fit the model: shape: linear.weight [3, 2], not [10000000, 10000000], "
        "linear.bias [3], not [10000000]"
    )


def test_the_header_says_what_the_file_holds(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    tensors["linear.bias"] = tensors["linear.bias"].bfloat16()
    weights.save_tensors(tmp_path / "a.safetensors", tensors)
    header = weights.load_header(tmp_path / "a.safetensors")
    assert {name: (one.shape, one.dtype) for name, one in header.items()} == {
        name: (one.shape, one.dtype) for name, one in tensors.items()
    }
    safetensors.torch.save_file({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "b.safetensors")
    line = message_of(lambda: weights.load_header(tmp_path / "b.safetensors"))
    assert line == f"{tmp_path / 'b.safetensors'}: dtype not read here: a"
