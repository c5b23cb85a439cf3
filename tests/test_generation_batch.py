"""Batch: what is drawn side by side, and what a recipe records of it."""

import pytest
import torch

from dalle.generation.batch import Batch, BatchRecord, Slot, plan_batches
from dalle.generation.request import CaptionRequest, Completion, GenerationOptions


def request(caption: str, n: int, seed: int = 0, **options: float) -> CaptionRequest:
    return CaptionRequest(
        caption=caption,
        text=torch.tensor([ord(letter) for letter in caption]),
        n_images=n,
        seeds=tuple(range(seed, seed + n)),
        first=seed,
        options=GenerationOptions.model_validate(options),
        truncate=False,
        truncation=None,
    )


def planned(counts: list[int], rows_per_batch: int) -> list[list[tuple[str, int, int]]]:
    """Caption, first candidate and number of each slot, batch by batch."""
    batches = plan_batches([request("abcdef"[i], n) for i, n in enumerate(counts)], rows_per_batch)
    return [[(slot.request.caption, slot.first, slot.n) for slot in batch.slots] for batch in batches]


def test_batches_hold_whole_captions_or_parts_of_one() -> None:
    assert planned([2] * 5, 4) == [
        [("a", 0, 2), ("b", 0, 2)],
        [("c", 0, 2), ("d", 0, 2)],
        [("e", 0, 2)],
    ]
    assert planned([3] * 2, 2) == [[("a", 0, 2)], [("a", 2, 1)], [("b", 0, 2)], [("b", 2, 1)]]
    assert planned([1, 2, 5, 1], 4) == [
        [("a", 0, 1), ("b", 0, 2)],
        [("c", 0, 4)],
        [("c", 4, 1)],
        [("d", 0, 1)],
    ]


@pytest.mark.parametrize("rows", [0, 1025])
def test_batches_of_no_rows_and_of_too_many_are_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=rf"rows_per_batch is {rows}; choose 1\.\.1024"):
        planned([1], rows)


def test_every_row_of_a_call_has_its_batch() -> None:
    requests = [request("a", 2), request("b", 2, 2), request("c", 2, 4)]
    batches = plan_batches(requests, 4)
    records = [batch.for_recipe(row) for batch in batches for row in range(len(batch.seeds))]
    assert [record.seeds[record.position] for record in records] == [0, 1, 2, 3, 4, 5]
    assert [record.captions for record in records] == [("a", "b")] * 4 + [("c",)] * 2
    assert all(record.n_pictures is None and record.guided is None for record in records)
    assert [record.caption_index() for record in records] == [0, 0, 1, 1, 0, 0]
    owners = [batch.place(row) for batch in batches for row in range(len(batch.seeds))]
    assert owners == [(one, candidate) for one in requests for candidate in (0, 1)]


def test_a_shared_batch_keeps_what_others_asked_for_to_itself() -> None:
    slots = (Slot(request("a", 2, 7), 1, 1), Slot(request("b", 3, 20, guidance=3.0), 0, 2))
    batch = Batch(slots, 3, is_shared=True)
    assert batch.seeds == (8, 20, 21) and batch.n_pictures == (1, 2)
    assert batch.for_recipe(2) == BatchRecord(
        captions=("", "b"),
        seeds=(0, 20, 21),
        position=2,
        rows_per_batch=3,
        n_pictures=(1, 2),
        guided=(1, 2),
    )
    assert batch.place(2) == (slots[1].request, 1)


def test_known_tokens_are_those_of_each_caption() -> None:
    kept = request("b", 2)
    kept = CaptionRequest(**(vars(kept) | {"completion": Completion(known=(5, -1, -1, -1))}))
    assert Batch((Slot(request("a", 1), 0, 1),), 1).known is None
    known = Batch((Slot(request("a", 1), 0, 1), Slot(kept, 0, 2)), 3).known
    assert known is not None and known.tolist() == [[-1] * 4, [5, -1, -1, -1], [5, -1, -1, -1]]


RECORD = BatchRecord(captions=("a cat", "a dog"), seeds=(4, 5, 6, 7), position=2)


def test_a_record_of_different_numbers_knows_whose_picture_is_whose() -> None:
    mixed = RECORD.model_copy(update={"n_pictures": (1, 3), "guided": (1, 2, 3)})
    assert RECORD.counts() == [2, 2] and mixed.counts() == [1, 3]
    owners = [mixed.model_copy(update={"position": row}).caption_index() for row in range(4)]
    assert owners == [0, 1, 1, 1]
    for update in ({"n_pictures": (1, 2)}, {"n_pictures": (4,)}, {"guided": (4,)}):
        with pytest.raises(ValueError, match="it was changed by hand"):
            mixed.model_copy(update=update).counts()
