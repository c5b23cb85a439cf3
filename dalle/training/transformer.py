"""Stage 2: the transformer learns caption tokens followed by picture tokens (§2.2, App. B.2).

Shapes: B batch, T text slots, N image tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from dalle.data.pair import Pair
from dalle.data.tokens import Tokens
from dalle.evaluation.protocols import decode, first_captions, measure_losses
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.generation.engine import Engine
from dalle.generation.request import GenerationOptions
from dalle.image_tokenizer import ImageTokenizer
from dalle.token_model import TokenModel
from dalle.tokenizer import TextTokenizer
from dalle.training.order import Order, rng
from dalle.training.processes import ALONE, World
from dalle.training.recipe import Balance, TransformerTraining
from dalle.transformer import Transformer

SHEET_CAPTIONS = 16


@dataclass(frozen=True)
class Sequences:
    """Captioned pictures as the transformer sees them: pairs, and the tokens of each pair's picture, once or more."""

    pairs: list[Pair]
    encodings: Sequence[np.ndarray | Tokens]  # each (M, G, G) uint16, in memory or on disk

    def image(self, index: int, encoding: int = 0) -> np.ndarray:
        """The image tokens of pair `index` in raster order, (N,) int64."""
        return np.asarray(self.encodings[encoding][index]).astype(np.int64).reshape(-1)


class TransformerStage:
    """Trains a `Transformer` on captions and stored picture tokens."""

    name = "transformer"

    def __init__(
        self,
        model: nn.Module,
        settings: TransformerTraining,
        tokenizer: TextTokenizer,
        dvae: ImageTokenizer,
        train: Sequences,
        held_out: Sequences,
        *,
        seed: int,
        balance: Balance | None,
        sampling: GenerationOptions,
        world: World = ALONE,
    ) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.tokenizer, self.dvae, self.sampling = tokenizer, dvae, sampling
        self.train, self.held_out = train, held_out
        self.device = next(model.parameters()).device
        if isinstance(model, Transformer):
            model.set_dropout(settings.dropout)
        self.order = Order(train.pairs, seed, balance, world=world)
        self.world = world
        self.captions, self.n_truncated = fitting_captions(train.pairs, tokenizer)
        self.validation_members = spread(range(len(held_out.pairs)), settings.n_validation)
        self.sheet_members = spread(self.validation_members, SHEET_CAPTIONS)

    @property
    def network(self) -> TokenModel:
        """Return the token model that the stage trains, or a part of which."""
        return cast(TokenModel, self.model)

    @property
    def _transformer(self) -> Transformer:
        """Return our own, which alone reads other tokens than it tells."""
        assert isinstance(self.model, Transformer)
        return self.model

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Text (B, T) and image tokens (B, N) of micro-batch `number`."""
        members = self.order.batch(number, self.settings.batch_size)
        text = np.stack([self._text(epoch, index) for epoch, index in members])
        image = np.stack([self.train.image(index, self._encoding(epoch, index)) for epoch, index in members])
        return torch.from_numpy(text).to(self.device), torch.from_numpy(image).to(self.device)

    def _encoding(self, epoch: int, index: int) -> int:
        """Which encoding of a picture an epoch sees."""
        n = len(self.train.encodings)
        if n == 1:
            return 0
        return int(rng(self.seed, "encoding", epoch, self.train.pairs[index].key).integers(n))

    def _text(self, epoch: int, index: int) -> np.ndarray:
        """One caption of a pair, encoded anew: the draw depends on (seed, epoch, sample)."""
        generator = rng(self.seed, "caption", epoch, self.train.pairs[index].key)
        captions = self.captions[index]
        caption = captions[int(generator.integers(len(captions)))]
        if generator.random() < self.settings.caption_dropout:
            return self.tokenizer.pad(self.tokenizer.encode(""))
        return encode_caption(self.tokenizer, caption, self.settings.bpe_dropout, generator)

    def loss(self, batch: tuple[Tensor, Tensor], step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """1/8 text + 7/8 image cross-entropy of a micro-batch, nats per token."""
        text, image = batch
        generator = rng(self.seed, "noise", number)
        # Dropout draws from the global generator: each process for its own part, which is not one process's draw.
        torch.manual_seed((int(generator.integers(2**63)) + self.world.rank) % 2**63)
        read = self._disturbed(image, generator)
        losses = self.network.loss(text, image) if read is None else self._transformer.loss(text, image, read)
        return losses.total, {"text_loss": losses.text.detach(), "image_loss": losses.image.detach()}

    def _disturbed(self, image: Tensor, generator: np.random.Generator) -> Tensor | None:
        """The image tokens (B, N) with some of them replaced; None when the recipe replaces none."""
        if self.settings.token_noise == 0:
            return None
        shape = (self.world.size * len(image), image.shape[1])  # of all processes' parts: each takes its own
        part = self.world.part(shape[0])
        is_replaced = torch.from_numpy(generator.random(shape) < self.settings.token_noise)[part]
        others = torch.from_numpy(generator.integers(self.network.config.n_image_vocab, size=shape))[part]
        return torch.where(is_replaced.to(image.device), others.to(image.device), image)

    def _held_out(self, members: list[int]) -> tuple[Tensor, Tensor]:
        """First captions (M, T) and image tokens (M, N) of held-out pairs."""
        text, _ = first_captions((self.held_out.pairs[index] for index in members), self.tokenizer)
        return text, torch.from_numpy(np.stack([self.held_out.image(index) for index in members]))

    def validate(self) -> dict[str, float]:
        """Losses on held-out pairs in nats per token: with their captions, and with other pictures' captions.

        Several processes share the pairs, if they can be shared equally: a sharded model needs all at every call.
        """
        n, rows = len(self.validation_members), slice(None)
        if n % self.world.size == 0:
            rows = self.world.part(n)
        figures = asdict(measure_losses(self.network, *self._held_out(self.validation_members), rows))
        return dict(zip(figures, self.world.means(list(figures.values())), strict=True))

    def score(self, figures: dict[str, float]) -> float:
        """The image loss, negated."""
        return -figures["image_loss"]

    def sheet(self) -> Image:
        """One draw for each of some held-out captions, each below the reconstruction of its true picture."""
        text, image = self._held_out(self.sheet_members)
        drawn = Engine(self.network).generate(text.to(self.device), range(len(text)), self.sampling)
        return pairs_sheet(decode(self.dvae, image.view(drawn.shape)), decode(self.dvae, drawn))


def encode_caption(
    tokenizer: TextTokenizer, caption: str, dropout: float, generator: np.random.Generator
) -> np.ndarray:
    """A padded caption (T,) int64 with BPE dropout; one that fits only without dropout is encoded without it."""
    try:
        ids = tokenizer.encode(caption, dropout=dropout, rng=generator)
    except ValueError:  # dropout lengthens: a caption must not lose its end to it
        ids = tokenizer.encode(caption, truncate=True)
    return tokenizer.pad(ids)


def fitting_captions(pairs: list[Pair], tokenizer: TextTokenizer) -> tuple[list[tuple[str, ...]], int]:
    """Each pair's captions that fit the text slots; a pair without any keeps its shortest, which is cut and counted."""
    kept, n_truncated = [], 0
    for pair in pairs:
        fitting = tuple(
            caption for caption in pair.captions if tokenizer.count(caption) <= tokenizer.max_tokens
        )
        if not fitting:
            n_truncated += 1
            fitting = (min(pair.captions, key=tokenizer.count),)
        kept.append(fitting)
    return kept, n_truncated
