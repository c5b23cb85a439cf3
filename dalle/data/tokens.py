"""The token store: every picture of a data set as dVAE tokens, encoded once, on disk, in shards of pictures.

Source: the second training stage sees images only as tokens (paper section 2, App. B.2, Listing 2). Any number of
processes encode, each the shards whose number it leaves as a remainder; each shard goes on where it was stopped, by
as many processes as before or by others.

FOLDER/tokens/HASH/  store.json  tokens-SHARD.npy  progress-SHARD.json
Shapes: M pictures, B batch, G grid side.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from dalle import files, images, weights
from dalle.data.pairs import BadSampleLog, Pair, PairSet
from dalle.dvae import DiscreteVAE
from dalle.image_tokenizer import ImageTokenizer

Crop = Literal["paper", "center", "near"]  # Listing 2; the whole central square; nearly the whole of it

FORMAT = 2  # of a store; part of its settings
BATCHES_PER_FLUSH = 8  # what a kill can cost each process at most
N_READERS = 8  # threads that decode and crop pictures while the dVAE encodes
MIN_SHARD, MAX_SHARD, N_SHARDS = 256, 16384, 64  # pictures a shard, and how many shards that is meant to give


class Tokens:
    """Rows of token grids (G, G) uint16 on disk, read where they lie: only those that are asked for, in any order."""

    def __init__(self, shards: Sequence[NDArray[np.uint16]], rows: NDArray[np.int64]) -> None:
        """`shards` (rows a shard, G, G), all as long as the first but the last; `rows` numbers those in the view."""
        self._shards, self._rows = shards, rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(M, G, G)."""
        return (len(self), *self._shards[0].shape[1:])

    def __getitem__(self, index: int) -> NDArray[np.uint16]:
        """The grid (G, G) of a row; IndexError for one that is not there."""
        shard, offset = divmod(int(self._rows[index]), len(self._shards[0]))
        grid: NDArray[np.uint16] = self._shards[shard][offset]
        return grid

    def take(self, indices: Sequence[int]) -> "Tokens":
        """A view of some rows, in the order given."""
        return Tokens(self._shards, self._rows[np.asarray(indices, dtype=np.int64)])


