"""Stage 1: the discrete VAE learns to write a picture as a grid of tokens (§2.1, App. A.2).

Shapes: B batch, H and W picture sides in pixels, G grid side.
"""

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from dalle import images
from dalle.data.pair import Pair
from dalle.data.reading import BadSampleLog
from dalle.dvae import DOWNSAMPLING, DiscreteVAE
from dalle.evaluation.metrics import INK_BELOW
from dalle.evaluation.protocols import measure_reconstruction, reconstruct
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.training.optim import half_cosine
from dalle.training.order import Order, rng
from dalle.training.perceptual import FeatureDistance
from dalle.training.pictures import Pictures, load_all, small_square
from dalle.training.processes import ALONE, World
from dalle.training.recipe import Balance, DVAETraining

SHEET_PICTURES = 16
VALIDATION_BATCH = 32


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
        world: World = ALONE,
    ) -> None:
        self.model, self.settings, self.seed, self.world = model, settings, seed, world
        self.train, self.bad = train, bad
        self.order = Order(train, seed, balance, world=world)
        self.device = next(model.parameters()).device
        self._features = FeatureDistance(self.device) if settings.feature_weight else None
        size = model.config.output_size

        def whole(pair: Pair) -> Image:
            return images.center_crop(pair.open(), size)

        crops = {"paper": images.dvae_crop, "near": images.near_crop}
        crop = crops.get(settings.crop)
        side = {"center": size, "near": 2 * size}.get(settings.crop)  # the paper's crop needs the whole file
        self._pictures = Pictures(
            train,
            self.order,
            settings.batch_size,
            bad,
            read=Pair.open
            if side is None
            else whole
            if crop is None
            else lambda pair: small_square(pair, side),
            draw=None if crop is None else lambda picture, drawn: crop(picture, size, drawn),
            side=side,
            seed=seed,
        )
        _, self.held_out = load_all(spread(held_out, settings.n_validation), whole, bad)

    def batch(self, number: int) -> Tensor:
        """Pictures of micro-batch `number`, (B, 3, H, W) in [0, 1]."""
        return self._pictures(number)[1].to(self.device)

    def loss(self, batch: Tensor, step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The (relaxed, normalised) evidence lower bound of a micro-batch under the schedules of update `step`."""
        generator = torch.Generator(device=self.device)
        # Each process draws for its own part: for all parts it would be K numbers a cell of every picture.
        first = int(rng(self.seed, "gumbel", number).integers(2**63))
        generator.manual_seed((first + self.world.rank) % 2**63)
        settings = self.settings
        loss, metrics = self.model.loss(
            batch,
            temperature=half_cosine(step, 1.0, settings.final_temperature, settings.temperature_steps),
            kl_weight=half_cosine(step, 0.0, settings.kl_weight, settings.kl_steps),
            generator=generator,
            distance=None if self._features is None else self._distance,
            pixel_weights=None if settings.ink_weight == 1 else ink_weights(batch, settings.ink_weight),
        )
        return loss * self.world.weight(len(batch)), metrics  # unreadable pictures make parts unequal

    def _distance(self, drawn: Tensor, pictures: Tensor) -> Tensor:
        assert self._features is not None
        return self.settings.feature_weight * self._features(drawn, pictures)

    def validate(self) -> dict[str, float]:
        """PSNR in dB (hard tokens, pooled error) and the share of codes used on held-out pictures."""
        sums, _ = measure_reconstruction(self.model, torch.split(self.held_out, VALIDATION_BATCH))
        psnr = sums.seen.psnr
        assert psnr is not None  # a stage without held-out pictures cannot be made
        return {"psnr": psnr, "codes_used": sums.codes_used}

    def score(self, figures: dict[str, float]) -> float:
        """The PSNR."""
        return figures["psnr"]

    def sheet(self) -> Image:
        """Held-out pictures, each above its reconstruction from hard tokens."""
        originals = self.held_out[spread(range(len(self.held_out)), SHEET_PICTURES)]
        return pairs_sheet(originals, reconstruct(self.model, originals)[1])


def ink_weights(pictures: Tensor, weight: float) -> Tensor:
    """`weight` for the pixels of each token's patch of pictures (B, 3, H, W) that has ink, 1 elsewhere: (B, 1, H, W)."""
    is_ink = (pictures.amin(dim=1, keepdim=True) * 255 < INK_BELOW).float()  # (B, 1, H, W)
    patches = F.max_pool2d(is_ink, DOWNSAMPLING)  # (B, 1, G, G)
    return 1 + (weight - 1) * F.interpolate(patches, scale_factor=DOWNSAMPLING)
