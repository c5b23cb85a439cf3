"""The paper's two 16-bit formats as codecs: 1-6-9 and 0-6-10 (sign, exponent and significand bits).

Source: DALL·E paper, App. B.2 (Adam's moments) and E.2 (buffers of the compression). Their largest finite numbers
are "slightly less than 16" (E.2.4) and infinities exist: so the highest exponent means infinity and NaN, as in IEEE
754, and the bias is 59. settled: numbers below the smallest normal one are subnormal, and rounding is to the
nearest, ties to even, as in IEEE 754; the 0-6-10 format has the same bias.

A code is an int16 of 16 bits as they are, which safetensors stores; shapes are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FP32_BITS, FP32_BIAS = 23, 127  # significand bits and exponent bias of float32


@dataclass(frozen=True)
class SmallFloat:
    """A binary floating-point format of 16 bits; all its finite numbers are float32 numbers too."""

    is_signed: bool
    n_exponent_bits: int
    n_significand_bits: int
    bias: int

    @property
    def infinity(self) -> int:
        """The code of positive infinity; every larger one, but for the sign, is a NaN."""
        return ((1 << self.n_exponent_bits) - 1) << self.n_significand_bits

    @property
    def largest(self) -> float:
        """The largest finite number."""
        exponent = (1 << self.n_exponent_bits) - 2 - self.bias
        return float((2 - 2.0**-self.n_significand_bits) * 2.0**exponent)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with all its significand bits."""
        return float(2.0 ** (1 - self.bias))

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        return float(2.0 ** (1 - self.bias - self.n_significand_bits))

    def encode(self, x: Tensor) -> Tensor:
        """The codes, int16, of the numbers nearest to `x` (float32); a negative one has none without a sign: NaN."""
        bits = x.float().contiguous().view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        dropped = FP32_BITS - self.n_significand_bits
        # Half of what is dropped, less one where the last kept bit is even: a carry runs into the exponent.
        rounded = magnitude + ((magnitude >> dropped) & 1) + ((1 << (dropped - 1)) - 1)
        normal = (rounded >> dropped) - ((FP32_BIAS - self.bias) << self.n_significand_bits)
        absolute = magnitude.view(torch.float32)
        # torch.round takes ties to even; rounding up to the smallest normal number gives its code by itself.
        subnormal = (absolute.clamp(max=self.smallest_normal) / self.smallest).round().to(torch.int32)
        code = torch.where(absolute < self.smallest_normal, subnormal, normal.clamp(max=self.infinity))
        code = torch.where(absolute.isnan(), self.infinity + 1, code)
        if self.is_signed:
            code = code | ((bits >> 16) & 0x8000)
        else:
            code = torch.where(x < 0, self.infinity + 1, code)
        return code.to(torch.int16)  # keeps the low 16 bits

    def decode(self, code: Tensor) -> Tensor:
        """The numbers, float32, of codes."""
        bits = code.to(torch.int32) & 0xFFFF
        sign = (bits & 0x8000) << 16 if self.is_signed else torch.zeros_like(bits)
        magnitude = bits & 0x7FFF if self.is_signed else bits
        shifted = magnitude << (FP32_BITS - self.n_significand_bits)
        finite = (shifted + ((FP32_BIAS - self.bias) << FP32_BITS)).view(torch.float32)
        subnormal = magnitude.float() * self.smallest
        absolute = torch.where(magnitude < (1 << self.n_significand_bits), subnormal, finite)
        absolute = torch.where(magnitude == self.infinity, torch.inf, absolute)
        absolute = torch.where(magnitude > self.infinity, torch.nan, absolute)
        return (absolute.view(torch.int32) | sign).view(torch.float32)

    def clamp(self, x: Tensor) -> Tensor:
        """`x` with infinities, and what would round to them, at the largest number; signs and NaN are kept (E.2.4)."""
        return x.clamp(-self.largest, self.largest)


SIGNED = SmallFloat(is_signed=True, n_exponent_bits=6, n_significand_bits=9, bias=59)  # 1-6-9
UNSIGNED = SmallFloat(is_signed=False, n_exponent_bits=6, n_significand_bits=10, bias=59)  # 0-6-10