class TokenStore:
    """A finished store: its `tokens` (M, G, G), the `keys` of their rows, `valid` row numbers.

    Rows of pictures that could not be read are zero and not in `valid`. `settings` says what made the store.
    Raises ValueError when the folder holds no finished store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "store.json").is_file():
            raise ValueError(f"{folder} holds no token store: encode the pictures first")
        description = files.read_json(self.folder / "store.json")
        self.keys: list[str] = description["keys"]
        self.settings: dict[str, object] = description["settings"]
        parts = _shards(len(self.keys), description["shard_size"])
        found = [_read_progress(self.folder, shard) for shard in range(len(parts))]
        n_done = sum(n for n, _ in found)
        if n_done != len(self.keys):
            raise ValueError(f"{folder} holds {n_done} of {len(self.keys)} pictures: encode again to go on")
        shards = [np.load(_file(self.folder, shard), mmap_mode="r") for shard in range(len(parts))]
        if [len(shard) for shard in shards] != [len(part) for part in parts]:
            n_rows = sum(len(shard) for shard in shards)
            raise ValueError(f"{folder} is damaged: {n_rows} rows for {len(self.keys)} keys; delete it")
        self.tokens = Tokens(shards, np.arange(len(self.keys)))
        is_valid = np.ones(len(self.keys), dtype=bool)
        is_valid[[row for _, invalid in found for row in invalid]] = False
        self.valid: NDArray[np.int64] = np.flatnonzero(is_valid)

    def __len__(self) -> int:
        return len(self.keys)


def encode_part(
    pairs: PairSet,
    dvae: ImageTokenizer,
    folder: str | Path,
    *,
    crop: Crop,
    seed: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    n_processes: int = 1,
    shard_size: int | None = None,
) -> Path:
    """Encode the shards of process `rank` into `folder`/tokens/HASH/, which is returned.

    HASH stands for dVAE, pairs, crop and seed. What was left unfinished is continued, what is finished is left alone.
    The store can be opened when all processes have returned. `progress` is called with the number of this process's
    pictures that are done, and of all. `shard_size` (pictures) is for a store that is not there yet.

    Unreadable pictures and, by process 0, the samples that `pairs` skipped go to `folder`/bad_samples.jsonl, those of
    other processes to bad_samples-RANK.jsonl; ValueError when they are more than 1 %.
    """
    if not len(pairs):
        raise ValueError("there are no pictures to encode: the set is empty")
    if seed < 0 or batch_size < 1:
        raise ValueError(f"seed is {seed}, batch_size {batch_size}; they have to be >= 0 and >= 1")
    if dvae.n_codes > 2**16:
        raise ValueError(f"the dVAE has {dvae.n_codes} codes; a token store holds at most {2**16}")
    settings = _settings(pairs, dvae, crop, seed)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    store = Path(folder) / "tokens" / digest[:12]
    bad_samples = _log_of_bad_samples(Path(folder), pairs, rank, n_processes)
    parts = _open_or_create(store, settings, pairs, shard_size)
    own = range(rank, len(parts), n_processes)
    n_before, n_own = 0, sum(len(parts[shard]) for shard in own)
    for shard in own:

        def say(n_done: int, n_before: int = n_before) -> None:
            if progress is not None:
                progress(n_before + n_done, n_own)

        _encode_shard(pairs, parts[shard], dvae, store, shard, crop, seed, batch_size, bad_samples, say)
        n_before += len(parts[shard])
    return store


def _encode_shard(
    pairs: PairSet,
    rows: range,
    dvae: ImageTokenizer,
    store: Path,
    shard: int,
    crop: Crop,
    seed: int,
    batch_size: int,
    bad_samples: BadSampleLog,
    say: Callable[[int], None],
) -> None:
    """Encode those of a shard's rows that are not on disk yet; `say` is called with the number that are."""
    n_done, invalid = _read_progress(store, shard)
    if n_done == len(rows):
        return
    grid = dvae.grid_size
    if n_done == 0:
        np.lib.format.open_memmap(_file(store, shard), mode="w+", dtype="<u2", shape=(len(rows), grid, grid))
    with _file(store, shard).open("r+b") as file:
        row_bytes = 2 * grid**2
        header_bytes = os.fstat(file.fileno()).st_size - len(rows) * row_bytes
        left = pairs.pairs[rows.start + n_done : rows.stop]
        batches = _batches(left, dvae.image_size, crop, seed, batch_size)
        for n_batch, batch in enumerate(batches, start=1):
            readable = [row for row, picture in enumerate(batch) if isinstance(picture, Image)]
            tokens = np.zeros((len(batch), grid, grid), dtype="<u2")  # (B, G, G)
            if readable:
                tokens[readable] = _encode([p for p in batch if isinstance(p, Image)], dvae)
            for row, picture in enumerate(batch, start=rows.start + n_done):
                if isinstance(picture, ValueError):
                    bad_samples.add(pairs[row].key, str(picture))
                    invalid.append(row)
            file.seek(header_bytes + n_done * row_bytes)
            file.write(tokens.tobytes())
            n_done += len(batch)
            if n_batch % BATCHES_PER_FLUSH == 0 or n_done == len(rows):
                _record_progress(store, shard, file, n_done, invalid)
            say(n_done)


def _settings(pairs: PairSet, dvae: ImageTokenizer, crop: Crop, seed: int) -> dict[str, object]:
    tensors, config = dvae.state_dict(), dvae.config
    if isinstance(dvae, DiscreteVAE):  # another decoder reads the same tokens
        tensors, config = dvae.encoder.state_dict(), dvae.config.mirrored()
    return {
        "format": FORMAT,
        "encoder": weights.tensors_sha256(tensors),
        "dvae_config": config.model_dump(mode="json"),
        "pairs": pairs.fingerprint,
        "crop": crop,
        "seed": seed,
    }


