"""Stage 3: CLIP learns which caption belongs to which picture (Radford et al. 2021, §2.3-2.5).

A batch is an update's: all of its pictures are different, with one caption each. Where it does not fit into memory at
once, its gradient is taken in micro-batches and stays exact (`cached_backward`).

Shapes: B batch, T text slots, E width of the embedding, M held-out pictures.
"""

import hashlib
import logging

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from dalle import images
from dalle.clip import CLIP, resized
from dalle.data.pair import Pair
from dalle.data.reading import BadSampleLog
from dalle.evaluation.protocols import first_captions
from dalle.evaluation.sheets import pairs_sheet, spread
from dalle.evaluation.zero_shot import retrieval_ranks
from dalle.image_tokenizer import ImageTokenizer
from dalle.tokenizer import Tokenizer
from dalle.training.contrastive import cached_backward, gathered_loss
from dalle.training.distributed import Layout
from dalle.training.order import Order, rng
from dalle.training.pictures import Member, Pictures, load_all, small_square
from dalle.training.processes import ALONE, World
from dalle.training.recipe import Balance, CLIPTraining
from dalle.training.transformer import encode_caption, fitting_captions

logger = logging.getLogger(__name__)
CHUNK = 64  # held-out pictures encoded at once
SHEET_CAPTIONS = 16
FEW = 0.25  # of the batch asked for: below, a ranker may not be worth its time

Batch = tuple[Tensor, Tensor]  # text (B, T), pictures (B, 3, H, W) in [0, 1]


