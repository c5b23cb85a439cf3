"""Imports of published models: Flax's msgpack, resumption, memory, and one line for every wrong file, nothing written."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dalle.importers import conversion
from dalle.importers.dalle_pytorch import import_dalle_pytorch
from dalle.importers.min_dalle import import_dalle_mini, import_min_dalle
from dalle.importers.min_dalle_e import import_min_dalle_e
from dalle.importers.ru_dalle import import_ru_dalle
from dalle.importers.tensor_files import open_tensors
from dalle.importers.vqgan import import_vqgan
from dalle.manifest import VerifiedFolder
from dalle.pipeline import DallePipeline
from dalle.published.min_dalle import MinDalle
from tests.tiny_published import (
    bart_vocabulary,
    one_thread,  # noqa: F401 - every test here runs under it
    taming_state,
    tiny_min_dalle,
    tiny_vqgan,
)

SIZES = {"n_heads": 2, "n_text_tokens": 8}

# --- Flax ---


def packed(tree: Any) -> bytes:
    """msgpack as flax.serialization writes it: maps, texts, and arrays as extension 1."""
    if isinstance(tree, dict):
        head = bytes([0x80 | len(tree)]) if len(tree) < 16 else b"\xde" + struct.pack(">H", len(tree))
        return head + b"".join(packed(key) + packed(value) for key, value in tree.items())
    if isinstance(tree, str):
        data = tree.encode()
        return (bytes([0xA0 | len(data)]) if len(data) < 32 else b"\xd9" + bytes([len(data)])) + data
    shape = bytes([0x90 | tree.ndim]) + b"".join(b"\xcd" + struct.pack(">H", n) for n in tree.shape)
    numbers = np.ascontiguousarray(tree).tobytes()
    inner = b"\x93" + shape + packed(str(tree.dtype)) + b"\xc6" + struct.pack(">I", len(numbers)) + numbers
    return b"\xc9" + struct.pack(">IB", len(inner), 1) + inner


def nested(names: dict[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, tensor in names.items():
        *path, last = name.split(".")
        here = tree
        for part in path:
            here = here.setdefault(part, {})
        here[last] = tensor.numpy()
    return tree


PARTS = {
    "attention.norm": "LayerNorm_0",
    "attention.out_norm": "LayerNorm_1",
    "cross_attention.norm": "LayerNorm_2",
    "cross_attention.out_norm": "LayerNorm_3",
    "mlp.norm": "GLU_0.LayerNorm_0",
    "mlp.inner_norm": "GLU_0.LayerNorm_1",
    "mlp.gate": "GLU_0.Dense_0",
    "mlp.value": "GLU_0.Dense_1",
    "mlp.out": "GLU_0.Dense_2",
}


def flax_state(model: MinDalle, is_stacked: bool) -> dict[str, Tensor]:
    """A min-dalle's tensors by dalle-mini's names, all layers in one array or each by itself."""
    found: dict[str, Tensor] = {"lm_head.kernel": model.image_head.weight.detach().T}
    ends = {"token": "embed_tokens.embedding", "position": "embed_positions.embedding"}
    for name, tensor in model.state_dict().items():
        side, _, rest = name.partition(".")
        layer = re.match(r"layers\.(\d+)\.(.*)\.(weight|bias)$", rest)
        if side == "image_head":
            continue
        if layer is None:
            part, _, kind = rest.partition(".")
            ours = ends.get(part) or {"embedding_norm": "layernorm_embedding", "norm": "final_ln"}[part] + (
                ".scale" if kind == "weight" else ".bias"
            )
            found[f"model.{side}.{ours}"] = tensor
            continue
        part = layer[2]
        attention = re.match(r"(cross_)?attention\.(q|k|v|out)$", part)
        theirs = (
            f"FlaxBartAttention_{1 if attention[1] else 0}.{attention[2]}_proj" if attention else PARTS[part]
        )
        leaf = "kernel" if tensor.ndim == 2 else "scale" if layer[3] == "weight" else "bias"
        kind = f"FlaxBart{side.title()}Layer"
        found[f"model.{side}.layers.{kind}_{layer[1]}.{theirs}.{leaf}"] = (
            tensor.T if tensor.ndim == 2 else tensor
        )
    if is_stacked:
        for name in [name for name in found if re.search(r"Layer_\d+\.", name)]:
            stacked = re.sub(r"Layer_\d+\.", "Layers.", name)
            each = re.sub(r"Layer_\d+\.", "Layer_{}.", name)
            if stacked not in found:
                found[stacked] = torch.stack([found[each.format(i)] for i in range(model.config.n_layers)])
        found = {name: tensor for name, tensor in found.items() if not re.search(r"Layer_\d+\.", name)}
    return found


def write_flax(folder: Path, model: MinDalle, is_stacked: bool) -> list[Path]:
    vqgan = tiny_vqgan(image_size=64, multipliers=(1, 1, 1, 1, 1), is_signed=False)
    pictures: dict[str, Tensor] = {}
    for name, tensor in taming_state(vqgan).items():
        name = re.sub(r"\b(up|down|block|attn)\.(\d+)(?=\.)", r"\1_\2", name) if ".mid." not in name else name
        leaf = "kernel" if tensor.ndim == 4 else "scale" if "norm" in name else "embedding"
        name = re.sub(r"weight$", leaf, name)
        pictures[name] = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor
    (folder / "flax_model.msgpack").write_bytes(packed(nested(flax_state(model, is_stacked))))
    (folder / "vqgan.msgpack").write_bytes(packed(nested(pictures)))
    config = {"decoder_attention_heads": 2, "decoder_start_token_id": 64}
    (folder / "config.json").write_text(json.dumps(config))
    names = ("flax_model.msgpack", "config.json", "vqgan.msgpack")
    return [*(folder / name for name in names), *bart_vocabulary(folder)]


@pytest.mark.parametrize("is_stacked", [True, False])
def test_flax_checkpoints_of_dalle_mini_are_read_without_jax(is_stacked: bool, tmp_path: Path) -> None:
    model = tiny_min_dalle()
    import_dalle_mini(*write_flax(tmp_path, model, is_stacked), tmp_path / "model")
    VerifiedFolder(tmp_path / "model")
    again = MinDalle.from_pretrained(tmp_path / "model" / "transformer")
    assert again.config == model.config
    for (name, ours), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    pipe = DallePipeline.from_pretrained(tmp_path / "model", dtype="float32")
    picture = pipe("a red", seed=1, guidance=3).images[0]
    assert picture.size == (64, 64)
    # Its VQGAN has an encoder, unlike min-dalle's: pictures can be completed.
    assert pipe("a red", image=picture, keep_rows=2).recipes[0]["completion"] is not None


# --- streaming ---


def min_dalle_files(folder: Path, **changes: Any) -> list[Path]:
    """The five files of min-dalle's format around a small model."""
    model = tiny_min_dalle(**changes)
    renames = {
        "token": "embed_tokens",
        "position": "embed_positions",
        "embedding_norm": "layernorm_embedding",
        "norm": "final_ln",
    }
    layers = {
        "attention.norm": "pre_self_attn_layer_norm",
        "attention.out_norm": "self_attn_layer_norm",
        "cross_attention.norm": "pre_encoder_attn_layer_norm",
        "cross_attention.out_norm": "encoder_attn_layer_norm",
        "mlp.norm": "glu.ln0",
        "mlp.inner_norm": "glu.ln1",
        "mlp.gate": "glu.fc0",
        "mlp.value": "glu.fc1",
        "mlp.out": "glu.fc2",
    }
    sides: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in model.state_dict().items():
        side, _, rest = name.partition(".")
        if side == "image_head":
            sides["decoder"]["lm_head.weight"] = tensor
            continue
        layer = re.match(r"(layers\.\d+\.)(.*)(\.(?:weight|bias))$", rest)
        if layer is None:
            part, _, kind = rest.partition(".")
            sides[side][f"{renames[part]}.{kind}"] = tensor
            continue
        part = re.sub(r"^attention\.(q|k|v|out)$", r"self_attn.\1_proj", layer[2])
        part = re.sub(r"^cross_attention\.(q|k|v|out)$", r"encoder_attn.\1_proj", part)
        sides[side][layer[1] + layers.get(part, part) + layer[3]] = tensor
    for side, state in sides.items():
        torch.save(state, folder / f"{side}.pt")
    vqgan = tiny_vqgan(image_size=64, multipliers=(1, 1, 1, 1, 1), has_encoder=False)
    state = taming_state(vqgan)
    state["embedding.weight"] = state.pop("quantize.embedding.weight")
    torch.save(state, folder / "detoker.pt")
    return [*(folder / f"{name}.pt" for name in ("encoder", "decoder", "detoker")), *bart_vocabulary(folder)]


