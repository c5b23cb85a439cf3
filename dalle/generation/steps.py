"""Decoding state of a batch, and one decoding step: eager, or recorded as a CUDA graph.

Both ways do the same in the same order: predict, choose, put known tokens in their place, read what was chosen. The
recorded way looks up everything that depends on the position in tables, by a tensor on the device; so its shapes never
change, and one CUDA graph draws every token, sampling included, without asking Python.

Shapes: B captions, R pictures, N image tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dalle.generation.cache import RecordedImageCache
from dalle.generation.decoder import TransformerDecoder
from dalle.generation.kernels import triton_attention
from dalle.generation.sampling import TokenSampler
from dalle.token_model import TokenDecoder

WARM_UP = 2  # passes before a CUDA graph is recorded, so that libraries have set themselves up


class DecodingSteps:
    """Pictures side by side, drawn token by token into `tokens`, which is edited in place.

    Args:
        decoder: of the token model.
        text: (B, T) int64, the captions, and what guided pictures read in their place.
        n_pictures: of each caption.
        sampler: knows each picture's settings.
        noise: (R, N), one uniform number a token.
        known: (R, N) int64, tokens that must be there, -1 where they are to be drawn.
        tokens: (R, N) int64.
    """

    def __init__(
        self,
        decoder: TokenDecoder,
        text: Tensor,
        n_pictures: Sequence[int],
        sampler: TokenSampler,
        noise: Tensor,
        known: Tensor,
        tokens: Tensor,
    ) -> None:
        self.decoder, self.sampler = decoder, sampler
        self.noise, self.known, self.tokens = noise, known, tokens
        self.is_nan = torch.zeros((), dtype=torch.bool, device=tokens.device)  # whether any logit was
        self._is_known = (known >= 0).any(dim=0).tolist()
        self._is_drawn = (known < 0).any(dim=0).tolist()
        self.state, self.stream = decoder.start(text, n_pictures)
        self._prepare()

    def _prepare(self) -> None:
        """Do what a subclass does between the captions and the first token."""

    def advance_(self, position: int) -> None:
        """Draws the tokens at raster index `position`; the calls go through all of them in order."""
        column = self.known[:, position]  # (R,)
        if self._is_drawn[position]:  # else nobody asks what would come here
            drawn = self._choose(self.noise[:, position])
            column = torch.where(column >= 0, column, drawn) if self._is_known[position] else drawn
        self.tokens[:, position] = column
        if position + 1 < self.tokens.shape[1]:
            self.state = self.decoder.step(self.sampler.read(column), self.stream)

    def _choose(self, uniform: Tensor) -> Tensor:
        logits = self.decoder.head(self.sampler.guide(self.decoder.norm(self.state)))  # (R, K)
        self.is_nan |= logits.amax().isnan()
        return self.sampler(logits, uniform)


class RecordedSteps(DecodingSteps):
    """The same with fixed shapes; on a GPU one CUDA graph, elsewhere run as it is, for the tests."""

    def _prepare(self) -> None:
        decoder, tokens = self.decoder, self.tokens
        assert isinstance(decoder, TransformerDecoder)
        self.stream.images = [RecordedImageCache.of(cache) for cache in self.stream.images]
        d_head = decoder.config.d_head
        if decoder.is_native and tokens.device.type == "cuda" and triton_attention.can_run(d_head):
            self.stream.attend = partial(triton_attention.attend, self.stream.groups)
        self._position = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        self.stream.n_read = self._position
        self._first = self.state.clone()
        self._graph = self._record() if tokens.device.type == "cuda" else None

    def advance_(self, position: int) -> None:
        """Draws the next tokens; `position` is on the device."""
        if self._graph is None:
            self._advance_()
        else:
            self._graph.replay()

    def _advance_(self) -> None:
        position = self._position  # the stream's own count, which `step` moves on
        column = self.known.index_select(1, position)[:, 0]  # (R,)
        drawn = self._choose(self.noise.index_select(1, position)[:, 0])
        column = torch.where(column >= 0, column, drawn)
        self.tokens.index_copy_(1, position, column[:, None])
        self.state.copy_(self.decoder.step(self.sampler.read(column), self.stream))

    def _record(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._advance_()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance_()
        # What the warm-up left in the caches is overwritten before it is read.
        self._position.zero_()
        self.state.copy_(self._first)
        self.is_nan.zero_()
        self.tokens.fill_(-1)
        return graph