class CLIPStage:
    """Trains a `CLIP` on pictures and captions; with a dVAE, a share of the pictures is seen through it."""

    name = "clip"

    def __init__(
        self,
        model: CLIP,
        settings: CLIPTraining,
        tokenizer: Tokenizer,
        dvae: ImageTokenizer | None,
        train: list[Pair],
        held_out: list[Pair],
        bad: BadSampleLog,
        *,
        seed: int,
        balance: Balance | None,
        world: World = ALONE,
    ) -> None:
        self.model, self.settings, self.seed, self.world = model, settings, seed, world
        self.tokenizer, self.dvae = tokenizer, dvae
        if settings.reconstructed and dvae is None:
            raise ValueError("clip_training.reconstructed needs a dVAE: train one, or set it to 0")
        if settings.half_of is not None:
            train = [pair for pair in train if is_even(pair, settings.half_of)]
        self.train = train
        self.captions, self.n_truncated = fitting_captions(train, tokenizer)
        self.device = next(model.parameters()).device
        n_epoch = Order(train, seed, balance).n_epoch
        if n_epoch < settings.batch_size * settings.accumulation:
            self.settings = settings = _fitting(settings, n_epoch, world.size)
        self.order = Order(train, seed, balance, settings.batch_size * settings.accumulation, world)
        size = model.config.image_size
        is_whole = settings.crop == "center"
        side = size if is_whole else size + size // 8
        self._pictures = Pictures(
            train,
            self.order,
            settings.batch_size,
            bad,
            read=lambda pair: images.center_crop(pair.open(), size) if is_whole else small_square(pair, side),
            draw=None if is_whole else lambda picture, drawn: images.near_crop(picture, size, drawn),
            side=side,
            seed=seed,
        )
        chosen = spread(held_out, settings.n_validation)
        kept, self.held_out = load_all(chosen, lambda pair: images.center_crop(pair.open(), size), bad)
        self.held_out_text, _ = first_captions(kept, tokenizer)
        if settings.frozen == "image":
            model.visual.requires_grad_(False)

    def batch(self, number: int) -> Batch:
        """Text (B, T) and pictures (B, 3, H, W) in [0, 1] of micro-batch `number`."""
        members, pictures = self._pictures(number)
        text = torch.from_numpy(np.stack([self._text(epoch, index) for epoch, index in members]))
        return text.to(self.device), self._through_dvae(members, pictures).to(self.device)

    def _text(self, epoch: int, index: int) -> np.ndarray:
        """One caption of a picture; the draw depends on (seed, epoch, sample)."""
        generator = rng(self.seed, "caption", epoch, self.train[index].key)
        captions = self.captions[index]
        caption = captions[int(generator.integers(len(captions)))]
        return encode_caption(self.tokenizer, caption, self.settings.bpe_dropout, generator)

    @torch.no_grad()
    def _through_dvae(self, members: list[Member], pictures: Tensor) -> Tensor:
        """Replace a share of the pictures by what the dVAE makes of them, so that CLIP knows its blur."""
        share = self.settings.reconstructed
        rows = [
            row
            for row, (epoch, index) in enumerate(members)
            if share and rng(self.seed, "reconstructed", epoch, self.train[index].key).random() < share
        ]
        if not rows or self.dvae is None:
            return pictures
        side, size = self.dvae.image_size, pictures.shape[-1]
        chosen = resized(pictures[rows], side).to(next(self.dvae.parameters()).device)
        changed = pictures.clone()
        changed[rows] = resized(self.dvae.decode(self.dvae.encode(chosen)).float().cpu(), size)
        return changed

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of pictures and of captions."""
        text, pictures = batch
        is_frozen = self.settings.frozen == "image"
        if is_frozen:
            self.model.visual.eval()  # batch statistics are part of a frozen tower
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            of_pictures = self.model.encode_image(pictures)
        return of_pictures, self.model.encode_text(text)

    def loss(self, batch: Batch, step: int, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch by itself, nats, and the share of pictures whose caption is found in it."""
        vectors = self.encode(batch)
        found = (vectors[0] @ vectors[1].T).argmax(dim=1) == torch.arange(len(vectors[0]), device=self.device)
        return self._pair_loss(*vectors), {"accuracy": found.float().mean()}

    def _pair_loss(self, pictures: Tensor, texts: Tensor) -> Tensor:
        if self.world.size > 1:
            bias = self.model.logit_bias.float() if self.model.config.loss == "siglip" else None
            return gathered_loss(pictures, texts, self.model.logit_scale.float().exp(), bias)
        return self.model.pair_loss(pictures, texts)

    def backward(
        self, step: int, dtype: torch.dtype, layout: Layout | None = None
    ) -> tuple[float, dict[str, float]]:
        """Add the exact gradient of update `step`, over all of its micro-batches together."""
        layout = layout or Layout(self.model)
        n = self.settings.accumulation
        batches = [self.batch(number) for number in range(step * n, (step + 1) * n)]

        def encode(batch: Batch) -> tuple[Tensor, Tensor]:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                return layout(self.encode, batch)

        loss = cached_backward(encode, batches, self._pair_loss, layout.micro_batch)
        n_pairs = sum(len(text) for text, _ in batches) * self.world.size
        return float(loss), {
            "scale": float(self.model.logit_scale.detach().exp()),
            "loss_over_ln_batch": float(loss) / max(np.log(n_pairs), 1e-9),
        }

    def after_update(self) -> None:
        """Keep the scale between 1 and 100 (§2.5)."""
        self.model.clamp_logit_scale_()

    def _held_out_vectors(self) -> tuple[Tensor, Tensor]:
        """Unit vectors (M, E) of the held-out pictures and of their first captions, on the CPU."""
        pictures = [
            self.model.encode_image(part.to(self.device)).cpu() for part in torch.split(self.held_out, CHUNK)
        ]
        texts = [
            self.model.encode_text(part.to(self.device)).cpu()
            for part in torch.split(self.held_out_text, CHUNK)
        ]
        return torch.cat(pictures), torch.cat(texts)

    def validate(self) -> dict[str, float]:
        """Recall at 1 among the held-out pairs, both ways, 0..1, and the loss among them all, nats."""
        pictures, texts = self._held_out_vectors()
        truth = range(len(pictures))
        found = (retrieval_ranks(pictures, texts, truth), retrieval_ranks(texts, pictures, truth))
        names = ("recall_picture_to_caption", "recall_caption_to_picture")
        recalls = {name: float((ranks == 1).float().mean()) for name, ranks in zip(names, found, strict=True)}
        device = self.device
        return {**recalls, "loss": float(self.model.pair_loss(pictures.to(device), texts.to(device)))}

    def score(self, figures: dict[str, float]) -> float:
        """The contrastive loss, negated: recalls of a few pictures hardly tell two models apart."""
        return -figures["loss"]

    def sheet(self) -> Image:
        """Held-out pictures, each above the picture that its caption finds."""
        pictures, texts = self._held_out_vectors()
        rows = spread(range(len(pictures)), SHEET_CAPTIONS)
        found = (texts[rows] @ pictures.T).argmax(dim=1)
        return pairs_sheet(self.held_out[rows], self.held_out[found])


def _fitting(settings: CLIPTraining, n_epoch: int, n_processes: int = 1) -> CLIPTraining:
    """Smaller batches for an epoch of so few pictures: an update's are all different; ValueError for one alone."""
    needed = max(2, n_processes)
    if n_epoch < needed:
        raise ValueError(
            f"stage clip compares pictures, and an epoch has {n_epoch}: at least {needed} are needed"
        )
    batch_size = min(settings.batch_size, n_epoch)
    batch_size -= batch_size % n_processes  # each process has an equal part
    fitting = settings.model_copy(update={"batch_size": batch_size, "accumulation": n_epoch // batch_size})
    n_update, asked = (part.batch_size * part.accumulation for part in (fitting, settings))
    advice = "; --stages tokenizer,dvae,transformer leaves it out" if n_update < asked * FEW else ""
    logger.warning(
        "clip: an epoch has %d different pictures: updates of %d, not of %d. It learns to tell a caption from %d others "
        "at once, and ranks the worse for it%s",
        n_epoch,
        n_update,
        asked,
        n_update - 1,
        advice,
    )
    return fitting


def is_even(pair: Pair, field: str) -> bool:
    """Whether a pair belongs to the half of the data that the hash of one of its fields draws."""
    return hashlib.sha256(str(pair.fields.get(field)).encode()).digest()[0] % 2 == 0
