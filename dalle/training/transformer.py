"""Stage 2: the transformer learns caption tokens followed by picture tokens (§2.2, App. B.2).

Shapes: B batch, T text slots, N image tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dalle.data.pairs import Pair
from dalle.dvae import DiscreteVAE
from dalle.generation.engine import Engine
from dalle.generation.options import GenerationOptions
from dalle.tokenizer import Tokenizer
from dalle.training.order import Order, rng
from dalle.training.recipe import Balance, TransformerTraining
from dalle.training.sheet import pairs_sheet
from dalle.transformer import Transformer

SHEET_CAPTIONS = 16
VALIDATION_BATCH = 64


@dataclass(frozen=True)
class Sequences:
    """Captioned pictures as the transformer sees them: pairs, and the tokens of each pair's picture."""

    pairs: list[Pair]
    tokens: np.ndarray  # (M, G, G) uint16

    def image(self, index: int) -> np.ndarray:
        """The image tokens of pair `index` in raster order, (N,) int64."""
        return np.asarray(self.tokens[index]).astype(np.int64).reshape(-1)


class TransformerStage:
    """Trains a `Transformer` on captions and stored picture tokens."""

    name = "transformer"

    def __init__(
        self,
        model: Transformer,
        settings: TransformerTraining,
        tokenizer: Tokenizer,
        dvae: DiscreteVAE,
        train: Sequences,
        held_out: Sequences,
        *,
        seed: int,
        balance: Balance | None,
        sampling: GenerationOptions,
    ) -> None:
        self.model, self.settings, self.seed = model, settings, seed
        self.tokenizer, self.dvae, self.sampling = tokenizer, dvae, sampling
        self.train, self.held_out = train, held_out
        self.device = next(model.parameters()).device
        self.order = Order(train.pairs, seed, balance)
        self.captions, self.n_truncated = fitting_captions(train.pairs, tokenizer)
        self._validation = self._validation_batches()

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Text (B, T) and image tokens (B, N) of micro-batch `number`."""
        members = self.order.batch(number, self.settings.batch_size)
        text = np.stack([self._text(epoch, index) for epoch, index in members])
        image = np.stack([self.train.image(index) for _, index in members])
        return torch.from_numpy(text).to(self.device), torch.from_numpy(image).to(self.device)

    def _text(self, epoch: int, index: int) -> np.ndarray:
        """One caption of a pair, encoded anew: the draw depends on (seed, epoch, sample)."""
        generator = rng(self.seed, "caption", epoch, self.train.pairs[index].key)
        captions = self.captions[index]
        caption = captions[int(generator.integers(len(captions)))]
        if generator.random() < self.settings.caption_dropout:
            return self.tokenizer.pad([])
        try:
            ids = self.tokenizer.encode(caption, dropout=self.settings.bpe_dropout, rng=generator)
        except ValueError:  # dropout lengthens: a caption must not lose its end to it
            ids = self.tokenizer.encode(caption, truncate=True)
        return self.tokenizer.pad(ids)

    def loss(self, batch: tuple[Tensor, Tensor], step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """1/8 text + 7/8 image cross-entropy of a micro-batch, nats per token."""
        losses = self.model.loss(*batch)
        return losses.total, {"text_loss": losses.text.detach(), "image_loss": losses.image.detach()}

    def _validation_batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        count = min(self.settings.n_validation, len(self.held_out.pairs))
        chosen = np.linspace(0, len(self.held_out.pairs) - 1, count).astype(int).tolist()
        self.sheet_members = chosen[:: max(1, count // SHEET_CAPTIONS)][:SHEET_CAPTIONS]
        text = np.stack([self._first_caption(index) for index in chosen])
        image = np.stack([self.held_out.image(index) for index in chosen])
        wrong = np.roll(text, 1 if count == 1 else count // 2, axis=0)  # each picture gets another one's caption
        parts = [torch.from_numpy(array).to(self.device) for array in (text, wrong, image)]
        return list(zip(*(part.split(VALIDATION_BATCH) for part in parts), strict=True))

    def _first_caption(self, index: int) -> np.ndarray:
        return self.tokenizer.pad(self.tokenizer.encode(self.held_out.pairs[index].captions[0], truncate=True))

    def validate(self) -> dict[str, float]:
        """Losses on held-out pairs in nats per token: with their captions, and with other pictures' captions."""
        sums = dict.fromkeys(("text_loss", "image_loss", "image_loss_shuffled"), 0.0)
        n_rows = 0
        for text, wrong, image in self._validation:
            losses = self.model.loss(text, image)
            sums["text_loss"] += float(losses.text) * len(text)
            sums["image_loss"] += float(losses.image) * len(text)
            sums["image_loss_shuffled"] += float(self.model.loss(wrong, image).image) * len(text)
            n_rows += len(text)
        return {name: value / n_rows for name, value in sums.items()}

    def sheet(self) -> Image:
        """One draw for each of some held-out captions, each below the reconstruction of its true picture."""
        text = np.stack([self._first_caption(index) for index in self.sheet_members])
        seeds = list(range(len(text)))
        drawn = Engine(self.model).generate(torch.from_numpy(text).to(self.device), seeds, self.sampling)
        true = np.stack([self.held_out.image(index).reshape(drawn.shape[1:]) for index in self.sheet_members])
        true_pictures, draws = (
            self.dvae.decode(tokens.to(self.device)).float().cpu() for tokens in (torch.from_numpy(true), drawn)
        )
        return pairs_sheet(true_pictures, draws)


def fitting_captions(pairs: list[Pair], tokenizer: Tokenizer) -> tuple[list[tuple[str, ...]], int]:
    """Each pair's captions that fit the text slots; a pair without any keeps its shortest, which is cut and counted."""
    kept, n_truncated = [], 0
    for pair in pairs:
        fitting = tuple(caption for caption in pair.captions if tokenizer.count(caption) <= tokenizer.max_tokens)
        if not fitting:
            n_truncated += 1
            fitting = (min(pair.captions, key=tokenizer.count),)
        kept.append(fitting)
    return kept, n_truncated
