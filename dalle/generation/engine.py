"""The engine: a batch's captions are read once, then its pictures are drawn token by token, all together.

Source: DALL·E §2.6; completion by forcing known tokens, blog and §3.3; guidance by a second set of rows,
Ho & Salimans 2022.
Shapes: B captions, T text tokens, R pictures (rows), G grid side, N = G * G image tokens, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dalle.attention import AttentionPlan, layer_kinds
from dalle.generation.batch import ROWS_PER_BATCH, Batch
from dalle.generation.decoder import TransformerDecoder
from dalle.generation.fields import MAX_SEED
from dalle.generation.request import GenerationOptions
from dalle.generation.sampling import TokenSampler, uniforms
from dalle.generation.steps import DecodingSteps, RecordedSteps
from dalle.token_model import TokenDecoder, TokenModel
from dalle.transformer import Transformer, TransformerConfig

# Small models draw so many: 512 candidates of the bundled model take a fifth less time than by 64. benchmarks/decode.py
MANY_ROWS_PER_BATCH = 256
MANY_ROWS_BYTES = 2**28  # that image keys and values of so many pictures may take

WeightState = list[tuple[int, int]]  # where each weight lies, and how often it was written

# (grid row just finished, tokens (R, G, G) so far with -1 where nothing is drawn yet) -> True stops the run
RowCallback = Callable[[int, Tensor], bool | None]


def cache_bytes(config: TransformerConfig, itemsize: int) -> int:
    """Image keys and values that one picture keeps, of `itemsize` bytes each, by the formula of the masks."""
    slots = sum(
        AttentionPlan(kind, config.n_text_tokens, config.grid_size, config.conv_kernel).n_slots
        for kind in layer_kinds(config.n_layers, config.layers)
    )
    return itemsize * 2 * config.d_model * slots


def default_rows_per_batch(model: TokenModel) -> int:
    """Return how many pictures are best drawn side by side: a rule of shape and dtype alone, so that plans are fixed."""
    if not isinstance(model, Transformer):
        return ROWS_PER_BATCH
    of_one = cache_bytes(model.config, model.image_head.weight.itemsize)
    rows = MANY_ROWS_PER_BATCH
    while rows > ROWS_PER_BATCH and rows * of_one > MANY_ROWS_BYTES:
        rows //= 2
    return rows


class Engine:
    """Sample image tokens with one token model. Keeps no state between calls.

    On a GPU the steps are recorded and replayed, see `dalle.generation.steps`; `is_recorded` overrides that.
    `is_int8` draws with linear maps rounded to 8 bits, `is_native` with compiled attention (ValueError
    where there is no compiler).
    """

    def __init__(
        self,
        model: TokenModel,
        *,
        is_int8: bool = False,
        is_native: bool = False,
        is_recorded: bool | None = None,
    ) -> None:
        self.model = model
        if (is_int8 or is_native) and not isinstance(model, Transformer):
            raise ValueError(
                f"{type(model).__name__} draws in its own dtype, without compiled attention: leave int8 and native out"
            )
        self.is_int8, self.is_native, self.is_recorded = is_int8, is_native, is_recorded
        self._decoder: tuple[TransformerDecoder, WeightState] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return what the model computes in; torch.int8 where its linear maps are rounded to that."""
        return torch.int8 if self.is_int8 else next(self.model.parameters()).dtype

    def draw(self, batch: Batch, on_row_end: RowCallback) -> Tensor:
        """Draw a batch -> tokens (R, G, G) on the CPU; arguments and errors as `generate`."""
        tokens = self.generate(
            batch.text,
            batch.seeds,
            batch.options,
            known=batch.known,
            n_pictures=batch.n_pictures,
            on_row_end=on_row_end,
        )
        return tokens.cpu()

    # no_grad, not inference_mode: tensors that the model caches during a call must stay usable in training.
    @torch.no_grad()
    def generate(
        self,
        text: Tensor,
        seeds: Sequence[int],
        options: GenerationOptions | Sequence[GenerationOptions] | None = None,
        *,
        known: Tensor | None = None,
        n_pictures: Sequence[int] | None = None,
        on_row_end: RowCallback | None = None,
    ) -> Tensor:
        """Draw pictures for each of B captions, all of them side by side.

        A picture's tokens depend on its caption, seed and options alone, not on its neighbours (in float32).

        Args:
            text: (B, T) int64, padded caption tokens.
            seeds: one for each picture, those of the first caption first.
            options: for all, or one for each picture; the paper's sampling when None.
            known: (N,) int64, or (R, N), one a picture: tokens that it must have, -1 where they are to be drawn.
            n_pictures: of each caption, at least 1; None: the same number, len(seeds) / B, of each.
            on_row_end: called after each finished grid row; returning True ends the run.

        Returns:
            (R, G, G) int64 on the transformer's device; -1 where a stopped run did not draw.

        Raises:
            ValueError: shapes, ids or seeds that the transformer cannot take.
            FloatingPointError: the transformer's logits hold NaN.
        """
        options = GenerationOptions() if options is None else options
        each = [options] * len(seeds) if isinstance(options, GenerationOptions) else list(options)
        counts = [len(seeds) // max(1, len(text))] * len(text) if n_pictures is None else list(n_pictures)
        self._check(text, seeds, each, known, counts)
        grid, n_tokens = self.model.config.grid_size, self.model.config.grid_size**2
        text = text.to(next(self.model.parameters()).device)
        tokens = torch.full((len(seeds), n_tokens), -1, dtype=torch.int64, device=text.device)  # (R, N)
        forced = (
            tokens.clone() if known is None else known.to(text.device).expand_as(tokens).clone()
        )  # (R, N)
        noise = torch.stack([uniforms(seed, n_tokens) for seed in seeds])  # (R, N)
        if text.device.type != "mps":  # no float64 there: sampling moves one column at a time
            noise = noise.to(text.device)

        def finish_row(row: int) -> bool:
            return on_row_end is not None and bool(on_row_end(row, tokens.clone().view(-1, grid, grid)))

        self._draw_(tokens, text, noise, forced, each, counts, finish_row)
        return tokens.view(-1, grid, grid)  # (R, G, G)

    def _draw_(
        self,
        tokens: Tensor,
        text: Tensor,
        noise: Tensor,
        known: Tensor,
        options: Sequence[GenerationOptions],
        counts: Sequence[int],
        finish_row: Callable[[int], bool],
    ) -> None:
        """Fill `tokens` (R, N) in place, until `finish_row` asks to stop."""
        grid = self.model.config.grid_size
        n_pictures, sampler = list(counts), TokenSampler(options, tokens.device)
        if sampler.guided:  # these pictures are read a second time, after the empty caption
            text = torch.cat([text, self.model.null_text()[None].to(text.device)])
            n_pictures.append(len(sampler.guided))
        is_recorded = tokens.device.type == "cuda" if self.is_recorded is None else self.is_recorded
        decoder = self.decoder()
        kind = RecordedSteps if is_recorded and isinstance(decoder, TransformerDecoder) else DecodingSteps
        steps = kind(decoder, text, n_pictures, sampler, noise, known, tokens)
        for position in range(tokens.shape[1]):
            steps.advance_(position)
            if (position + 1) % grid == 0:
                row = position // grid
                if steps.is_nan.item():  # looked at once a row: reading it makes a GPU wait
                    raise FloatingPointError(
                        f"the transformer's logits are NaN in row {row}: use float32, or check the weights"
                    )
                if finish_row(row):
                    return

    def decoder(self) -> TokenDecoder:
        """Return the model made ready to draw: made once, and again when its weights have changed."""
        if not isinstance(self.model, Transformer):
            assert isinstance(self.model, TokenDecoder)
            return self.model
        weights = [(weight.data_ptr(), weight._version) for weight in self.model.parameters()]
        if self._decoder is None or self._decoder[1] != weights:
            self._decoder = (TransformerDecoder(self.model, self.is_int8, self.is_native), weights)
        return self._decoder[0]

    def _check(
        self,
        text: Tensor,
        seeds: Sequence[int],
        options: Sequence[GenerationOptions],
        known: Tensor | None,
        counts: Sequence[int],
    ) -> None:
        config = self.model.config
        if text.ndim != 2 or text.shape[0] == 0 or text.shape[1] != config.n_text_tokens:
            raise ValueError(
                f"text has shape {tuple(text.shape)}; it must be (captions, {config.n_text_tokens}):"
                " pad captions to that"
            )
        n_ids = config.n_text_ids
        if int(text.min()) < 0 or int(text.max()) >= n_ids:
            raise ValueError(
                f"text holds ids {int(text.min())}..{int(text.max())}; the transformer knows 0..{n_ids - 1}:"
                " use its own tokenizer"
            )
        if len(counts) != len(text) or min(counts) < 1 or sum(counts) != len(seeds):
            raise ValueError(
                f"{len(seeds)} seeds for {len(text)} captions; give each caption the same number, at least 1,"
                " or say with n_pictures how many each has"
            )
        if min(seeds) < 0 or max(seeds) > MAX_SEED:
            raise ValueError(
                f"seeds are {min(seeds)}..{max(seeds)}; allowed are 0..{MAX_SEED}: choose smaller ones"
            )
        if len(options) != len(seeds):
            raise ValueError(
                f"{len(options)} options for {len(seeds)} seeds; give one for all, or one for each picture"
            )
        if known is None:
            return
        n_tokens = config.grid_size**2
        if tuple(known.shape) not in ((n_tokens,), (len(seeds), n_tokens)):
            raise ValueError(
                f"known has shape {tuple(known.shape)}; it must be ({n_tokens},), one a token, or that for each picture"
            )
        if int(known.min()) < -1 or int(known.max()) >= config.n_image_vocab:
            raise ValueError(
                f"known holds {int(known.min())}..{int(known.max())};"
                f" allowed are 0..{config.n_image_vocab - 1}, and -1 to draw"
            )