class Died(Exception):
    """Stands for a kill in the middle of an import."""


def test_an_import_goes_on_where_it_stopped_and_shards_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, out = min_dalle_files(tmp_path), tmp_path / "model"
    monkeypatch.setattr("dalle.importers.conversion.SHARD_BYTES", 4000)
    monkeypatch.setattr(conversion.write_converted, "__defaults__", (None, 4000))
    written: list[str] = []
    save = conversion.save_tensors

    def counted(path: Path, tensors: dict[str, Tensor]) -> None:
        written.append(Path(path).name)
        if len(written) == 4:
            raise Died
        save(path, tensors)

    monkeypatch.setattr(conversion, "save_tensors", counted)
    with pytest.raises(Died):
        import_min_dalle(*files, out, changes={"n_heads": 2})
    assert not out.exists() and (tmp_path / "model.partial").is_dir()
    first, told = written[:3], list[tuple[int, int]]()
    import_min_dalle(*files, out, changes={"n_heads": 2}, progress=lambda *now: told.append(now))
    assert not set(first) & set(written[4:]), "what was written is not written again"
    assert told[-1][0] == told[-1][1] and len(told) > 5
    assert not (tmp_path / "model.partial").exists()
    shards = sorted(path.name for path in (out / "transformer").glob("*.safetensors"))
    assert len(shards) > 5 and shards[0].startswith("model-00001-of-")
    whole = tmp_path / "whole"
    monkeypatch.setattr(conversion.write_converted, "__defaults__", (None, 2**28))
    import_min_dalle(*files, whole, changes={"n_heads": 2})
    one, other = (MinDalle.from_pretrained(folder / "transformer") for folder in (out, whole))
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    (out / "transformer" / shards[1]).unlink()
    with pytest.raises(ValueError, match=r"missing|weight files"):
        DallePipeline.from_pretrained(out)