def _log_of_bad_samples(folder: Path, pairs: PairSet, rank: int, n_processes: int) -> BadSampleLog:
    """Each process's own: of its share of the pictures as many may be bad as of all."""
    keys = {pair.key for pair in pairs} | {sample.key for sample in pairs.bad}
    file = f"bad_samples-{rank}.jsonl" if rank else "bad_samples.jsonl"
    log = BadSampleLog(folder / file, (len(pairs) + len(pairs.bad)) // n_processes, keys=keys)
    for sample in pairs.bad if rank == 0 else ():
        log.add(sample.key, sample.reason)
    return log


def _encode(pictures: Sequence[Image], dvae: ImageTokenizer) -> NDArray[np.int64]:
    parameter = next(dvae.parameters())
    with torch.inference_mode():
        x = images.to_tensor(pictures).to(parameter.device, parameter.dtype)  # (B, 3, H, W)
        tokens: NDArray[np.int64] = dvae.encode(x).cpu().numpy()  # (B, G, G)
    return tokens


def _open_or_create(
    store: Path, settings: dict[str, object], pairs: PairSet, shard_size: int | None
) -> list[range]:
    """The rows of each shard; all processes may make the store at once, for they all write the same."""
    if not (store / "store.json").is_file():
        size = shard_size or min(MAX_SHARD, max(MIN_SHARD, -(-len(pairs) // N_SHARDS)))
        description = {"settings": settings, "shard_size": size, "keys": [pair.key for pair in pairs]}
        files.write_json(store / "store.json", description)
    return _shards(len(pairs), files.read_json(store / "store.json")["shard_size"])


def _shards(n: int, size: int) -> list[range]:
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _file(store: Path, shard: int) -> Path:
    return store / f"tokens-{shard:05d}.npy"


def _read_progress(store: Path, shard: int) -> tuple[int, list[int]]:
    """How many rows of a shard are on disk, and which of the store's rows are invalid among them."""
    path = store / f"progress-{shard:05d}.json"
    if not path.is_file():
        return 0, []
    progress = files.read_json(path)
    return progress["n_done"], progress["invalid"]


def _record_progress(store: Path, shard: int, file: BinaryIO, n_done: int, invalid: list[int]) -> None:
    file.flush()
    os.fsync(file.fileno())  # the rows have to be on disk before a file says that they are
    files.write_json(store / f"progress-{shard:05d}.json", {"n_done": n_done, "invalid": invalid})


def _batches(
    pairs: Sequence[Pair], size: int, crop: Crop, seed: int, batch_size: int
) -> Iterator[list[Image | ValueError]]:
    """Cropped pictures in order, read by threads one batch ahead; the error instead of an unreadable one."""
    with ThreadPoolExecutor(min(N_READERS, os.cpu_count() or 1)) as readers:

        def submit(start: int) -> list[Future[Image | ValueError]]:
            chunk = pairs[start : start + batch_size]
            return [readers.submit(_read, pair, size, crop, seed) for pair in chunk]

        ahead = submit(0)
        for start in itertools.count(batch_size, batch_size):
            if not ahead:
                return
            current, ahead = ahead, submit(start)
            yield [picture.result() for picture in current]


def _read(pair: Pair, size: int, crop: Crop, seed: int) -> Image | ValueError:
    try:
        image = pair.open()
    except ValueError as error:
        return error
    if crop == "center":
        return images.center_crop(image, size)
    # differs: the paper draws a new crop each time it sees a picture; a store keeps one, drawn from the seed
    # and the key alone, so that neither order nor batch size nor a restart changes it
    key_seed = int.from_bytes(hashlib.sha256(pair.key.encode()).digest()[:8], "big")
    draw = images.transformer_crop if crop == "paper" else images.near_crop
    return draw(image, size, np.random.default_rng([seed, key_seed]))
