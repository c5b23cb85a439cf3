"""The token store: exact, resumable, and apart for each dVAE, data set, crop and seed."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dalle import images
from dalle.data.pairs import PairSet, read_pairs
from dalle.data.shapes import write_shapes
from dalle.data.tokens import TokenStore, encode_part
from dalle.dvae import DiscreteVAE, DVAEConfig


def encoded(*arguments: Any, **settings: Any) -> TokenStore:
    """The store of one process that has encoded everything."""
    return TokenStore(encode_part(*arguments, **settings))


def make_dvae(seed: int = 0) -> DiscreteVAE:
    torch.manual_seed(seed)
    return DiscreteVAE(
        DVAEConfig(
            image_size=16,
            n_codes=27,
            quantizer="fsq",
            fsq_levels=(3, 3, 3),
            trunk="light",
            d_hidden=8,
            d_code=4,
            n_blocks=1,
        )
    ).eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    return read_pairs(write_shapes(tmp_path_factory.mktemp("shapes"), n=40, seed=1))


class Killed(Exception):
    pass


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_processes_encode_apart_what_one_encodes_and_any_number_goes_on(
    tmp_path: Path, pairs: PairSet
) -> None:
    dvae = make_dvae()
    shapes: dict[str, Any] = {"crop": "paper", "seed": 0, "batch_size": 2, "shard_size": 6}
    whole = encode_part(pairs, dvae, tmp_path / "whole", **shapes)

    def kill_after(n_done: int, total: int) -> None:
        assert total == {0: 16, 1: 12, 2: 12}[rank]  # shards 0, 3, 6 and 1, 4 and 2, 5 of 6, the last of 4
        if rank == 1 and n_done >= 8:
            raise Killed

    for rank in (2, 1, 0):
        context = pytest.raises(Killed) if rank == 1 else nullcontext()
        with context:
            store = encode_part(
                pairs, dvae, tmp_path / "apart", rank=rank, n_processes=3, progress=kill_after, **shapes
            )
    with pytest.raises(ValueError, match="holds 34 of 40 pictures"):  # shard 4 was begun and not finished
        TokenStore(store)
    seen: list[tuple[int, int]] = []
    for rank in (0, 1):  # as two now
        encode_part(
            pairs,
            dvae,
            tmp_path / "apart",
            rank=rank,
            n_processes=2,
            progress=lambda n_done, total: seen.append((n_done, total)),
            **shapes,
        )
    assert [n for n, _ in seen] == [14, 16, 18], "nothing that was done is encoded again"
    assert contents(store) == contents(whole)
    tokens = TokenStore(store).tokens
    assert [grid.tolist() for grid in tokens.take([39, 0, 7])] == [tokens[i].tolist() for i in (39, 0, 7)]
    with pytest.raises(IndexError):
        tokens[40]


def test_stored_tokens_equal_those_of_each_picture_encoded_alone(tmp_path: Path, pairs: PairSet) -> None:
    dvae = make_dvae()
    store = encoded(pairs, dvae, tmp_path, crop="center", seed=0, batch_size=7)
    assert store.tokens.shape == (40, 2, 2) and store.tokens[0].dtype == np.uint16
    assert store.keys == [pair.key for pair in pairs]
    assert store.valid.tolist() == list(range(40))
    for pair, tokens in zip(pairs, store.tokens, strict=True):
        with torch.inference_mode():
            alone = dvae.encode(images.to_tensor([images.center_crop(pair.open(), 16)]))
        assert alone[0].tolist() == tokens.tolist()


def test_paper_crops_depend_on_seed_and_key_and_not_on_the_batch(tmp_path: Path, pairs: PairSet) -> None:
    dvae = make_dvae()

    def stored(folder: str, pairs: PairSet, seed: int, batch_size: int) -> list[list[list[int]]]:
        made = encoded(pairs, dvae, tmp_path / folder, crop="paper", seed=seed, batch_size=batch_size)
        return [grid.tolist() for grid in made.tokens]

    reference = stored("a", pairs, seed=3, batch_size=64)
    assert stored("b", pairs, seed=3, batch_size=9) == reference
    assert stored("c", pairs[5:], seed=3, batch_size=9) == reference[5:]
    assert stored("d", pairs, seed=4, batch_size=9) != reference


def test_a_killed_encoding_goes_on_where_it_stopped(tmp_path: Path, pairs: PairSet) -> None:
    dvae = make_dvae()
    whole = encoded(pairs, dvae, tmp_path / "whole", crop="paper", seed=0, batch_size=2)

    def kill_after(n_done: int, total: int) -> None:
        if n_done >= 23:
            raise Killed

    with pytest.raises(Killed):
        encoded(pairs, dvae, tmp_path / "killed", crop="paper", seed=0, batch_size=2, progress=kill_after)
    (folder,) = (tmp_path / "killed" / "tokens").iterdir()
    with pytest.raises(ValueError, match="holds 16 of 40 pictures"):  # a flush every eighth batch
        TokenStore(folder)
    seen: list[int] = []
    resumed = encoded(
        pairs,
        dvae,
        tmp_path / "killed",
        crop="paper",
        seed=0,
        batch_size=2,
        progress=lambda n_done, total: seen.append(n_done),
    )
    assert seen[0] == 18 and seen[-1] == 40
    assert contents(resumed.folder) == contents(whole.folder)
    assert resumed.folder.name == whole.folder.name


def test_a_finished_store_is_not_encoded_again(tmp_path: Path, pairs: PairSet) -> None:
    first = encoded(pairs, make_dvae(), tmp_path, crop="center", seed=0)

    def fail(n_done: int, total: int) -> None:
        raise AssertionError("encoded again")

    assert encoded(pairs, make_dvae(), tmp_path, crop="center", seed=0, progress=fail).folder == first.folder


def test_another_dvae_data_set_crop_or_seed_makes_another_store(tmp_path: Path, pairs: PairSet) -> None:
    stores = [
        encoded(pairs[:3], make_dvae(), tmp_path, crop="center", seed=0),
        encoded(pairs[:3], make_dvae(1), tmp_path, crop="center", seed=0),
        encoded(pairs[:4], make_dvae(), tmp_path, crop="center", seed=0),
        encoded(pairs[:3], make_dvae(), tmp_path, crop="paper", seed=0),
        encoded(pairs[:3], make_dvae(), tmp_path, crop="near", seed=0),
        encoded(pairs[:3], make_dvae(), tmp_path, crop="center", seed=1),
    ]
    assert len({store.folder for store in stores}) == 6
    assert TokenStore(stores[3].folder).settings["crop"] == "paper"


def test_corrupt_pictures_are_logged_and_left_out_of_valid(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", n=20, seed=0)
    broken = tmp_path / "data" / "000004.png"
    broken.write_bytes(broken.read_bytes()[:50])
    store = encoded(read_pairs(tmp_path / "data"), make_dvae(), tmp_path / "run", crop="paper", seed=0)
    assert store.valid.tolist() == [n for n in range(20) if n != 4]
    assert '"key": "000004.png"' in (tmp_path / "run" / "bad_samples.jsonl").read_text()

    for number in range(5, 10):
        (tmp_path / "data" / f"{number:06d}.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="6 of 20 samples are bad"):
        encoded(read_pairs(tmp_path / "data"), make_dvae(), tmp_path / "run", crop="paper", seed=0)


def test_skipped_samples_are_listed_and_count_among_all_samples(tmp_path: Path) -> None:
    write_shapes(tmp_path / "data", n=199, seed=0)
    (tmp_path / "data" / "orphan.txt").write_text("no picture")
    broken = tmp_path / "data" / "000004.png"
    broken.write_bytes(broken.read_bytes()[:50])  # 2 of 200 are bad, not 2 of 199
    encoded(read_pairs(tmp_path / "data"), make_dvae(), tmp_path / "run", crop="center", seed=0)
    listed = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in listed] == ["orphan.txt", "000004.png"]


def test_bad_samples_of_another_data_set_in_the_same_folder_do_not_count(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write_shapes(tmp_path / name / name, n=8, seed=0)
        (tmp_path / name / name / "000004.png").write_bytes(b"not a picture")
        store = encoded(read_pairs(tmp_path / name), make_dvae(), tmp_path, crop="center", seed=0)
        assert len(store.valid) == 7


@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_byte_in_a_shard_is_noticed(tmp_path: Path, pairs: PairSet, place: int) -> None:
    settings: dict[str, Any] = {"crop": "center", "seed": 0, "shard_size": 15}
    store = encoded(pairs, make_dvae(), tmp_path, **settings)
    good = contents(store.folder)
    shard = store.folder / "tokens-00001.npy"
    data = bytearray(good[shard.name])
    data[len(data) - 15 * 2 * 4 if place == 0 else place] ^= 1  # the first byte of the rows, or the last
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokens-00001\.npy is not what was written: its sha256 differs"):
        encoded(pairs, make_dvae(), tmp_path, **settings)
    shard.unlink()  # as the error says
    (store.folder / "progress-00001.json").unlink()
    assert contents(encoded(pairs, make_dvae(), tmp_path, **settings).folder) == good


def test_a_flipped_byte_in_an_unfinished_shard_is_noticed(tmp_path: Path, pairs: PairSet) -> None:
    def kill_after(n_done: int, total: int) -> None:
        if n_done >= 23:
            raise Killed

    settings: dict[str, Any] = {"crop": "paper", "seed": 0, "batch_size": 2}
    with pytest.raises(Killed):
        encode_part(pairs, make_dvae(), tmp_path, progress=kill_after, **settings)
    (shard,) = tmp_path.rglob("tokens-00000.npy")
    data = bytearray(shard.read_bytes())
    data[len(data) - 40 * 2 * 4 + 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokens-00000\.npy is not what was written"):
        encode_part(pairs, make_dvae(), tmp_path, **settings)


def test_mistakes_are_named(tmp_path: Path, pairs: PairSet) -> None:
    with pytest.raises(ValueError, match="no pictures to encode"):
        encoded(PairSet(()), make_dvae(), tmp_path, crop="center", seed=0)
    with pytest.raises(ValueError, match="seed is -1"):
        encoded(pairs, make_dvae(), tmp_path, crop="center", seed=-1)
    with pytest.raises(ValueError, match="holds no token store"):
        TokenStore(tmp_path)
