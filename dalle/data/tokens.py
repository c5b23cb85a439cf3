"""The token store: every picture of a data set as dVAE tokens, encoded once, on disk.

Source: the second training stage sees images only as tokens (paper section 2, App. B.2, Listing 2).
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

from dalle import images, weights
from dalle.data.pairs import BadSampleLog, Pair, PairSet
from dalle.dvae import DiscreteVAE

Crop = Literal["paper", "center", "near"]  # Listing 2; the whole central square; nearly the whole of it

FORMAT = 1  # of a store; part of its settings
BATCHES_PER_FLUSH = 8  # what a kill can cost at most
N_READERS = 8  # threads that decode and crop pictures while the dVAE encodes


class TokenStore:
    """A finished store: `tokens` (M, G, G) uint16 memory map, `keys` of its rows, `valid` row numbers.

    Rows of pictures that could not be read are zero and not in `valid`. `settings` says what made the store.
    Raises ValueError when the folder holds no finished store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "store.json").is_file():
            raise ValueError(f"{folder} holds no token store: encode the pictures first")
        description = weights.read_json(self.folder / "store.json")
        progress = weights.read_json(self.folder / "progress.json")
        self.keys: list[str] = description["keys"]
        self.settings: dict[str, object] = description["settings"]
        if progress["n_done"] != len(self.keys):
            raise ValueError(
                f"{folder} holds {progress['n_done']} of {len(self.keys)} pictures: encode again to go on"
            )
        self.tokens: NDArray[np.uint16] = np.load(self.folder / "tokens.npy", mmap_mode="r")  # (M, G, G)
        if len(self.tokens) != len(self.keys):
            raise ValueError(
                f"{folder} is damaged: {len(self.tokens)} rows for {len(self.keys)} keys; delete it"
            )
        is_valid = np.ones(len(self.keys), dtype=bool)
        is_valid[progress["invalid"]] = False
        self.valid: NDArray[np.int64] = np.flatnonzero(is_valid)

    def __len__(self) -> int:
        return len(self.keys)


def encode_pairs(
    pairs: PairSet,
    dvae: DiscreteVAE,
    folder: str | Path,
    *,
    crop: Crop,
    seed: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Encode all pictures into `folder`/tokens/HASH/; HASH stands for dVAE, pairs, crop and seed.

    A store that was left unfinished is continued, a finished one is returned. `progress` is called with the
    number of pictures done and of all. Unreadable pictures and the samples that `pairs` skipped go to
    `folder`/bad_samples.jsonl; ValueError when they are more than 1 %.
    """
    if not len(pairs):
        raise ValueError("there are no pictures to encode: the set is empty")
    if seed < 0 or batch_size < 1:
        raise ValueError(f"seed is {seed}, batch_size {batch_size}; they have to be >= 0 and >= 1")
    if dvae.config.n_codes > 2**16:
        raise ValueError(f"the dVAE has {dvae.config.n_codes} codes; a token store holds at most {2**16}")
    settings = _settings(pairs, dvae, crop, seed)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    store = Path(folder) / "tokens" / digest[:12]
    bad_samples = _log_of_bad_samples(Path(folder), pairs)
    n_done, invalid = _open_or_create(store, settings, pairs, dvae.config.grid_size)
    if n_done == len(pairs):
        return TokenStore(store)
    with (store / "tokens.npy").open("r+b") as file:
        row_bytes = 2 * dvae.config.grid_size**2
        header_bytes = os.fstat(file.fileno()).st_size - len(pairs) * row_bytes
        batches = _batches(pairs.pairs[n_done:], dvae.config.image_size, crop, seed, batch_size)
        for n_batch, batch in enumerate(batches, start=1):
            readable = [row for row, picture in enumerate(batch) if isinstance(picture, Image)]
            tokens = np.zeros(
                (len(batch), dvae.config.grid_size, dvae.config.grid_size), dtype="<u2"
            )  # (B, G, G)
            if readable:
                tokens[readable] = _encode([p for p in batch if isinstance(p, Image)], dvae)
            for row, picture in enumerate(batch):
                if isinstance(picture, ValueError):
                    bad_samples.add(pairs[n_done + row].key, str(picture))
                    invalid.append(n_done + row)
            file.seek(header_bytes + n_done * row_bytes)
            file.write(tokens.tobytes())
            n_done += len(batch)
            if n_batch % BATCHES_PER_FLUSH == 0 or n_done == len(pairs):
                _record_progress(store, file, n_done, invalid)
            if progress is not None:
                progress(n_done, len(pairs))
    return TokenStore(store)


def _settings(pairs: PairSet, dvae: DiscreteVAE, crop: Crop, seed: int) -> dict[str, object]:
    return {
        "format": FORMAT,
        "dvae": weights.tensors_sha256(dvae.state_dict()),
        "dvae_config": dvae.config.model_dump(mode="json"),
        "pairs": pairs.fingerprint,
        "crop": crop,
        "seed": seed,
    }


def _log_of_bad_samples(folder: Path, pairs: PairSet) -> BadSampleLog:
    keys = {pair.key for pair in pairs} | {sample.key for sample in pairs.bad}
    log = BadSampleLog(folder / "bad_samples.jsonl", len(pairs) + len(pairs.bad), keys=keys)
    for sample in pairs.bad:
        log.add(sample.key, sample.reason)
    return log


def _encode(pictures: Sequence[Image], dvae: DiscreteVAE) -> NDArray[np.int64]:
    parameter = next(dvae.parameters())
    with torch.inference_mode():
        x = images.to_tensor(pictures).to(parameter.device, parameter.dtype)  # (B, 3, H, W)
        tokens: NDArray[np.int64] = dvae.encode(x).cpu().numpy()  # (B, G, G)
    return tokens


def _open_or_create(
    store: Path, settings: dict[str, object], pairs: PairSet, grid_size: int
) -> tuple[int, list[int]]:
    """How many rows of the store are on disk, and which of them are invalid."""
    if (store / "progress.json").is_file():
        progress = weights.read_json(store / "progress.json")
        return progress["n_done"], progress["invalid"]
    store.mkdir(parents=True, exist_ok=True)
    shape = (len(pairs), grid_size, grid_size)
    np.lib.format.open_memmap(store / "tokens.npy", mode="w+", dtype="<u2", shape=shape)
    weights.write_json(store / "store.json", {"settings": settings, "keys": [pair.key for pair in pairs]})
    weights.write_json(store / "progress.json", {"n_done": 0, "invalid": []})  # last: now there is a store
    return 0, []


def _record_progress(store: Path, file: BinaryIO, n_done: int, invalid: list[int]) -> None:
    file.flush()
    os.fsync(file.fileno())  # the rows have to be on disk before a file says that they are
    weights.write_json(store / "progress.json", {"n_done": n_done, "invalid": invalid})


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
