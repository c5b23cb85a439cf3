"""minDALL-E's names and shapes are a contract; its arithmetic is compared with a slow twin written from its description."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle.importers.min_dalle_e import import_min_dalle_e
from dalle.manifest import VerifiedFolder
from dalle.published.captions import CaptionTokenizer
from dalle.published.min_dalle_e import MinDalleE
from dalle.published.vqgan import VQGAN
from tests.tiny_published import (
    LETTERS,
    one_thread,  # noqa: F401 - every test here runs under it
    taming_state,
    tiny_vqgan,
)

C, HEADS, LAYERS, N_TEXT, GRID, N_CODES = 16, 2, 2, 8, 2, 64
CAPTIONS = ("a red hat", "RED  red, hat!", "é", "")


def their_state(n_vocab: int) -> dict[str, Tensor]:
    """stage2_last.ckpt of a small model, by the names and shapes of the published one."""
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb_img.weight": (N_CODES, C),
        "tok_emb_txt.weight": (n_vocab, C),
        "pos_emb_img.weight": (GRID * GRID, C),
        "pos_emb_txt.weight": (N_TEXT, C),
        "ln_f.weight": (C,),
        "ln_f.bias": (C,),
        "head_img.weight": (N_CODES, C),
        "head_txt.weight": (n_vocab, C),
    }
    for i in range(LAYERS):
        for name in ("ln1", "ln2"):
            shapes |= {f"blocks.{i}.{name}.weight": (C,), f"blocks.{i}.{name}.bias": (C,)}
        for name in ("attn.key", "attn.query", "attn.value", "attn.proj"):
            shapes |= {f"blocks.{i}.{name}.weight": (C, C), f"blocks.{i}.{name}.bias": (C,)}
        for name, n_in, n_out in (("mlp.0", C, 4 * C), ("mlp.2", 4 * C, C)):
            shapes |= {f"blocks.{i}.{name}.weight": (n_out, n_in), f"blocks.{i}.{name}.bias": (n_out,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def slow_logits(w: dict[str, Tensor], text: list[int], image: list[int]) -> tuple[Tensor, Tensor]:
    """One stream without batches, caches or fused attention: image logits (N, K), text logits (T - 1, V)."""
    rows = [w["tok_emb_txt.weight"][t] + w["pos_emb_txt.weight"][i] for i, t in enumerate(text)]
    rows += [w["tok_emb_img.weight"][t] + w["pos_emb_img.weight"][i] for i, t in enumerate(image)]
    x = torch.stack(rows)
    for i in range(LAYERS):
        name = f"blocks.{i}."

        def linear(y: Tensor, part: str, name: str = name) -> Tensor:
            return y @ w[f"{name}{part}.weight"].T + w[f"{name}{part}.bias"]

        def norm(y: Tensor, part: str, name: str = name) -> Tensor:
            return F.layer_norm(y, (C,), w[f"{name}{part}.weight"], w[f"{name}{part}.bias"])

        read = norm(x, "ln1")
        mixed = torch.zeros_like(x)
        for head in range(HEADS):
            part = slice(head * C // HEADS, (head + 1) * C // HEADS)
            q, k, v = (linear(read, f"attn.{side}")[:, part] for side in ("query", "key", "value"))
            for row in range(len(x)):
                scores = (k[: row + 1] @ q[row]) / math.sqrt(C / HEADS)
                mixed[row, part] = scores.softmax(0) @ v[: row + 1]
        x = x + linear(mixed, "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, "ln2"), "mlp.0")), "mlp.2")
    x = F.layer_norm(x, (C,), w["ln_f.weight"], w["ln_f.bias"])
    n = len(text)
    return x[n - 1 : -1] @ w["head_img.weight"].T, x[: n - 1] @ w["head_txt.weight"].T


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("min_dalle_e")
    (folder / "tokenizer").mkdir()
    merges = [("r", "e"), ("re", "d</w>"), ("h", "a"), ("ha", "t</w>")]
    words = [
        "[UNK]",
        "[PAD]",
        *LETTERS,
        *(f"{x}</w>" for x in f"{LETTERS}!,"),
        *("".join(pair) for pair in merges),
    ]
    vocab = {word: i for i, word in enumerate(words)}
    (folder / "tokenizer" / "bpe-16k-vocab.json").write_text(json.dumps(vocab))
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "tokenizer" / "bpe-16k-merges.txt").write_text(text)
    vqgan = tiny_vqgan(multipliers=(1, 1, 1, 1, 1), attention_sizes=(2,))
    torch.save({"state_dict": taming_state(vqgan)}, folder / "stage1_last.ckpt")
    torch.save({"state_dict": their_state(len(vocab))}, folder / "stage2_last.ckpt")
    return folder


@pytest.fixture(scope="module")
def imported(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "model"
    import_min_dalle_e(archive, out, changes={"n_heads": HEADS})
    VerifiedFolder(out)
    return out


def test_logits_are_those_of_the_slow_twin(archive: Path, imported: Path) -> None:
    model = MinDalleE.from_pretrained(imported / "transformer")
    state = torch.load(archive / "stage2_last.ckpt", weights_only=True)["state_dict"]
    text, image = [4, 9, 20, 1, 1, 1, 1, 1], [3, 60, 12, 7]
    with torch.no_grad():
        text_logits, image_logits = model(torch.tensor([text]), torch.tensor([image]))
    slow_image, slow_text = slow_logits(state, text, image)
    torch.testing.assert_close(image_logits[0], slow_image, atol=1e-4, rtol=0)
    torch.testing.assert_close(text_logits[0], slow_text, atol=1e-4, rtol=0)
    assert sum(p.numel() for p in model.parameters()) == sum(x.numel() for x in state.values())


def test_tokenizer_gives_the_ids_of_hugging_faces_charbpe(archive: Path, imported: Path) -> None:
    import tokenizers

    folder = archive / "tokenizer"
    theirs = tokenizers.CharBPETokenizer.from_file(
        str(folder / "bpe-16k-vocab.json"),
        str(folder / "bpe-16k-merges.txt"),
        unk_token="[UNK]",
        lowercase=True,
    )
    ours = CaptionTokenizer.from_pretrained(imported / "tokenizer")
    for caption in CAPTIONS:
        assert ours.encode(caption) == theirs.encode(caption).ids
    assert ours.pad([5]).tolist() == [5] + [1] * 7


def test_its_vqgan_decodes_as_before(imported: Path) -> None:
    tokens = torch.randint(N_CODES, (1, GRID, GRID), generator=torch.Generator().manual_seed(1))
    before = tiny_vqgan(multipliers=(1, 1, 1, 1, 1), attention_sizes=(2,))
    assert torch.equal(VQGAN.from_pretrained(imported / "dvae").decode(tokens), before.decode(tokens))


def test_a_missing_or_foreign_file_is_named(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"bpe-16k-vocab\.json is missing: give the folder that 1\.3B\.tar\.gz"
    ):
        import_min_dalle_e(tmp_path, tmp_path / "model")
    with pytest.raises(ValueError, match=r"is 16 wide, as no published minDALL-E is: pass --set n_heads=N"):
        import_min_dalle_e(archive, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.partial").exists()
