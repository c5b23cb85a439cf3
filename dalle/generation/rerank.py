"""Choosing the best of many candidates: a CLIP scores how well each picture fits its caption (DALL·E §2.6).

The caption is encoded once; pictures are resized, encoded and scored in chunks of fixed size, in float32, so that
memory does not grow with their number and a score does not depend on the neighbours. Scores are cosines: neither
CLIP's scale nor SigLIP's bias changes an order.

Shapes: P captions, N pictures of a caption, T text slots, E width of CLIP's embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dalle.clip import CLIP
from dalle.clip_tokenizer import CLIPTokenizer
from dalle.images import center_crop, open_image, to_tensor
from dalle.manifest import VerifiedFolder
from dalle.tokenizer import Tokenizer

CHUNK = 32  # pictures in the image tower at once


class Ranker:
    """A CLIP with the tokenizer that it was trained with.

    Raises:
        ValueError: the tokenizer is another one.
    """

    def __init__(self, clip: CLIP, tokenizer: Tokenizer | CLIPTokenizer, name: str = "unsaved") -> None:
        is_ours = isinstance(tokenizer, Tokenizer)
        wanted = (clip.config.text_tokens == "dalle", clip.config.n_text_vocab, clip.config.n_text_tokens)
        found = (is_ours, tokenizer.n_vocab, tokenizer.max_tokens)
        if wanted != found:
            raise ValueError(
                f"ranker {name}: its CLIP reads {wanted[2]} tokens of {wanted[1]}, the tokenizer gives {found[2]} of"
                f" {found[1]}: use the tokenizer that it was trained with"
            )
        self.clip, self.tokenizer, self.name = clip.eval(), tokenizer, name
        self.sha256: str | None = None  # of the CLIP's weights

    @classmethod
    def from_pretrained(cls, folder: str | Path | VerifiedFolder, component: str = "clip") -> Ranker:
        """Load the CLIP of a model folder; ValueError when it has none, is damaged, or does not fit its tokenizer."""
        path = folder.path if isinstance(folder, VerifiedFolder) else Path(folder)
        if not (path / component / "config.json").is_file():
            raise ValueError(f"ranker {path} has no {component}: give a model folder with a CLIP in it")
        verified = folder if isinstance(folder, VerifiedFolder) else VerifiedFolder(path)
        own = verified.component(component)
        clip = CLIP.from_pretrained(own)
        tokenizer: Tokenizer | CLIPTokenizer
        if clip.config.text_tokens == "openai":
            tokenizer = CLIPTokenizer.from_pretrained(own, clip.config.n_text_tokens)
        else:
            if not (path / "tokenizer").is_dir():
                raise ValueError(f"ranker {path} has no tokenizer, which its CLIP reads captions with")
            tokenizer = Tokenizer.from_pretrained(verified.component("tokenizer"))
        ranker = cls(clip, tokenizer, str(path))
        ranker.sha256 = own.sha256["model.safetensors"]
        return ranker

    def save_pretrained(self, folder: str | Path) -> None:
        """Write clip/ into a model folder; ValueError where its captions need another tokenizer than the folder's."""
        folder = Path(folder)
        if isinstance(self.tokenizer, Tokenizer):
            there = folder / "tokenizer"
            if (
                not there.is_dir()
                or Tokenizer.from_pretrained(there).fingerprint != self.tokenizer.fingerprint
            ):
                raise ValueError(
                    f"{folder} has another tokenizer than the CLIP of {self.name}: keep them apart"
                )
        else:
            self.tokenizer.save_pretrained(folder / "clip")
        self.clip.save_pretrained(folder / "clip")

    @property
    def device(self) -> torch.device:
        """Where the CLIP is."""
        return self.clip.logit_scale.device

    def read(self, captions: Sequence[str], truncate: bool = False) -> Tensor:
        """Captions as the text tower reads them, (P, T) int64; ValueError when one is too long."""
        rows = []
        for caption in captions:
            if isinstance(self.tokenizer, CLIPTokenizer):
                rows.append(self.tokenizer(caption, truncate))
            else:
                rows.append(self.tokenizer.pad(self.tokenizer.encode(caption, truncate=truncate)))
        return torch.stack([torch.as_tensor(row, dtype=torch.int64) for row in rows])

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str], truncate: bool = False) -> Tensor:
        """Return unit vectors (P, E) float32 on the CPU."""
        text = self.read(captions, truncate)
        return torch.cat(
            [self.clip.encode_text(part.to(self.device)).cpu() for part in torch.split(text, CHUNK)]
        )

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Return unit vectors (N, E) float32 on the CPU, of square pictures (N, 3, H, H) in [0, 1]."""
        vectors = [
            self.clip.encode_image(part.to(self.device).float()).cpu()
            for part in torch.split(pictures, CHUNK)
        ]
        return torch.cat(vectors) if vectors else torch.zeros(0, self.clip.config.d_embed)

    def score(
        self, caption: Tensor, chunks: Iterable[Tensor], advance: Callable[[int], None] | None = None
    ) -> Tensor:
        """Cosines (N,) float32 of a caption's unit vector (E,) with the pictures (n, 3, H, H) of all chunks."""
        scores = [torch.zeros(0)]
        for pictures in chunks:
            scores.append(self.encode_pictures(pictures) @ caption)
            if advance is not None:
                advance(len(pictures))
        return torch.cat(scores)

    def choose(
        self, caption: Tensor, chunks: Iterable[Tensor], n: int, advance: Callable[[int], None] | None = None
    ) -> list[tuple[int, float]]:
        """Return places and scores of the n pictures that fit a caption best, best first; arguments as `score`."""
        scores = self.score(caption, chunks, advance)
        return [(place, float(scores[place])) for place in best_first(scores, n)]

    def score_images(
        self, caption: str, pictures: Sequence[Image.Image], truncate: bool = False
    ) -> list[float]:
        """Cosines of a caption with PIL pictures of any size, cropped to their central square."""
        [vector] = self.encode_captions([caption], truncate)
        return [float(x) for x in self.score(vector, self._chunks(pictures))]

    def describe(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return unit vectors (N, E) float32 of PIL pictures of any size, cropped to their central square."""
        vectors: NDArray[np.float32] = torch.cat(
            [self.encode_pictures(chunk) for chunk in self._chunks(pictures)]
        ).numpy()
        return vectors

    def encode_files(self, paths: Sequence[Path]) -> Tensor:
        """Return unit vectors (N, E) of picture files, cropped to their central square; ValueError for an unreadable one."""
        parts = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
        return torch.cat(
            [
                self.encode_pictures(chunk)
                for part in parts
                for chunk in self._chunks([*map(open_image, part)])
            ]
        )

    def _chunks(self, pictures: Sequence[Image.Image]) -> Iterator[Tensor]:
        """Central squares, (n, 3, side, side) in [0, 1] at CLIP's size, resized as drawn pictures are."""
        for start in range(0, len(pictures), CHUNK):
            part = [picture.convert("RGB") for picture in pictures[start : start + CHUNK]]
            yield torch.cat(
                [self.clip.fit(to_tensor([center_crop(image, min(image.size))])) for image in part]
            )


def best_first(scores: Sequence[float] | Tensor, n: int | None = None) -> list[int]:
    """Return the indices of the n highest scores, best first; equal ones keep their order, and NaN comes last."""
    values = torch.as_tensor(scores, dtype=torch.float64)
    values = torch.where(values.isnan(), -torch.inf, values)
    order: list[int] = values.argsort(descending=True, stable=True).tolist()
    return order[:n]
