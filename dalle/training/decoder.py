"""Stage "decoder": a larger decoder learns to draw from the tokens of a finished encoder.

Tokens say what, the decoder draws how: it may be several times larger than the one that the codes were learned with, and
draw more pixels than the encoder reads. Encoder and codes stay as they are. Source: the second phase of SeQ-GAN (Gu et
al. 2022, arXiv 2212.03185); the paper trains its dVAE in one phase.

Shapes: B batch, H side of the pictures that the encoder reads, S of those that the decoder draws, G grid side.
"""

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional as F

from dalle import images
from dalle.data.pair import Pair
from dalle.data.reading import BadSampleLog
from dalle.dvae import Decoder, DiscreteVAE, relaxed_pixels
from dalle.evaluation.protocols import decode, measure_reconstruction, reconstruct
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.training.critic import Critic, balanced
from dalle.training.order import Order, rng
from dalle.training.perceptual import FeatureDistance
from dalle.training.pictures import Pictures, load_all
from dalle.training.processes import ALONE, World
from dalle.training.recipe import Balance, DecoderTraining
from dalle.training.wrong_tokens import Source, corrupted, of_another_picture

SHEET_PICTURES = 16
VALIDATION_BATCH = 32
CRITIC_WIDTH = 32

Batch = tuple[Tensor, Tensor]  # tokens (B, G, G), pictures (B, 3, S, S) in [0, 1]


class DecoderModel(nn.Module):
    """What the stage trains: a decoder and, for an adversarial loss, its critic. The encoder is no part of it."""

    def __init__(self, decoder: Decoder, has_critic: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.critic = Critic(CRITIC_WIDTH) if has_critic else None


class DecoderStage:
    """Trains the decoder of a `DiscreteVAE` whose encoder is finished; captions are not looked at."""

    name = "decoder"

    def __init__(
        self,
        dvae: DiscreteVAE,
        settings: DecoderTraining,
        train: list[Pair],
        held_out: list[Pair],
        bad: BadSampleLog,
        *,
        seed: int,
        balance: Balance | None,
        world: World = ALONE,
        wrong: Source = of_another_picture,
    ) -> None:
        """`wrong` gives the tokens that take the place of some true ones."""
        self.wrong = wrong
        self.dvae, self.settings, self.seed, self.world = dvae, settings, seed, world
        self.device = next(dvae.parameters()).device
        dvae.encoder.eval().requires_grad_(False)
        self.model = DecoderModel(dvae.decoder, settings.adversarial_share > 0).to(self.device)
        self.distance = FeatureDistance(self.device) if settings.feature_weight else None
        self.train, self.order = train, Order(train, seed, balance, world=world)
        size = dvae.config.output_size

        def whole(pair: Pair) -> Image:
            return images.center_crop(pair.open(), size)

        self._pictures = Pictures(
            train,
            self.order,
            settings.batch_size,
            bad,
            read=whole,
            draw=None
            if settings.crop == "center"
            else lambda picture, drawn: images.shifted(picture, size // 16, drawn),
            side=size,
            seed=seed,
        )
        _, self.held_out = load_all(spread(held_out, settings.n_validation), whole, bad)

    @torch.no_grad()
    def batch(self, number: int) -> Batch:
        """Tokens (B, G, G), some of them wrong, and pictures (B, 3, S, S) in [0, 1] of micro-batch `number`."""
        members, pictures = self._pictures(number)
        pictures = pictures.to(self.device)
        tokens = self.dvae.encode(images.box_filtered(pictures, self.dvae.config.image_size))
        generator = rng(self.seed, "wrong tokens", number, self.world.rank)
        return corrupted(self.wrong, self.settings.token_noise, members, tokens, generator), pictures

    def loss(self, batch: Batch, step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Absolute and squared error, features, and the critic's doubt where there is one."""
        tokens, pictures = batch
        drawn = relaxed_pixels(self.model.decoder.from_tokens(tokens))  # (B, 3, S, S)
        with torch.autocast(self.device.type, enabled=False):
            l1, mse = F.l1_loss(drawn, pictures), F.mse_loss(drawn, pictures)
        loss, metrics = l1 + mse, {"l1": l1, "mse": mse}
        if self.distance is not None:
            metrics["feature_distance"] = self.distance(drawn, pictures)
            loss = loss + self.settings.feature_weight * metrics["feature_distance"]
        if self.model.critic is not None:
            loss = self._adversarial(self.model.critic, loss, drawn, pictures, step, metrics)
        weight = self.world.weight(len(pictures))  # unreadable pictures make parts unequal
        return loss * weight, {name: value.detach() for name, value in metrics.items()}

    def _adversarial(
        self,
        critic: Critic,
        loss: Tensor,
        drawn: Tensor,
        pictures: Tensor,
        step: int,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """The critic learns from the first update on; the decoder listens to it from `adversarial_start`."""
        if step >= self.settings.adversarial_start:
            doubt = critic.doubt(drawn)
            loss, metrics["critic_weight"] = balanced(drawn, loss, doubt, self.settings.adversarial_share)
        metrics["critic"] = critic.loss(drawn, pictures)
        return loss + metrics["critic"]

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """PSNR in dB of held-out pictures, at the tokens' size and at that drawn; their feature distance."""
        sums, tokens = measure_reconstruction(self.dvae, torch.split(self.held_out, VALIDATION_BATCH))
        assert sums.seen.psnr is not None and sums.drawn.psnr is not None  # there are held-out pictures
        figures = {"psnr": sums.seen.psnr, "output_psnr": sums.drawn.psnr}
        if self.distance is not None:
            total = 0.0
            for part, pictures in zip(
                torch.split(tokens, VALIDATION_BATCH),
                torch.split(self.held_out, VALIDATION_BATCH),
                strict=True,
            ):
                drawn = decode(self.dvae, part).to(self.device)
                total += float(self.distance(drawn, pictures.to(self.device))) * len(part)
            figures["feature_distance"] = total / len(tokens)
        return figures

    def score(self, figures: dict[str, float]) -> float:
        """The PSNR at the size that is drawn."""
        return figures["output_psnr"]

    def sheet(self) -> Image:
        """Held-out pictures, each above what is drawn of its tokens."""
        originals = self.held_out[spread(range(len(self.held_out)), SHEET_PICTURES)]
        return pairs_sheet(originals, reconstruct(self.dvae, originals)[1])
