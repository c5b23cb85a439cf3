"""The order of pictures is a pure function of (seed, epoch); a balance caps alike pictures."""

import hashlib
from collections import Counter

import numpy as np

from dalle.data.pair import Pair
from dalle.training.order import Order, epoch_line, rng
from dalle.training.recipe import Balance


def pairs(n: int, **fields: object) -> list[Pair]:
    return [Pair(key=f"{index:03d}", captions=("a",), split="train", fields=fields) for index in range(n)]


def people_and_things() -> list[Pair]:
    """20 pictures alike in both fields, 3 alike in another way, and one of its own kind."""
    kinds = [("person", "flat")] * 20 + [("apple", "flat")] * 3 + [("apple", "line")]
    return [
        Pair(key=str(index), captions=("a",), split="train", fields={"okey": okey, "style": style})
        for index, (okey, style) in enumerate(kinds)
    ]


def test_generators_depend_on_every_part_of_their_key() -> None:
    keys: list[tuple[int | str, ...]] = [
        (0, "crop", 1, "ab"),
        (1, "crop", 1, "ab"),
        (0, "text", 1, "ab"),
        (0, "crop", 2, "ab"),
        (0, "crop", 1, "b"),
        (0, "crop", "1a", "b"),
    ]
    draws = [int(rng(*key).integers(2**60)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [int(rng(*key).integers(2**60)) for key in keys]


def test_every_epoch_holds_every_picture_once_in_an_order_of_its_own() -> None:
    order = Order(pairs(50), seed=3)
    epochs = [order.epoch(number).tolist() for number in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_seed_and_epoch_and_not_on_what_was_asked_before() -> None:
    one, other = Order(pairs(30), seed=1), Order(pairs(30), seed=1)
    forwards = [one.epoch(number).tolist() for number in range(5)]
    backwards = [other.epoch(number).tolist() for number in reversed(range(5))][::-1]
    assert forwards == backwards
    assert Order(pairs(30), seed=2).epoch(0).tolist() != forwards[0]
    np_state = repr(np.random.get_state(legacy=False))
    Order(pairs(30), seed=1).epoch(9)
    assert repr(np.random.get_state(legacy=False)) == np_state, "the global generator is left alone"


class Overtaken(Order):
    """Whenever its cache has been read, another thread asks for epoch 1 and puts that there."""

    @property
    def _cached(self) -> tuple[int, np.ndarray] | None:
        found, self._kept = self._kept, (1, np.arange(self.n_epoch))
        return found

    @_cached.setter
    def _cached(self, value: tuple[int, np.ndarray] | None) -> None:
        self._kept = value


def test_a_thread_that_is_an_epoch_ahead_does_not_change_this_one() -> None:
    # The two prefetch threads share one cache; a second look at it could find the other's epoch.
    order = Overtaken(pairs(40), seed=0)
    order._cached = (0, np.arange(40)[::-1])
    assert order.epoch(0).tolist() == list(range(40))[::-1]


def test_a_balance_caps_pictures_that_agree_in_all_fields_and_draws_them_anew() -> None:
    data = people_and_things()
    order = Order(data, seed=0, balance=Balance(fields=("okey", "style"), cap=2))
    assert order.n_epoch == 2 + 2 + 1
    seen: set[int] = set()
    chosen = []
    for number in range(100):
        epoch = order.epoch(number).tolist()
        kinds = Counter((data[index].fields["okey"], data[index].fields["style"]) for index in epoch)
        assert kinds == {("person", "flat"): 2, ("apple", "flat"): 2, ("apple", "line"): 1}
        assert len(set(epoch)) == 5
        chosen.append(tuple(sorted(epoch)))
        seen.update(epoch)
    assert len(set(chosen)) > 50, "redrawn each epoch"
    assert seen == set(range(24)), "nobody is left out for good"


def test_a_picture_without_the_fields_of_the_balance_is_a_group_of_its_own() -> None:
    balance = Balance(fields=("okey", "style"), cap=2)
    assert sorted(Order(pairs(208), 0, balance).epoch(0)) == list(range(208))
    assert Order(pairs(208, okey="", style=None), 0, balance).n_epoch == 208, "empty cells of a table"
    assert Order(pairs(208, okey="apple"), 0, balance).n_epoch == 2, "one of the fields is enough"
    assert Order(pairs(5) + pairs(4, okey=3), 0, Balance(fields=("okey",), cap=1)).n_epoch == 6


def test_the_size_of_an_epoch_is_said_with_its_reason() -> None:
    balance = Balance(fields=("okey", "style"), cap=2)
    assert epoch_line(pairs(3), None) == "an epoch has all 3 pictures to learn from"
    assert epoch_line(people_and_things(), balance) == (
        "an epoch has 5 of 24 pictures to learn from: [balance] takes at most 2 that agree in okey and style; "
        "--set balance=none takes all"
    )
    assert epoch_line(people_and_things() + pairs(1200), balance) == (
        "an epoch has 1,205 of 1,224 pictures to learn from: [balance] takes at most 2 that agree in okey and style; "
        "1,200 have none of these fields and always count; --set balance=none takes all"
    )
    assert epoch_line(pairs(9), balance) == (
        "an epoch has 9 of 9 pictures to learn from: [balance] takes at most 2 that agree in okey and style; "
        "9 have none of these fields and always count"
    )


def test_without_a_balance_alike_pictures_all_count() -> None:
    assert Order(people_and_things(), seed=0).n_epoch == 24


def test_batches_run_over_epoch_ends() -> None:
    order = Order(pairs(10), seed=0)
    members = [member for number in range(5) for member in order.batch(number, 4)]  # two epochs exactly
    assert [epoch for epoch, _ in members] == [0] * 10 + [1] * 10
    assert [index for _, index in members] == [*order.epoch(0).tolist(), *order.epoch(1).tolist()]
    assert [epoch for epoch, _ in order.batch(2, 4)] == [0, 0, 1, 1]


def test_a_batch_larger_than_the_data_takes_several_epochs() -> None:
    members = Order(pairs(3), seed=0).batch(0, 8)
    assert [epoch for epoch, _ in members] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_order_of_data_that_name_splits_and_balance_is_the_one_it_always_was() -> None:
    """Its hash was taken before data sets had weights: trained weights stay what they were, bit for bit."""
    learned = [i for i in range(48) if i % 6 and i % 11]
    pairs = [Pair(str(i), ("x",), "train", {"okey": str(i // 3), "style": "flat"}) for i in learned]
    order = Order(pairs, 0, Balance(fields=("okey", "style"), cap=2))
    digest = hashlib.sha256(b"".join(order.epoch(number).tobytes() for number in range(3)))
    assert digest.hexdigest()[:16] == "a07200939c450c18"
