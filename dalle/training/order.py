"""Which pictures an update sees: a pure function of (seed, step), so that a resumed run sees what it would have seen."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from dalle.data.pair import Pair
from dalle.training.processes import ALONE, World
from dalle.training.recipe import Balance


def rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on all parts of the key and on nothing else."""
    digest = hashlib.sha256("\0".join(str(part) for part in key).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def _group(pair: Pair, index: int, balance: Balance | None) -> tuple[object, ...]:
    values = tuple(pair.fields.get(field) for field in balance.fields) if balance else ()
    return ("fields", *values) if any(value not in (None, "") for value in values) else ("alone", index)


def epoch_line(pairs: Sequence[Pair], balance: Balance | None) -> str:
    """Say how many of the pictures an epoch has, and why."""
    n_epoch = Order(pairs, 0, balance).n_epoch
    if balance is None and n_epoch == len(pairs):
        return f"an epoch has all {len(pairs):,} pictures to learn from"
    if balance is None:
        return f"an epoch has {n_epoch:,} of {len(pairs):,} pictures to learn from, by the weights of their data sets"
    fields = " and ".join(balance.fields)
    n_without = sum(_group(pair, index, balance)[0] == "alone" for index, pair in enumerate(pairs))
    without = f"; {n_without:,} have none of these fields and always count" if n_without else ""
    return (
        f"an epoch has {n_epoch:,} of {len(pairs):,} pictures to learn from: [balance] takes at most {balance.cap} that "
        f"agree in {fields}{without}" + ("" if n_epoch == len(pairs) else "; --set balance=none takes all")
    )


class Order:
    """Shuffled epochs over `pairs`; with a balance, large groups of alike pictures give a few members an epoch each.

    Of data sets with several weights the heaviest gives all its pictures each epoch, the others their share of them.
    A picture that has none of the balance's fields is a group of its own.

    An epoch's last pictures are left out where it is no multiple of `multiple`, so that no run of so many, counted
    from the start, meets a picture twice. Raises ValueError when an epoch is shorter than that.

    Several processes share one order: of each micro-batch a process is given its own part. So another number of
    processes, at the start or at a resume, changes neither the order nor what an update sees.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        seed: int,
        balance: Balance | None = None,
        multiple: int = 1,
        world: World = ALONE,
    ) -> None:
        self.seed, self.world = seed, world
        self.cap = balance.cap if balance else 1
        groups: dict[tuple[float, tuple[object, ...]], list[int]] = defaultdict(list)
        for index, pair in enumerate(pairs):
            groups[pair.weight, _group(pair, index, balance)].append(index)
        self.groups: dict[float, list[np.ndarray]] = defaultdict(list)  # by the weight of their data set
        for (weight, _), members in groups.items():
            self.groups[weight].append(np.array(members))
        self.n_of_weight = {
            weight: max(1, round(sum(min(self.cap, len(m)) for m in alike) * weight / max(self.groups)))
            for weight, alike in self.groups.items()
        }
        n_chosen = sum(self.n_of_weight.values())
        self.n_epoch = n_chosen - n_chosen % multiple  # pictures an epoch
        if self.n_epoch == 0:
            raise ValueError(
                f"an epoch has {n_chosen} pictures, an update needs {multiple} different ones: lower the batch size"
            )
        self._cached: tuple[int, np.ndarray] | None = None

    def epoch(self, number: int) -> np.ndarray:
        """The picture indices of one epoch, in order."""
        cached = self._cached  # read once: another prefetch thread may be at the next epoch already
        if cached is None or cached[0] != number:
            generator = rng(self.seed, "order", number)
            chosen = [self._chosen(weight, generator) for weight in self.groups]
            cached = self._cached = (number, generator.permutation(np.concatenate(chosen)))
        return cached[1]

    def _chosen(self, weight: float, generator: np.random.Generator) -> np.ndarray:
        """The pictures of one epoch from the data sets of one weight."""
        chosen = np.concatenate(
            [
                members if len(members) <= self.cap else generator.choice(members, self.cap, replace=False)
                for members in self.groups[weight]
            ]
        )
        n = self.n_of_weight[weight]
        return chosen if n == len(chosen) else generator.choice(chosen, n, replace=False)

    def batch(self, number: int, size: int) -> list[tuple[int, int]]:
        """The (epoch, picture index) of this process's members of micro-batch `number`, which has `size` in all.

        Batches run over epoch ends. Raises ValueError when the processes cannot have equal parts.
        """
        members = []
        for position in range(number * size, (number + 1) * size)[self.world.part(size)]:
            epoch, offset = divmod(position, self.n_epoch)
            members.append((epoch, int(self.epoch(epoch)[offset])))
        return members
