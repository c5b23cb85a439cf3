"""The token store: every picture of a data set as dVAE tokens, encoded once, on disk, in shards of pictures.

Source: the second training stage sees images only as tokens (paper section 2, App. B.2, Listing 2). Any number of
processes encode, each the shards whose number it leaves as a remainder; each shard goes on where it was stopped, by
as many processes as before or by others.

FOLDER/tokens/HASH/  store.json  tokens-SHARD.npy  progress-SHARD.json (rows done, invalid ones, sha256 of the rows)
Shapes: M pictures, B batch, G grid side.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from dalle import files, images, weights
from dalle.data.pair import Pair
from dalle.data.pairs import PairSet
from dalle.data.reading import MAX_BAD_FRACTION, BadSampleLog, read_chunks
from dalle.dvae import DiscreteVAE
from dalle.image_tokenizer import ImageTokenizer

Crop = Literal["paper", "center", "near"]  # Listing 2; the whole central square; nearly the whole of it

FORMAT = 3  # of a store; part of its settings
BATCHES_PER_FLUSH = 8  # what a kill can cost each process at most
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
    Raises ValueError when the folder holds no finished store, or a shard whose bytes are not those that were written.
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
        n_done = sum(progress.n_done for progress in found)
        if n_done != len(self.keys):
            raise ValueError(f"{folder} holds {n_done} of {len(self.keys)} pictures: encode again to go on")
        shards = [np.load(_file(self.folder, shard), mmap_mode="r") for shard in range(len(parts))]
        if [len(shard) for shard in shards] != [len(part) for part in parts]:
            n_rows = sum(len(shard) for shard in shards)
            raise ValueError(f"{folder} is damaged: {n_rows} rows for {len(self.keys)} keys; delete it")
        for shard, (rows, progress) in enumerate(zip(shards, found, strict=True)):
            if hashlib.sha256(rows.data).hexdigest() != progress.sha256:
                raise _damaged(self.folder, shard)
        self.tokens = Tokens(shards, np.arange(len(self.keys)))
        is_valid = np.ones(len(self.keys), dtype=bool)
        is_valid[[row for progress in found for row in progress.invalid]] = False
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
    max_bad: float = MAX_BAD_FRACTION,
) -> Path:
    """Encode the shards of process `rank` into `folder`/tokens/HASH/, which is returned.

    HASH stands for dVAE, pairs, crop and seed. What was left unfinished is continued, what is finished is left alone.
    The store can be opened when all processes have returned. `progress` is called with the number of this process's
    pictures that are done, and of all. `shard_size` (pictures) is for a store that is not there yet.

    Unreadable pictures and, by process 0, the samples that `pairs` skipped go to `folder`/bad_samples.jsonl, those of
    other processes to bad_samples-RANK.jsonl; ValueError when they are more than max(5, `max_bad` of all).
    """
    if seed < 0 or batch_size < 1:
        raise ValueError(f"seed is {seed}, batch_size {batch_size}; they have to be >= 0 and >= 1")
    if dvae.n_codes > 2**16:
        raise ValueError(f"the dVAE has {dvae.n_codes} codes; a token store holds at most {2**16}")
    bad_samples = _log_of_bad_samples(Path(folder), pairs, rank, n_processes, max_bad)
    if not len(pairs):
        raise ValueError("there are no pictures to encode: the set is empty")
    settings = _settings(pairs, dvae, crop, seed)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    store = Path(folder) / "tokens" / digest[:12]
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
    progress = _read_progress(store, shard)
    if progress.n_done == len(rows):
        return
    grid, row_bytes = dvae.grid_size, 2 * dvae.grid_size**2
    if progress.n_done == 0:
        np.lib.format.open_memmap(_file(store, shard), mode="w+", dtype="<u2", shape=(len(rows), grid, grid))
    with _file(store, shard).open("r+b") as file:
        header_bytes = os.fstat(file.fileno()).st_size - len(rows) * row_bytes
        file.seek(header_bytes)
        digest = hashlib.sha256(file.read(progress.n_done * row_bytes))
        if progress.n_done and digest.hexdigest() != progress.sha256:
            raise _damaged(store, shard)
        n_done, invalid = progress.n_done, list(progress.invalid)
        left = pairs.pairs[rows.start + n_done : rows.stop]

        def prepare(pair: Pair, picture: Image) -> Image:
            return _cropped(pair, picture, dvae.image_size, crop, seed)

        for n_batch, batch in enumerate(read_chunks(left, batch_size, prepare), start=1):
            readable = [row for row, picture in enumerate(batch) if isinstance(picture, Image)]
            tokens = np.zeros((len(batch), grid, grid), dtype="<u2")  # (B, G, G)
            if readable:
                tokens[readable] = _encode([p for p in batch if isinstance(p, Image)], dvae)
            for row, picture in enumerate(batch, start=rows.start + n_done):
                if isinstance(picture, ValueError):
                    bad_samples.add(pairs[row].key, str(picture))
                    invalid.append(row)
            file.write(tokens.tobytes())
            digest.update(tokens.tobytes())
            n_done += len(batch)
            if n_batch % BATCHES_PER_FLUSH == 0 or n_done == len(rows):
                _record_progress(store, shard, file, _Progress(n_done, invalid, digest.hexdigest()))
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


def _log_of_bad_samples(
    folder: Path, pairs: PairSet, rank: int, n_processes: int, limit: float
) -> BadSampleLog:
    """Each process's own: of its share of the pictures as many may be bad as of all."""
    keys = {pair.key for pair in pairs} | {sample.key for sample in pairs.bad}
    file = f"bad_samples-{rank}.jsonl" if rank else "bad_samples.jsonl"
    log = BadSampleLog(folder / file, (len(pairs) + len(pairs.bad)) // n_processes, limit, keys=keys)
    log.add_all(pairs.bad if rank == 0 else ())
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


class _Progress(NamedTuple):
    """How far a shard is."""

    n_done: int  # rows on disk
    invalid: list[int]  # those of the store's rows that are invalid among them
    sha256: str  # of the rows on disk


def _damaged(store: Path, shard: int) -> ValueError:
    return ValueError(
        f"{_file(store, shard)} is not what was written: its sha256 differs. Delete it and "
        f"progress-{shard:05d}.json beside it, and run the same command to encode these pictures again"
    )


def _read_progress(store: Path, shard: int) -> _Progress:
    path = store / f"progress-{shard:05d}.json"
    if not path.is_file():
        return _Progress(0, [], "")
    return _Progress(**files.read_json(path))


def _record_progress(store: Path, shard: int, file: BinaryIO, progress: _Progress) -> None:
    file.flush()
    os.fsync(file.fileno())  # the rows have to be on disk before a file says that they are
    files.write_json(store / f"progress-{shard:05d}.json", progress._asdict())


def _cropped(pair: Pair, image: Image, size: int, crop: Crop, seed: int) -> Image:
    if crop == "center":
        return images.center_crop(image, size)
    # differs: the paper draws a new crop each time it sees a picture; a store keeps one, drawn from the seed
    # and the key alone, so that neither order nor batch size nor a restart changes it
    key_seed = int.from_bytes(hashlib.sha256(pair.key.encode()).digest()[:8], "big")
    draw = images.transformer_crop if crop == "paper" else images.near_crop
    return draw(image, size, np.random.default_rng([seed, key_seed]))