def test_another_source_begins_anew(tmp_path: Path) -> None:
    files = min_dalle_files(tmp_path)
    (tmp_path / "model.partial" / "transformer").mkdir(parents=True)
    (tmp_path / "model.partial" / "import.json").write_text('{"version": "0", "sources": []}')
    (tmp_path / "model.partial" / "transformer" / "model.safetensors").write_bytes(b"of another file")
    import_min_dalle(*files, tmp_path / "model", changes={"n_heads": 2}, dtype=torch.bfloat16)
    model = MinDalle.from_pretrained(tmp_path / "model" / "transformer")
    assert model.image_head.weight.dtype == torch.bfloat16
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert [source["file"] for source in index["imported_from"]] == [path.name for path in files]


PEAK = """
import sys
from pathlib import Path
import torch
from dalle.importers.tensor_files import open_tensors
def rss(field):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(field)) // 1024
with open_tensors(Path(sys.argv[1]), "x") as file:
    Path("/proc/self/clear_refs").write_text("5")
    before = rss("VmRSS")
    total = sum(float(entry.read().sum()) for entry in file.tensors.values())
print(rss("VmHWM") - before)
"""


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    torch.save({str(i): torch.ones(2**21) for i in range(24)}, tmp_path / "large.pt")  # 8 MiB each
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large.pt")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak < 3 * 8 + 16, f"{peak} MiB for tensors of 8"


