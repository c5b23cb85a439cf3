"""Wrong tokens: a share of them, plausible where they stand, the same for the same draw."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle.data.pair import Pair
from dalle.data.pairs import read_pairs
from dalle.data.shapes import write_shapes
from dalle.training.wrong_tokens import TransformerDraws, corrupted, of_another_picture
from tests.tiny import GRID, N_CODES, tiny_tokenizer, tiny_transformer

MEMBERS = [(0, i) for i in range(6)]


def tokens() -> Tensor:
    return torch.randint(0, N_CODES, (6, GRID, GRID), generator=torch.Generator().manual_seed(0))


def drawn(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_share_of_tokens_becomes_another_pictures_at_the_same_place() -> None:
    true = tokens()
    found = corrupted(of_another_picture, 0.5, MEMBERS, true, drawn(1))
    assert torch.equal(found, corrupted(of_another_picture, 0.5, MEMBERS, true, drawn(1)))
    assert 0.1 < float((found != true).float().mean()) < 0.6
    assert bool((found[:, None] == true[None]).any(dim=1).all())
    assert corrupted(of_another_picture, 0.0, MEMBERS, true, drawn(1)) is true


def test_what_the_transformer_draws_is_likelier_under_it_than_another_pictures_token(tmp_path: Path) -> None:
    pairs: list[Pair] = list(read_pairs(write_shapes(tmp_path / "shapes", 6, seed=0)))
    tokenizer = tiny_tokenizer(caption for pair in pairs for caption in pair.captions)
    transformer = tiny_transformer(tokenizer.n_vocab)
    source, true = TransformerDraws(transformer, tokenizer, pairs), tokens()
    found = source(MEMBERS, true, drawn(2))
    assert found.shape == true.shape and torch.equal(found, source(MEMBERS, true, drawn(2)))
    text = np.stack([tokenizer.pad(tokenizer.encode(pair.captions[0])) for pair in pairs])
    with torch.no_grad():
        log_p = transformer(torch.from_numpy(text), true.flatten(1))[1].log_softmax(dim=-1)

    def mean(chosen: Tensor) -> float:
        return float(log_p.gather(-1, chosen.flatten(1)[..., None]).mean())

    assert mean(found) > mean(of_another_picture(MEMBERS, true, drawn(2))) + 0.5
