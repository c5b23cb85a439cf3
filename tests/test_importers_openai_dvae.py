"""OpenAI's pickles, written by OpenAI's package, give the same numbers here; hostile ones are refused."""

import importlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dalle.dvae import DiscreteVAE, map_pixels, unmap_pixels
from dalle.importers.openai_dvae import import_openai_dvae
from dalle.manifest import VerifiedFolder

# OpenAI's package: pip install --no-deps DALL-E==0.1. On the project's CI its absence is a failure, not a skip.
dall_e = importlib.import_module("dall_e") if os.environ.get("DALLE_CI") else pytest.importorskip("dall_e")

N_CODES, D_CODE = 512, 16  # the least that the package accepts


@pytest.fixture(scope="module")
def theirs() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    encoder = dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=N_CODES)
    decoder = dall_e.Decoder(n_init=D_CODE, n_hid=64, n_blk_per_group=1, vocab_size=N_CODES)
    for module in (encoder, decoder):
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(std=0.1)  # biases start at zero, where a lost one would not show
    return encoder, decoder


@pytest.fixture(scope="module")
def files(theirs: tuple[nn.Module, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("openai")
    paths = folder / "encoder.pkl", folder / "decoder.pkl"
    for module, path in zip(theirs, paths, strict=True):
        torch.save(module, path)
    return paths


def assert_same_numbers(model: DiscreteVAE, theirs: tuple[nn.Module, nn.Module]) -> None:
    encoder, decoder = theirs
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = encoder(dall_e.map_pixels(images))
        torch.testing.assert_close(model.encoder(map_pixels(images)), logits, atol=1e-5, rtol=0)
        tokens = logits.argmax(dim=1)
        assert torch.equal(model.encode(images), tokens)
        z = nn.functional.one_hot(tokens, N_CODES).permute(0, 3, 1, 2).float()
        out = decoder(z)
        torch.testing.assert_close(model.decoder(z), out, atol=1e-5, rtol=0)
        pixels = dall_e.unmap_pixels(torch.sigmoid(out[:, :3]))
        torch.testing.assert_close(model.decode(tokens), pixels, atol=1e-5, rtol=0)


def test_imported_model_computes_what_openais_package_computes(
    theirs: tuple[nn.Module, nn.Module], files: tuple[Path, Path], tmp_path: Path
) -> None:
    import_openai_dvae(*files, tmp_path / "model", image_size=32)
    VerifiedFolder(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["components"] == {"dvae": "DiscreteVAE"}
    model = DiscreteVAE.from_pretrained(tmp_path / "model" / "dvae")
    config = model.config
    assert (config.n_codes, config.d_code, config.d_hidden, config.n_blocks) == (N_CODES, D_CODE, 64, 1)
    assert (config.quantizer, config.trunk, config.likelihood) == ("gumbel", "paper", "logit_laplace")
    assert_same_numbers(model, theirs)


def test_files_of_torchs_older_format_import_as_well(
    theirs: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    paths = tmp_path / "encoder.pkl", tmp_path / "decoder.pkl"
    for module, path in zip(theirs, paths, strict=True):
        torch.save(module, path, _use_new_zipfile_serialization=False)
    import_openai_dvae(*paths, tmp_path / "model", image_size=32)
    assert_same_numbers(DiscreteVAE.from_pretrained(tmp_path / "model" / "dvae"), theirs)


def test_image_size_is_the_published_models_unless_given(files: tuple[Path, Path], tmp_path: Path) -> None:
    import_openai_dvae(*files, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "dvae" / "config.json").read_text())["image_size"] == 256


def test_pixel_maps_are_openais() -> None:
    x = torch.linspace(0, 1, 12).view(1, 3, 2, 2)
    torch.testing.assert_close(map_pixels(x), dall_e.map_pixels(x))
    torch.testing.assert_close(unmap_pixels(x), dall_e.unmap_pixels(x))


# --- what is refused ---


class Shell:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def hostile_files(tmp_path: Path, theirs: nn.Module, payload: object) -> dict[str, Path]:
    """The payload as a bare pickle, in torch's two formats, and hidden inside a true encoder."""
    paths = {kind: tmp_path / f"{kind}.pkl" for kind in ("bare", "zip", "legacy", "hidden")}
    paths["bare"].write_bytes(pickle.dumps(payload))
    torch.save(payload, paths["zip"])
    torch.save(payload, paths["legacy"], _use_new_zipfile_serialization=False)
    theirs.__dict__["extra"] = payload
    try:
        torch.save(theirs, paths["hidden"])
    finally:
        del theirs.__dict__["extra"]
    return paths


def test_a_pickle_that_calls_os_system_is_refused_by_name_and_not_run(
    theirs: tuple[nn.Module, nn.Module], files: tuple[Path, Path], tmp_path: Path
) -> None:
    trace = tmp_path / "it-ran"
    for path in hostile_files(tmp_path, theirs[0], Shell(f"touch {trace}")).values():
        with pytest.raises(ValueError, match=rf"{path.name} names posix\.system, .*refused"):
            import_openai_dvae(path, files[1], tmp_path / "model")
    assert not trace.exists()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("named", "name"),
    [
        (eval, "eval"),
        (getattr, "getattr"),
        (torch.load, "load"),
        (nn.Linear, "Linear"),
        (io.FileIO, "FileIO"),
    ],
)
def test_nothing_outside_the_list_can_be_named(
    named: object, name: str, theirs: tuple[nn.Module, nn.Module], files: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in hostile_files(tmp_path, theirs[0], named).values():
        with pytest.raises(ValueError, match=rf"names \S*{name}, which no OpenAI dVAE does"):
            import_openai_dvae(path, files[1], tmp_path / "model")


def rewrite(source: Path, target: Path, change: Callable[[str, bytes], bytes], compression: int = 0) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def cut_storages(name: str, data: bytes) -> bytes:
    return data[:-4] if "/data/" in name else data


def garble_pickle(name: str, data: bytes) -> bytes:
    return data[: len(data) // 2] if name.endswith("data.pkl") else data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source, target: rewrite(source, target, cut_storages), "cut short"),
        (lambda source, target: rewrite(source, target, garble_pickle), "damaged"),
        (lambda source, target: rewrite(source, target, lambda _, d: d, zipfile.ZIP_DEFLATED), "compressed"),
        (lambda source, target: target.write_bytes(source.read_bytes()[:5000]), "damaged"),
        (lambda source, target: target.write_bytes(b""), "damaged"),
        (lambda source, target: target.write_bytes(b"<html>404</html>"), "damaged"),
        (lambda source, target: torch.save({"w": torch.zeros(3)}, target), "holds a dict"),
        (lambda source, target: None, "No such file"),
    ],
    ids=["storage", "pickle", "compressed", "truncated", "empty", "page", "state-dict", "missing"],
)
def test_damaged_and_foreign_files_are_refused_in_one_line(
    damage: Callable[[Path, Path], Any], message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    damage(files[0], tmp_path / "bad.pkl")
    with pytest.raises(ValueError, match=message) as caught:
        import_openai_dvae(tmp_path / "bad.pkl", files[1], tmp_path / "model")
    assert "bad.pkl" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_files_in_the_wrong_order_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a dall_e Decoder; expected Encoder"):
        import_openai_dvae(files[1], files[0], tmp_path / "model")


def test_halves_of_different_models_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save(dall_e.Decoder(n_init=8, n_hid=64, n_blk_per_group=1, vocab_size=600), tmp_path / "other.pkl")
    with pytest.raises(ValueError, match="512 codes, the decoder 600: they are not a pair"):
        import_openai_dvae(files[0], tmp_path / "other.pkl", tmp_path / "model")
    torch.save(dall_e.Decoder(n_init=8, n_hid=72, n_blk_per_group=1, vocab_size=512), tmp_path / "wide.pkl")
    with pytest.raises(ValueError, match=r"wide\.pkl"):
        import_openai_dvae(files[0], tmp_path / "wide.pkl", tmp_path / "model")


def test_another_residual_gain_is_refused_rather_than_ignored(
    theirs: tuple[nn.Module, nn.Module], files: tuple[Path, Path], tmp_path: Path
) -> None:
    block = theirs[0].get_submodule("blocks.group_1.block_1")
    gain = block.post_gain
    block.post_gain = 0.5
    try:
        torch.save(theirs[0], tmp_path / "gain.pkl")
    finally:
        block.post_gain = gain
    with pytest.raises(ValueError, match=r"scales its branch by 0\.5"):
        import_openai_dvae(tmp_path / "gain.pkl", files[1], tmp_path / "model")
