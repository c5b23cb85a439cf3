"""What a plan knows of CPUs: the best products that this one measures, and what share of them training reaches.

There are three kinds: with AMX, whose bfloat16 products are so fast that little else of an update counts; with other
native bfloat16; and without, where training computes in float32. The shares are measured, not derived: `python
benchmarks/plan.py --calibrate` prints one kind's table, from a profile of a model (4 layers x 384, 40 + 100 tokens) that
is none of those the plan is checked on.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from dalle.attention import EXPLICIT_TO_STREAM
from dalle.generation.precision import default_dtype, has_native_bfloat16
from dalle.training.cost import (
    BACKWARD,
    BF16,
    FP32,
    Flops,
    activations,
    parameters_by_part,
    transformer_flops,
)
from dalle.training.devices import GIGA, TERA
from dalle.training.peaks import bandwidth, gemm_peak
from dalle.training.recipe import TransformerTraining
from dalle.training.rows import Memory, Row, kept_state, speed_of, state_on_each
from dalle.transformer import TransformerConfig

Kind = Literal["amx", "bfloat16", "float32"]


@dataclass(frozen=True)
class Efficiency:
    """Shares of a machine's peaks that the parts of training reach."""

    layers: float  # products of the layers in the dtype of training, forwards and backwards
    head_forward: float  # float32 products, over the best float32 product
    head_backward: float
    attention: float  # small batched products, over all pairs of slots: a CPU masks, it does not skip
    muon: float  # products of the sizes of weights
    bytes: float  # element-wise work, over the bandwidth
    dvae: float  # model FLOPs of the whole update of `laptop`'s dVAE, over the best product (benchmarks/train.py)
    clip: float  # and of its CLIP


EFFICIENCY: dict[Kind, Efficiency] = {
    "amx": Efficiency(
        layers=0.47,
        head_forward=1.0,
        head_backward=0.43,
        attention=0.14,
        muon=0.50,
        bytes=0.60,
        dvae=0.19,
        clip=0.095,
    ),
    "bfloat16": Efficiency(
        layers=0.98,
        head_forward=1.0,
        head_backward=0.97,
        attention=0.78,
        muon=1.0,
        bytes=0.59,
        dvae=0.72,
        clip=0.44,
    ),
    "float32": Efficiency(
        layers=0.95,
        head_forward=1.0,
        head_backward=0.96,
        attention=0.51,
        muon=0.88,
        bytes=0.86,
        dvae=0.75,
        clip=0.45,
    ),
}
# Bytes moved by all that is no matrix product. Of a layer, over what it keeps for its backward pass: norms, casts, GELU,
# residual sums, copies between the layouts of heads, counted one by one 310 C a slot both ways, of 36 C kept in bfloat16.
LAYER_TRAFFIC = 8.6
LOGIT_TRAFFIC = 30  # a logit: log-probabilities, the loss's gradients, casts
OPTIMIZER_TRAFFIC = 60  # a weight: clipping 12, moments and step 28, average 12, casts 8
# Of a process that has run the preset `tiny`: its libraries, and kernels made as needed.
PROCESS_BYTES = 0.39 * GIGA
HEAP = 1.33  # resident over alive at the peak: the heap keeps blocks of all sizes between those in use


