"""Published CLIPs, written by the packages that publish them, give the same numbers here."""

import copy
import importlib
import importlib.util
import json
import os
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dalle.clip import CLIP, OPENAI_MEAN
from dalle.clip_tokenizer import CLIPTokenizer
from dalle.importers.openai_clip import import_openai_clip, read_state
from dalle.importers.published_clip import config_of, import_huggingface_clip, import_open_clip
from dalle.manifest import VerifiedFolder
from dalle.weights import load_strict


def needed(name: str) -> ModuleType:
    """A package for comparison only; on the project's CI its absence is a failure, not a skip."""
    return importlib.import_module(name) if os.environ.get("DALLE_CI") else pytest.importorskip(name)


def openais_file(name: str) -> Path:
    """A file of OpenAI's package, as clip-anytorch ships it; the package itself is not imported: it needs torchvision."""
    found = importlib.util.find_spec("clip")
    if found is None or found.origin is None:
        if os.environ.get("DALLE_CI"):
            pytest.fail("clip-anytorch is not installed")
        pytest.skip("clip-anytorch is not installed")
    return Path(found.origin).parent / name


@pytest.fixture(scope="module")
def merges() -> Path:
    return openais_file("bpe_simple_vocab_16e6.txt.gz")


@pytest.fixture(scope="module")
def openais_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("openai_clip_model", openais_file("model.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stir(module: nn.Module) -> nn.Module:
    """Move every bias, gain and running mean from where it starts, where a lost one would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.ndim == 1 and tensor.is_floating_point() and "logit" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator).abs() * 0.1)
    return module.eval()


def tokens(n_ids: int, end: int, length: int = 77) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text = torch.zeros(3, length, dtype=torch.int64)
    for row, n in enumerate((2, 7, 20)):
        text[row, :n] = torch.randint(1, n_ids - 2, (n,), generator=generator)
        text[row, n] = end
    return text


def raw(model: CLIP, images: Tensor) -> Tensor:
    """Images in [0, 1] that the model's own normalisation turns into what the other side is given."""
    mean = torch.tensor(model.config.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(model.config.image_std).view(1, 3, 1, 1)
    return images * std + mean


@pytest.mark.parametrize("layers", [(1, 2, 1, 1), 2], ids=["resnet", "vit"])
def test_logits_equal_openais_own_code(openais_model: ModuleType, layers: Any) -> None:
    torch.manual_seed(0)
    patch = None if isinstance(layers, tuple) else 16
    width = 64 if patch else 32
    theirs = stir(openais_model.CLIP(24, 64, layers, width, patch, 77, 100, 128, 2, 2))
    state = theirs.state_dict()
    config = config_of(state, activation="quick_gelu", source="test")
    assert (config.image_size, config.image_layers, config.text_layers) == (64, layers, 2)
    ours = CLIP(config).eval()
    load_strict(ours, state, "test")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    text = tokens(100, 99)
    with torch.no_grad():
        expected = theirs(images, text)[0]
        got = ours(raw(ours, images), text)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory, merges: Path) -> tuple[Any, Path]:
    """A random CLIPModel of transformers with OpenAI's vocabulary, saved as on the Hub."""
    transformers = needed("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = stir(transformers.CLIPModel(config))
    folder = tmp_path_factory.mktemp("huggingface")
    model.save_pretrained(folder)
    openais = CLIPTokenizer.from_openai(merges)
    vocab = {**openais.vocab, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    tree = {"model": {"type": "BPE", "vocab": vocab, "merges": [" ".join(pair) for pair in openais.merges]}}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return model, folder


def test_logits_equal_transformers_and_the_activation_is_kept(
    huggingface: tuple[Any, Path], tmp_path: Path
) -> None:
    theirs, folder = huggingface
    import_huggingface_clip(folder, tmp_path / "out")
    VerifiedFolder(tmp_path / "out")
    ours = CLIP.from_pretrained(tmp_path / "out" / "clip")
    assert ours.config.activation == "quick_gelu"
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    text = tokens(49408, 49407)
    with torch.no_grad():
        expected = theirs(input_ids=text, pixel_values=images).logits_per_image
    torch.testing.assert_close(ours(raw(ours, images), text), expected, rtol=1e-4, atol=1e-4)
    row = CLIPTokenizer.from_pretrained(tmp_path / "out" / "clip")("a photo of a cat.")
    assert row[:8].tolist() == [49406, 320, 1125, 539, 320, 2368, 269, 49407]


def test_another_activation_in_the_settings_is_stored(huggingface: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = huggingface
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    settings = json.loads((copy / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        settings[part]["hidden_act"] = "gelu"
    (copy / "config.json").write_text(json.dumps(settings))
    import_huggingface_clip(copy, tmp_path / "out")
    assert CLIP.from_pretrained(tmp_path / "out" / "clip").config.activation == "gelu"
    settings["text_config"]["hidden_act"] = "quick_gelu"
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="activations differ: gelu, quick_gelu"):
        import_huggingface_clip(copy, tmp_path / "other")


def test_open_clips_folder_is_read_with_its_own_settings(
    openais_model: ModuleType, merges: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = stir(openais_model.CLIP(24, 64, 2, 64, 16, 77, 49408, 128, 2, 2))
    safetensors.torch.save_file(dict(theirs.state_dict()), tmp_path / "open_clip_model.safetensors")
    settings = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    import_open_clip(tmp_path, merges, tmp_path / "out")
    ours = CLIP.from_pretrained(tmp_path / "out" / "clip")
    assert (ours.config.activation, ours.config.image_mean) == ("quick_gelu", (0.5, 0.5, 0.5))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    text = tokens(49408, 49407)
    with torch.no_grad():
        expected = theirs(images, text)[0]
    torch.testing.assert_close(ours(raw(ours, images), text), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def archives(
    openais_model: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[nn.Module, Path]]:
    """Random ResNets and ViTs of OpenAI's code in their release layout: TorchScript, half precision, three sizes."""
    folder = tmp_path_factory.mktemp("archives")
    made = {}
    for name, layers, width, patch in (("RN", (1, 1, 1, 1), 32, None), ("ViT", 2, 64, 16)):
        torch.manual_seed(0)
        model = stir(openais_model.CLIP(24, 64, layers, width, patch, 77, 49408, 64, 1, 1))
        halved = copy.deepcopy(model)
        for size in ("input_resolution", "context_length", "vocab_size"):
            for owner in (halved, halved.visual):  # the towers have attributes of these names
                owner.__dict__.pop(size, None)
            halved.register_buffer(size, torch.tensor(64))
        example = (torch.zeros(1, 3, 64, 64), tokens(49408, 49407))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(halved, example, check_trace=False)
            openais_model.convert_weights(halved)
            torch.jit.save(traced, folder / f"{name}.pt")
        made[name] = (halved.float().eval(), folder / f"{name}.pt")
    return made


@pytest.mark.parametrize("name", ["RN", "ViT"])
def test_openais_archives_give_their_own_logits(
    archives: dict[str, tuple[nn.Module, Path]], merges: Path, tmp_path: Path, name: str
) -> None:
    theirs, path = archives[name]
    import_openai_clip(path, merges, tmp_path / "out")
    VerifiedFolder(tmp_path / "out")
    ours = CLIP.from_pretrained(tmp_path / "out" / "clip")
    assert (ours.config.activation, ours.config.image_mean) == ("quick_gelu", OPENAI_MEAN)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    text = tokens(49408, 49407)
    with torch.no_grad():
        expected = theirs(images, text)[0]
    torch.testing.assert_close(ours(raw(ours, images), text), expected, rtol=1e-4, atol=1e-4)
    torch.save(theirs.state_dict(), tmp_path / "finetuned.pt")
    found = read_state(tmp_path / "finetuned.pt")
    assert (
        found.keys()
        == read_state(path).keys()
        == theirs.state_dict().keys()
        - {
            "input_resolution",
            "context_length",
            "vocab_size",
        }
    )


def test_the_code_of_an_archive_is_never_run(
    archives: dict[str, tuple[nn.Module, Path]], merges: Path, tmp_path: Path
) -> None:
    _, path = archives["ViT"]
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "spoilt.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"raise SystemExit" if name.endswith(".py") else old.read(name))
    import_openai_clip(tmp_path / "spoilt.pt", merges, tmp_path / "out")
    assert (tmp_path / "out" / "clip" / "model.safetensors").is_file()


class Shell:
    """Pickles as a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_archives_that_call_or_are_something_else_are_refused(merges: Path, tmp_path: Path) -> None:
    trace, path = tmp_path / "it-ran", tmp_path / "x.pt"
    for payload, message in (
        ({"visual.proj": Shell(f"touch {trace}")}, r"names posix\.system, which no OpenAI CLIP does"),
        ([torch.zeros(2)], "holds a list; expected OpenAI's CLIP"),
        ({"weight": torch.zeros(2)}, "holds no CLIP with OpenAI's towers"),
    ):
        torch.save(payload, path)
        with pytest.raises(ValueError, match=message):
            import_openai_clip(path, merges, tmp_path / "out")
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"is not a file of torch\.save, or is damaged"):
        import_openai_clip(path, merges, tmp_path / "out")
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is of a 'bert' model, not of a clip"):
        import_huggingface_clip(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="holds no CLIP with OpenAI's towers"):
        config_of({"weight": torch.zeros(1)}, activation="gelu", source="x")
