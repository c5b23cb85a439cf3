"""Attention for few pictures in compiled C, where starting a dozen tensor operations costs more than doing them.

Optional, and never on by itself: `dalle generate --native` compiles `native.c` with the machine's C compiler on first
use, into the user's cache. It rounds otherwise than PyTorch does, so a recipe says that it was used.

Shapes: R pictures, P captions, H heads, D head width, T text tokens, W image keys that a token sees.
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
from pathlib import Path

import torch
from torch import Tensor

from dalle.attention import ImageCache, Position

SOURCE = Path(__file__).with_name("native.c")
# The flags of fast maths are for compiling only: at linking, gcc would turn denormal numbers off in the whole process.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-c")
LINK = ("-shared",)
MAX_PICTURES = 8  # above, PyTorch's matrix products are as fast; the benchmark of decode.py shows where
MAX_D_HEAD = 256  # of native.c
NAMES = {torch.float32: "attend_float", torch.bfloat16: "attend_bfloat16"}


class Native:
    """The compiled functions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions = {dtype: getattr(library, name) for dtype, name in NAMES.items()}

    def attend(
        self,
        caption_of: Tensor,
        heads: Tensor,
        captions: tuple[Tensor, Tensor],
        images: ImageCache,
        position: Position,
    ) -> Tensor:
        """What `dalle.generation.decoder.attend_step` gives, for pictures of the captions `caption_of` (R,) int64."""
        keys, values, position = *captions, int(position)
        n_heads, n_captions, n_text, d_head = keys.shape
        n_pictures = len(heads)
        slots, visible, counts = images.plan.lists()
        n_seen = counts[position]
        out = heads.new_empty(n_pictures, n_heads * d_head)
        scores = torch.empty(n_text + n_seen)
        seen = visible.data_ptr() + visible.stride(0) * visible.itemsize * position
        self._functions[heads.dtype](
            *map(
                ctypes.c_void_p,
                (heads.data_ptr(), keys.data_ptr(), values.data_ptr(), images.memory.data_ptr()),
            ),
            *map(ctypes.c_void_p, (caption_of.data_ptr(), seen, out.data_ptr(), scores.data_ptr())),
            *map(ctypes.c_int64, (n_heads, n_pictures, n_captions, n_text, images.plan.n_slots)),
            *map(ctypes.c_int64, (n_seen, d_head, slots[position])),
        )
        return out

    def fits(self, n_pictures: int, like: Tensor) -> bool:
        """Whether it is worth it, and able to: few pictures on a CPU."""
        return (
            n_pictures <= MAX_PICTURES
            and like.device.type == "cpu"
            and like.dtype in NAMES
            and like.shape[-1] <= MAX_D_HEAD
        )


@functools.cache
def load() -> Native:
    """The compiled functions, compiled first where they are not in the user's cache.

    Raises:
        ValueError: there is no C compiler, or it failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dalle"
    facts = (SOURCE.read_bytes(), " ".join(COMPILE + LINK).encode(), _processor())
    library = cache / f"native-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:16]}.so"
    if not library.is_file():
        _compile(library)
    return Native(ctypes.CDLL(str(library)))


def _compile(library: Path) -> None:
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
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
    """What code for this very processor depends on."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor().encode() + platform.machine().encode()
    return next((line for line in told.splitlines() if line.startswith(("flags", "Features"))), "").encode()