@dataclass(frozen=True)
class Machine:
    """A CPU, by what it measures."""

    flops: float  # a second, the best matrix product in the dtype of training
    float32_flops: float  # a second, the best in float32
    bandwidth: float  # bytes a second
    kind: Kind
    n_threads: int

    @property
    def efficiency(self) -> Efficiency:
        """What training reaches of it."""
        return EFFICIENCY[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        """What training computes in."""
        return torch.float32 if self.kind == "float32" else torch.bfloat16

    @property
    def n_bytes(self) -> int:
        """Bytes of a number of that dtype."""
        return FP32 if self.kind == "float32" else BF16

    def __str__(self) -> str:
        name = {"amx": "AMX", "bfloat16": "native bfloat16", "float32": "float32"}[self.kind]
        threads = "1 thread" if self.n_threads == 1 else f"{self.n_threads} threads"
        in_bfloat16 = "" if self.kind == "float32" else f"{self.flops / TERA:.2f} TFLOP/s in bfloat16, "
        return (
            f"{name}, {threads}; best products {in_bfloat16}{self.float32_flops / TERA:.2f} TFLOP/s in float32; "
            f"{self.bandwidth / GIGA:.0f} GB/s"
        )


def kind_of_cpu(dtype: torch.dtype) -> Kind:
    """How this CPU computes in `dtype`; ValueError for bfloat16 where it would be emulated."""
    if dtype == torch.float32:
        return "float32"
    if not has_native_bfloat16("cpu"):
        raise ValueError(
            "this CPU has no native bfloat16, which a plan does not foretell: plan with precision fp32"
        )
    return "amx" if torch.cpu.get_capabilities().get("amx_bf16", False) else "bfloat16"


def measured(dtype: torch.dtype) -> Machine:
    """This machine with as many threads as PyTorch uses now, asked for two or three seconds."""
    kind = kind_of_cpu(dtype)
    float32_flops = gemm_peak("cpu", torch.float32, largest=1024, patience=0.3)
    flops = float32_flops
    if kind != "float32":
        flops = gemm_peak("cpu", dtype, largest=4096, patience=0.3)
    return Machine(flops, float32_flops, bandwidth("cpu", 2**27), kind, torch.get_num_threads())


def newton_schulz_flops(rows: int, columns: int, n_iterations: int = 5) -> int:
    """FLOPs in which Muon makes one matrix nearly orthogonal: three products an iteration."""
    short, long = sorted((rows, columns))
    return n_iterations * (4 * short**2 * long + 2 * short**3)


def pass_seconds(flops: Flops, batch: int, attention: int, n_bytes: float, machine: Machine) -> float:
    """Seconds of forward and backward pass: each class of products at its own rate, the rest at the bandwidth.

    `attention` are the FLOPs of one sequence's attention as a CPU computes it, forwards; `n_bytes` what
    element-wise work moves in all.
    """
    share = machine.efficiency
    at_peak = (
        (1 + BACKWARD) * flops.layers / share.layers
        + BACKWARD * flops.heads / share.head_backward
        + (1 + BACKWARD) * attention / share.attention
    )
    heads = flops.heads / share.head_forward / machine.float32_flops
    return batch * (at_peak / machine.flops + heads) + n_bytes / (machine.bandwidth * share.bytes)


def optimizer_seconds(muon: int, n_weights: int, machine: Machine) -> float:
    """Seconds of clipping, the optimizer and the average; `muon` are the FLOPs of its products."""
    n_bytes, share = OPTIMIZER_TRAFFIC * n_weights, machine.efficiency
    return muon / share.muon / machine.flops + n_bytes / (machine.bandwidth * share.bytes)


def cpu_dtype(training: TransformerTraining) -> torch.dtype:
    """What a CPU trains in: the dtype that the recipe asks for, or the one that it computes in natively."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(training.precision, default_dtype("cpu"))


def plan_cpu(config: TransformerConfig, training: TransformerTraining, machine: Machine) -> Row:
    """The plan for one process on a CPU whose peaks are known."""
    n_weights, batch = sum(parameters_by_part(config).values()), training.batch_size
    kept = activations(config, "cpu", machine.n_bytes)
    held = state_on_each(config, kept_state(training), 1, has_copies=machine.n_bytes < FP32)
    # The peak is where the backward pass begins, with no gradients yet, or where it ends.
    lasting = sum(held.values()) - held["gradients"]
    peak = lasting + max(batch * kept.kept(False), held["gradients"] + batch * kept.layer)
    memory = Memory(
        **held,
        activations_per_sequence=kept.kept(False),
        checkpointed_per_sequence=kept.kept(True),
        total=PROCESS_BYTES + HEAP * peak,
        available=None,
    )
    n_stream = config.n_text_tokens + config.n_image_tokens
    flops = transformer_flops(config)
    is_explicit = n_stream <= EXPLICIT_TO_STREAM
    computed = 4 * config.d_model * config.n_layers * n_stream**2 if is_explicit else flops.attention
    computing = training.accumulation * pass_seconds(
        flops, batch, computed, batch * elementwise_bytes(config, machine.n_bytes), machine
    )
    computing += optimizer_seconds(muon_flops(config, training), n_weights, machine)
    speed = speed_of(config, training, computing, (0.0, 0.0, 0.0), 1, machine.flops)
    return Row("cpu", 1, 1, batch * training.accumulation, batch, batch, batch, False, memory, speed, ())


def elementwise_bytes(config: TransformerConfig, n_bytes: int) -> float:
    """Bytes that a sequence's update moves in all that is no matrix product, forwards and backwards."""
    logits = config.n_text_tokens * config.n_text_ids + config.n_image_tokens * config.n_image_vocab
    kept = activations(config, "cpu", n_bytes)
    return LAYER_TRAFFIC * config.n_layers * kept.layer + LOGIT_TRAFFIC * logits


def muon_flops(config: TransformerConfig, training: TransformerTraining) -> int:
    """FLOPs of Muon's own products in an update; 0 for other optimizers."""
    if training.optimizer != "muon":
        return 0
    width = config.d_model
    matrices = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    return config.n_layers * sum(newton_schulz_flops(*shape) for shape in matrices)
