"""Zero-shot figures on vectors made by hand, and the probe against a solution known otherwise."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle.evaluation import zero_shot
from dalle.evaluation.zero_shot import (
    accuracy,
    class_vectors,
    classify,
    clip_score,
    fit_logistic,
    linear_probe,
    r_precision,
    read_labels,
    recalls,
    retrieval_both_ways,
    retrieval_ranks,
)


def unit(*rows: list[float]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


def test_an_ensemble_is_the_mean_of_unit_vectors_at_length_one() -> None:
    table = {"a dog": [3.0, 0.0], "one dog": [0.0, 1.0], "a cat": [-1.0, 0.0], "one cat": [-1.0, 0.0]}

    def encode(captions: list[str]) -> Tensor:
        return unit(*(table[caption] for caption in captions))

    found = class_vectors(["dog", "cat"], ["a {}", "one {}"], encode)
    torch.testing.assert_close(found, unit([1.0, 1.0], [-1.0, 0.0]))
    with pytest.raises(ValueError, match=r"template 'a dog' must hold \{\} once"):
        class_vectors(["dog"], ["a dog"], encode)
    with pytest.raises(ValueError, match="0 labels and 1 templates"):
        class_vectors([], ["a {}"], encode)


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("a\n\nb\na\n", "names 'a' twice"), (None, "cannot be read")]
)
def test_a_file_without_distinct_labels_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels.txt")


def test_labels_are_the_lines_that_are_not_blank(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a red apple\n\n  café \n", encoding="utf-8")
    assert read_labels(tmp_path / "labels.txt") == ["a red apple", "café"]


def test_classes_are_chosen_by_cosine() -> None:
    classes = unit([1.0, 0.0], [0.0, 1.0])
    pictures = unit([2.0, 1.0], [1.0, 3.0], [1.0, 0.9])
    assert accuracy(pictures, classes, [0, 1, 1]) == pytest.approx(2 / 3)
    torch.testing.assert_close(classify(pictures, classes).sum(dim=1), torch.ones(3))


def test_ranks_count_what_is_better_and_ties_of_lower_index(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = unit([1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0])
    queries = unit([1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    expected = [1, 2, 2]  # the tie with target 0 is lost by target 2
    assert retrieval_ranks(queries, targets, [0, 2, 1]).tolist() == expected
    monkeypatch.setattr(zero_shot, "CHUNK", 2)
    assert retrieval_ranks(queries, targets, [0, 2, 1]).tolist() == expected


def test_recalls_are_shares_of_ranks() -> None:
    figures = recalls(torch.tensor([1, 1, 5, 10, 11]))
    assert figures == pytest.approx(
        {"recall_at_1": 0.4, "recall_at_5": 0.6, "recall_at_10": 0.8, "median_rank": 5.0}
    )


def test_retrieval_goes_both_ways_and_they_differ() -> None:
    pictures, captions = unit([1.0, 0.0], [0.9, 0.1]), unit([1.0, 0.05], [0.0, 1.0])
    found = retrieval_both_ways(pictures, captions)
    assert found["picture_to_caption"]["recall_at_1"] == 0.5
    assert found["caption_to_picture"]["recall_at_1"] == 1.0
    assert found["chance"]["recall_at_1"] == 0.5


def test_clip_score_is_two_and_a_half_cosines_and_never_negative() -> None:
    found = clip_score(unit([1.0, 0.0], [1.0, 0.0], [0.6, 0.8]), unit([1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([2.5, 0.0, 1.5]))


def test_r_precision_needs_the_true_caption_strictly_first() -> None:
    captions = unit([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])
    pictures = unit([1.0, 0.1], [0.1, 1.0], [1.0, 0.0])
    assert r_precision(pictures, captions, [[0, 1], [1, 0], [0, 2]]) == pytest.approx(2 / 3)


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    return centres[labels] + 0.5 * torch.randn(n, 2, generator=generator), labels


def test_the_fit_is_the_minimum_of_the_penalised_loss() -> None:
    features, labels = clusters(60, 0)
    weight, bias = fit_logistic(features, labels, 3, strength=0.5)
    weight.requires_grad_()
    bias.requires_grad_()
    logits = features.double() @ weight.T + bias
    loss = (
        0.5 * torch.nn.functional.cross_entropy(logits, labels, reduction="sum") + weight.square().sum() / 2
    )
    loss.backward()
    for gradient in (weight.grad, bias.grad):
        assert gradient is not None and float(gradient.abs().max()) < 1e-4


def test_the_probe_finds_a_strength_and_separates_clusters() -> None:
    probe = linear_probe(clusters(90, 0), clusters(60, 1))
    assert 1e-6 <= probe.strength <= 1e6
    assert probe.accuracy(*clusters(300, 2)) > 0.97


def test_a_strong_penalty_makes_small_weights() -> None:
    features, labels = clusters(60, 0)
    weak, strong = (fit_logistic(features, labels, 3, strength)[0].norm() for strength in (1e4, 1e-4))
    assert strong < 0.01 * weak