# --- what is refused ---


def importers(folder: Path) -> dict[str, Callable[[Path], None]]:
    """Each kind's import with one weight file to be chosen, the others sound."""
    files = min_dalle_files(folder)
    vocab, out = files[3], folder / "model"
    (folder / "archive" / "tokenizer").mkdir(parents=True, exist_ok=True)

    def of_archive(path: Path) -> None:
        for name in ("stage1_last.ckpt", "stage2_last.ckpt"):
            (folder / "archive" / name).write_bytes(path.read_bytes())
        (folder / "archive" / "tokenizer" / "bpe-16k-vocab.json").write_text('{"[PAD]": 0, "[UNK]": 1}')
        (folder / "archive" / "tokenizer" / "bpe-16k-merges.txt").write_text("")
        import_min_dalle_e(folder / "archive", out)

    return {
        "vqgan": lambda path: import_vqgan(path, None, out),
        "min-dalle": lambda path: import_min_dalle(path, *files[1:], out),
        "dalle-mini": lambda path: import_dalle_mini(path, files[3], files[2], *files[3:], out),
        "dalle-pytorch": lambda path: import_dalle_pytorch(path, vocab, out),
        "ru-dalle": lambda path: import_ru_dalle(path, files[2], vocab, out),
        "min-dalle-e": of_archive,
    }


def wrong_files(folder: Path) -> dict[str, bytes]:
    torch.save({"layer.weight": torch.zeros(3, 3)}, folder / "other.pt")
    torch.save({"state_dict": taming_state(tiny_vqgan())}, folder / "good.ckpt")
    good = (folder / "good.ckpt").read_bytes()
    return {
        "empty": b"",
        "page": b"<html>404</html>",
        "another model": (folder / "other.pt").read_bytes(),
        "cut short": good[: len(good) // 2],
        "flipped bits": good[:3000] + bytes(byte ^ 0xFF for byte in good[3000:9000]) + good[9000:],
        "msgpack cut short": packed({"model": {"w": np.zeros((4, 4), np.float32)}})[:-9],
        "msgpack of another model": packed({"params": {"w": np.zeros((4, 4), np.float32)}}),
        "safetensors cut short": struct.pack("<Q", 200) + b'{"w":{"dtype":"F32"',
    }


@pytest.mark.parametrize(
    "kind", ["vqgan", "min-dalle", "dalle-mini", "dalle-pytorch", "ru-dalle", "min-dalle-e"]
)
def test_wrong_files_are_one_line_and_leave_nothing(kind: str, tmp_path: Path) -> None:
    run = importers(tmp_path)[kind]
    for name, data in wrong_files(tmp_path).items():
        (tmp_path / "bad.bin").write_bytes(data)
        with pytest.raises(ValueError) as caught:
            run(tmp_path / "bad.bin")
        text = str(caught.value)
        assert "\n" not in text and len(text) < 500 and str(tmp_path) in text, (name, text)
        assert not (tmp_path / "model").exists() and not (tmp_path / "model.partial").exists(), name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x81\xa1a" * 40 + b"\xc0", "nested too deeply"),
        (b"\xdf\xff\xff\xff\xff\xa1a\xc0", "unexpected type|cut short"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "cut short, or of another kind"),
        (packed({"a": np.zeros(3, np.float32)}).replace(b"\xcd\x00\x03", b"\xcd\xff\xff"), "has 12 bytes"),
        (packed({"a": np.zeros(3, np.uint16)}), "a dtype that is not read"),
        (b"\x81\xda\xff\xff" + b"a" * 70_000, "a name of 65535 characters"),
        (b"\x81\xa1a\xc7\x05\x09aaaaa", "of another kind"),
    ],
)
def test_hostile_msgpack_is_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.msgpack").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught, open_tensors(tmp_path / "bad.msgpack", "x"):
        pass
    assert "bad.msgpack is not a Flax checkpoint, or is damaged" in str(caught.value)
