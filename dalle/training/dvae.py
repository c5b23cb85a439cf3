"""Stage 1: the discrete VAE learns to write a picture as a grid of tokens (§2.1, App. A.2).

Shapes: B batch, H and W picture sides in pixels, G grid side.
"""

from collections.abc import Callable

import torch
from PIL.Image import Image
from torch import Tensor

from dalle import images
from dalle.data.pairs import BadSampleLog, Pair
from dalle.dvae import DiscreteVAE
from dalle.evaluation.protocols import measure_reconstruction, reconstruct
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.training.optim import half_cosine
from dalle.training.order import Order, rng
from dalle.training.prefetch import Prefetch
from dalle.training.recipe import Balance, DVAETraining

SHEET_PICTURES = 16
VALIDATION_BATCH = 32
MAX_CACHE_BYTES = 2**30  # of whole pictures, kept small in memory so that each file is decoded once


class DVAEStage:
    """Trains a `DiscreteVAE` on pictures alone; captions are not looked at."""

    name = "dvae"

    def __init__(
        self,
        model: DiscreteVAE,
        settings: DVAETraining,
        train: list[Pair],
        held_out: list[Pair],
        bad: BadSampleLog,
        *,
        seed: int,
        balance: Balance | None,
    ) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.train, self.bad = train, bad
        self.order = Order(train, seed, balance)
        self.device = next(model.parameters()).device
        self._prefetch = Prefetch(self._load)
        size = model.config.image_size
        fits = settings.crop == "center" and 3 * size * size * len(train) <= MAX_CACHE_BYTES
        self._cache: dict[int, Image] | None = {} if fits else None
        chosen = spread(held_out, settings.n_validation)
        self.held_out = images.to_tensor(
            load_all(chosen, lambda pair: images.center_crop(pair.open(), size), bad)
        )

    def batch(self, number: int) -> Tensor:
        """Pictures of micro-batch `number`, (B, 3, H, W) in [0, 1]."""
        return self._prefetch(number).to(self.device)

    def _load(self, number: int) -> Tensor:
        pictures = []
        for epoch, index in self.order.batch(number, self.settings.batch_size):
            try:
                pictures.append(self._picture(epoch, index))
            except ValueError as error:
                reason = str(error)
                self.bad.add(self.train[index].key, reason)
        if not pictures:
            raise ValueError(f"no picture of a whole batch can be read, the last because: {reason}")
        return images.to_tensor(pictures).contiguous(memory_format=torch.channels_last)

    def _picture(self, epoch: int, index: int) -> Image:
        """One training picture at the model's size; ValueError when its file cannot be read."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        pair, size = self.train[index], self.model.config.image_size
        if self.settings.crop == "paper":
            return images.dvae_crop(pair.open(), size, rng(self.seed, "crop", epoch, pair.key))
        picture = images.center_crop(pair.open(), size)
        if self._cache is not None:
            self._cache[index] = picture
        return picture

    def loss(self, batch: Tensor, step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The (relaxed, normalised) evidence lower bound of a micro-batch under the schedules of update `step`."""
        generator = torch.Generator(device=self.device)
        generator.manual_seed(int(rng(self.seed, "gumbel", number).integers(2**63)))
        settings = self.settings
        return self.model.loss(
            batch,
            temperature=half_cosine(step, 1.0, settings.final_temperature, settings.temperature_steps),
            kl_weight=half_cosine(step, 0.0, settings.kl_weight, settings.kl_steps),
            generator=generator,
        )

    def validate(self) -> dict[str, float]:
        """PSNR in dB (hard tokens, pooled error) and the share of codes used on held-out pictures."""
        sums, _ = measure_reconstruction(self.model, torch.split(self.held_out, VALIDATION_BATCH))
        assert sums.psnr is not None  # a stage without held-out pictures cannot be made
        return {"psnr": sums.psnr, "codes_used": sums.codes_used}

    def sheet(self) -> Image:
        """Held-out pictures, each above its reconstruction from hard tokens."""
        originals = self.held_out[spread(range(len(self.held_out)), SHEET_PICTURES)]
        return pairs_sheet(originals, reconstruct(self.model, originals)[1])


def load_all(pairs: list[Pair], read: Callable[[Pair], Image], bad: BadSampleLog) -> list[Image]:
    """The pictures of `pairs`; unreadable ones are logged and left out."""
    pictures = []
    for pair in pairs:
        try:
            pictures.append(read(pair))
        except ValueError as error:
            reason = str(error)
            bad.add(pair.key, reason)
    if not pictures:
        raise ValueError(f"no held-out picture can be read, the last because: {reason}")
    return pictures
