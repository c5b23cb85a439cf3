"""Token steps in compiled C: of few pictures whole layers, one pass over their weights; of many the attention to windows.

Optional, and never on by itself: `dalle generate --native` compiles `native.c` with the machine's C compiler on first
use, into the user's cache. It rounds otherwise than PyTorch does (its sums are float32), so a recipe says that it was used.

Shapes: R pictures, P captions, H heads, D head width, C model width, K image ids.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from dalle.generation.cache import ImageCache
from dalle.transformer import Layer, Transformer

SOURCE = Path(__file__).with_name("native.c")
# The flags of fast maths are for compiling only: at linking, gcc would turn denormal numbers off in the whole process.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
LINK = ("-shared", "-fopenmp")
MAX_PICTURES = (
    8  # as in native.c; above, PyTorch's matrix products read the weights as fast and compute faster
)
NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class _Layer(ctypes.Structure):
    _fields_ = [
        (f"{block}_{what}", ctypes.c_void_p)
        for block in ("attention", "mlp")
        for what in ("gain", "bias", "first", "first_bias", "second", "second_bias")
    ]


class _Stream(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("keys", "values", "memory", "caption_of", "seen", "x", "scratch")
        ),
        *(
            (name, ctypes.c_int64)
            for name in (
                "n_heads",
                "d_head",
                "n_pictures",
                "n_captions",
                "n_text",
                "n_slots",
                "n_seen",
                "slot",
            )
        ),
        ("n_threads", ctypes.c_int64),
    ]


class _Window(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("queries", "qkv", "memory", "seen", "text", "mixed")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "n_heads",
                "d_head",
                "n_pictures",
                "n_text",
                "n_slots",
                "n_seen",
                "slot",
                "n_threads",
            )
        ),
        ("scratch", ctypes.c_void_p),
    ]


class NativeSteps:
    """The steps of one transformer, from its own weights; ValueError where they cannot be compiled."""

    def __init__(self, transformer: Transformer) -> None:
        library, self._dtype = load(), transformer.image_head.weight.dtype
        self._layer, self._head = (
            getattr(library, f"{name}_{NAMES[self._dtype]}") for name in ("layer", "head")
        )
        self._transformer = transformer
        self._layers = []
        for layer in cast(Iterable[Layer], transformer.layers):
            attention, mlp = layer.attention, layer.mlp
            maps = (attention.norm, attention.qkv, attention.out, mlp.norm, mlp.expand, mlp.contract)
            pointers = [x.data_ptr() for one in maps for x in (one.weight, one.bias)]
            self._layers.append(_Layer(*pointers))

    @staticmethod
    def fits(weight: Tensor, n_pictures: int) -> bool:
        """Whether it is worth it, and able to: few pictures, on a CPU."""
        return can_run(weight) and n_pictures <= MAX_PICTURES

    def step(
        self,
        x: Tensor,
        captions: Sequence[tuple[Tensor, Tensor]],
        images: Sequence[ImageCache],
        caption_of: Tensor,
        position: int,
    ) -> Tensor:
        """All layers for the tokens at raster index `position`: embeddings (R, C) -> states (R, C), float32.

        The caches take in the tokens' keys and values; `caption_of` (R,) int64 says whose caption each picture has.
        """
        x = x.float().contiguous()  # edited in place from here on
        n_heads, n_captions, n_text, d_head = captions[0][0].shape
        n_pictures, width, n_threads = len(x), x.shape[1], torch.get_num_threads()
        # queries, keys and values, what is mixed, the MLP; for each thread the normed states and the scores
        n_slots = max(cache.plan.n_slots for cache in images)
        n_scratch = 8 * width * n_pictures + n_threads * (width * n_pictures + n_text + n_slots)
        scratch = torch.empty(n_scratch)
        for layer, (keys, values), cache in zip(self._layers, captions, images, strict=True):
            slots, visible, counts = cache.plan.lists()
            stream = _Stream(
                keys.data_ptr(),
                values.data_ptr(),
                cache.memory.data_ptr(),
                caption_of.data_ptr(),
                visible.data_ptr() + visible.stride(0) * visible.itemsize * position,
                x.data_ptr(),
                scratch.data_ptr(),
                n_heads,
                d_head,
                n_pictures,
                n_captions,
                n_text,
                cache.plan.n_slots,
                counts[position],
                slots[position],
                n_threads,
            )
            self._layer(ctypes.byref(layer), ctypes.byref(stream))
        return x

    def head(self, normed: Tensor) -> Tensor:
        """Logits (R, K) float32 of what the image head reads, (R, C) float32."""
        weight, normed = self._transformer.image_head.weight, normed.contiguous()
        logits = torch.empty(len(normed), len(weight))
        self._head(
            *(ctypes.c_void_p(one.data_ptr()) for one in (weight, normed, logits)),
            *map(ctypes.c_int64, (len(normed), normed.shape[1], len(weight), torch.get_num_threads())),
        )
        return logits


def attend_window_(
    queries: Tensor, heads: Tensor, cache: ImageCache, position: int, text: Tensor
) -> tuple[Tensor, Tensor]:
    """One softmax over the caption's scores and the image tokens that the mask allows, without gathering these.

    Args:
        queries: scaled, (H, R, D), float32 or bfloat16 like the rest.
        heads: queries, keys and values of the tokens at `position`, (R, 3 C); the cache takes the latter two in.
        position: raster index.
        text: scores of the caption, (H, R, S); its memory is used up.

    Returns:
        The caption's shares, (H, R, S), and what the image tokens give, (H, R, D).
    """
    n_heads, n_pictures, d_head = queries.shape
    queries, heads, text = queries.contiguous(), heads.contiguous(), text.contiguous()
    mixed, n_threads = torch.empty_like(queries), torch.get_num_threads()
    n_text, n_slots = text.shape[2], cache.plan.n_slots
    scratch = torch.empty(n_threads * (n_text + n_slots))
    slots, visible, counts = cache.plan.lists()
    window = _Window(
        queries.data_ptr(),
        heads.data_ptr(),
        cache.memory.data_ptr(),
        visible.data_ptr() + visible.stride(0) * visible.itemsize * position,
        text.data_ptr(),
        mixed.data_ptr(),
        n_heads,
        d_head,
        n_pictures,
        n_text,
        n_slots,
        counts[position],
        slots[position],
        n_threads,
        scratch.data_ptr(),
    )
    getattr(load(), f"windows_{NAMES[queries.dtype]}")(ctypes.byref(window))
    return text, mixed


def can_run(like: Tensor) -> bool:
    """Whether there is code for tensors of this device and dtype."""
    return like.device.type == "cpu" and like.dtype in NAMES


@functools.cache
def load() -> ctypes.CDLL:
    """Return the compiled functions, compiled first where they are not in the user's cache.

    Raises:
        ValueError: there is no C compiler, or it failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle"
    facts = (SOURCE.read_bytes(), " ".join(COMPILE + LINK).encode(), _processor())
    library = cache / f"native-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:16]}.so"
    if not library.is_file():
        _compile(library)
    return ctypes.CDLL(str(library))


def find_compiler() -> str | None:
    """Return the machine's C compiler, $CC first."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "cc", "gcc", "clang"))), None)


def _compile(library: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise ValueError("--native needs a C compiler: install gcc or clang, or draw without it")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        object_file, partial = Path(folder) / "native.o", Path(folder) / "native.so"
        for command in (
            [compiler, *COMPILE, str(SOURCE), "-o", str(object_file)],
            [compiler, *LINK, str(object_file), "-o", str(partial), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                told = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise ValueError(f"--native: {compiler} failed ({told}): draw without it")
        os.replace(partial, library)  # appears whole, whoever else compiles


def _processor() -> bytes:
    """Return what code for this very processor depends on."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor().encode() + platform.machine().encode()
    return next((line for line in told.splitlines() if line.startswith(("flags", "Features"))), "").encode()
