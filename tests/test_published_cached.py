"""Every published token model draws from its cache what a whole forward pass predicts, however rows are mixed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.tiny_published import (
    GRID,
    N_CODES,
    N_TEXT,
    N_VOCAB,
    TOKEN_MODELS,
    one_thread,  # noqa: F401 - every test here runs under it
)

N = GRID * GRID
every_model = pytest.mark.parametrize("make", TOKEN_MODELS.values(), ids=TOKEN_MODELS)


def captions(n: int) -> torch.Tensor:
    text = torch.randint(4, N_VOCAB, (n, N_TEXT), generator=torch.Generator().manual_seed(5))
    for row in range(n):
        text[row, N_TEXT - row :] = 1 if row else text[row, N_TEXT - row :]
    return text


def whole(model: Any, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    logits = model(text, image)
    return logits[1] if isinstance(logits, tuple) else logits


@every_model
@pytest.mark.parametrize("counts", [(1,), (2, 2), (1, 3)])
def test_cached_logits_equal_a_whole_forward_pass(make: Callable[[], Any], counts: tuple[int, ...]) -> None:
    model, text = make(), captions(len(counts))
    rows = torch.tensor(counts)
    image = torch.randint(N_CODES, (int(rows.sum()), N), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = whole(model, text.repeat_interleave(rows, dim=0), image)
        state, stream = model.start(text, counts)
        logits = [model.head(model.norm(state))]
        for position in range(N - 1):
            state = model.step(image[:, position], stream)
            logits.append(model.head(model.norm(state)))
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, atol=1e-4, rtol=1e-4)


@every_model
def test_no_token_sees_a_later_one(make: Callable[[], Any]) -> None:
    model, text = make(), captions(1)
    image = torch.randint(N_CODES, (1, N), generator=torch.Generator().manual_seed(6))
    changed = image.clone()
    changed[:, N // 2 :] = (changed[:, N // 2 :] + 1) % N_CODES
    with torch.no_grad():
        before, after = whole(model, text, image), whole(model, text, changed)
    torch.testing.assert_close(before[:, : N // 2 + 1], after[:, : N // 2 + 1])
    assert not torch.allclose(before[:, N // 2 + 1 :], after[:, N // 2 + 1 :])


@every_model
def test_caption_matters_and_the_empty_one_is_valid(make: Callable[[], Any]) -> None:
    model = make()
    image = torch.randint(N_CODES, (1, N), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        one, other = whole(model, captions(1), image), whole(model, model.null_text()[None], image)
    assert torch.isfinite(other).all() and not torch.allclose(one, other)


@every_model
def test_loss_is_the_cross_entropy_of_the_logits(make: Callable[[], Any]) -> None:
    model, text = make(), captions(2)
    image = torch.randint(N_CODES, (2, N), generator=torch.Generator().manual_seed(6))
    losses = model.loss(text, image)
    expected = torch.nn.functional.cross_entropy(whole(model, text, image).flatten(0, 1), image.flatten())
    torch.testing.assert_close(losses.image, expected)
    losses.total.backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad
    )


@every_model
def test_saved_models_load_again_in_the_dtype_they_were_saved_in(
    make: Callable[[], Any], tmp_path: Any
) -> None:
    model = make().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer")
    again = type(model).from_pretrained(tmp_path / "transformer")
    assert again.config == model.config and not again.training
    for (name, ours), theirs in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


@every_model
def test_captions_of_another_length_or_vocabulary_are_refused(make: Callable[[], Any]) -> None:
    model = make()
    with pytest.raises(ValueError, match=r"the model reads \(batch, 8\)"):
        model.start(torch.zeros(1, N_TEXT + 1, dtype=torch.int64), (1,))
    with pytest.raises(ValueError, match="the model knows 0"):
        model.start(torch.full((1, N_TEXT), 10_000), (1,))
