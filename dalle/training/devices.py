"""What a plan knows of machines: rates and memory of accelerators, and how near a CPU comes to its own peaks.

Sources: NVIDIA's data sheets of the V100 SXM2 16 GB, A100 SXM 80 GB and H100 SXM 80 GB (dense 16-bit rates). Networks
differ from cluster to cluster: those here are of common machines, and assumptions.
"""

from dataclasses import dataclass

from dalle.training.cost import BACKWARD, Flops

GIGA, TERA = 10**9, 10**12

# Bytes of each weight; "matrices" are the layers', "others" gains, biases, embeddings and heads.
State = dict[str, dict[str, int]]
# As the paper kept them (B.2, D.2, E.2): 16-bit weights, moments and error buffers; the average on the CPU. This code
# keeps fp32 weights, which would not fit into 16 GB.
PAPER_STATE: State = {
    "matrices": {"weights": 2, "gradients": 2, "moments": 4, "average": 0},
    "others": {"weights": 4, "gradients": 4, "moments": 8, "average": 0},
}


@dataclass(frozen=True)
class Device:
    """One accelerator, in a machine with others."""

    name: str
    flops: float  # a second, dense 16-bit matrix products
    memory: float  # bytes
    inside: float  # bytes a second to the others of its machine, each way
    between: float  # bytes a second to other machines, its share of the machine's network, each way
    mfu: float  # share of `flops` that training is assumed to use
    state: State | None = None  # what is kept of a weight; None: what this code keeps under the recipe
    n_in_machine: int = 8


DEVICES = {
    # 40 to 50 % is what published training of such sizes reaches (llm-foundry 40-44 %, nanochat 50 %); ours has not
    # been measured on a GPU.
    "h100": Device("h100", 989 * TERA, 84 * GIGA, 450 * GIGA, 50 * GIGA, mfu=0.45),
    "a100": Device("a100", 312 * TERA, 84 * GIGA, 300 * GIGA, 25 * GIGA, mfu=0.45),
    # The paper's; it gives neither its rate nor its network: 100 Gb/s for 8 GPUs is assumed.
    "v100": Device("v100", 125 * TERA, 16.9 * GIGA, 150 * GIGA, 12.5 * GIGA / 8, mfu=0.30, state=PAPER_STATE),
}
USABLE = 0.94  # of an accelerator's memory: the rest is the driver's, the libraries' and lost between blocks
OVERLAP = 2 / 3  # of the computing hides traffic between machines: the backward pass


@dataclass(frozen=True)
class Machine:
    """A CPU as `benchmarks/machine.py` measures it."""

    flops: float  # a second, the best bfloat16 matrix product
    bandwidth: float  # bytes a second


CPU = Machine(0.43 * TERA, 34.7 * GIGA)  # two quiet cores, docs/performance.md

# How near the parts of a CPU's update come to those peaks. `python benchmarks/plan.py --calibrate` prints this table,
# from a profile of a model (4 layers x 384, 40 + 100 tokens) that is none of those the plan is checked on.
EFFICIENCY = {
    "layers": 0.98,  # bfloat16 products of the layers, forwards and backwards
    "head_forward": 0.45,  # fp32 products, over the bfloat16 peak
    "head_backward": 0.97,
    "attention": 0.78,  # small batched products, over all pairs of slots: a CPU masks, it does not skip
    "muon": 1.0,  # products of the sizes of weights
    "bytes": 0.59,  # element-wise work, over the bandwidth
}
# Bytes moved by all that is no matrix product. Of a layer, over what it keeps for its backward pass: norms, casts, GELU,
# residual sums, copies between the layouts of heads, counted one by one 310 C a slot both ways, of 36 C kept.
LAYER_TRAFFIC = 8.6
LOGIT_TRAFFIC = 30  # a logit: log-probabilities, the loss's gradients, casts
OPTIMIZER_TRAFFIC = 60  # a weight: clipping 12, moments and step 28, average 12, casts 8
PROCESS_BYTES = (
    0.39 * GIGA
)  # of a process that has run the preset `tiny`: its libraries, and kernels made as needed
HEAP = 1.33  # resident over alive at the peak: the heap keeps blocks of all sizes between those in use


def newton_schulz_flops(rows: int, columns: int, n_iterations: int = 5) -> int:
    """FLOPs in which Muon makes one matrix nearly orthogonal: three products an iteration."""
    short, long = sorted((rows, columns))
    return n_iterations * (4 * short**2 * long + 2 * short**3)


def cpu_seconds(flops: Flops, batch: int, attention: int, n_bytes: float, machine: Machine) -> float:
    """Seconds of forward and backward pass: each class of products at its own rate, the rest at the bandwidth.

    `attention` are the FLOPs of one sequence's attention as a CPU computes it, forwards; `n_bytes` what
    element-wise work moves in all.
    """
    at_peak = (
        (1 + BACKWARD) * flops.layers / EFFICIENCY["layers"]
        + flops.heads / EFFICIENCY["head_forward"]
        + BACKWARD * flops.heads / EFFICIENCY["head_backward"]
        + (1 + BACKWARD) * attention / EFFICIENCY["attention"]
    )
    return batch * at_peak / machine.flops + n_bytes / (machine.bandwidth * EFFICIENCY["bytes"])


def optimizer_seconds(muon: int, n_weights: int, machine: Machine) -> float:
    """Seconds of clipping, the optimizer and the average; `muon` are the FLOPs of its products."""
    n_bytes = OPTIMIZER_TRAFFIC * n_weights
    return muon / EFFICIENCY["muon"] / machine.flops + n_bytes / (machine.bandwidth * EFFICIENCY["bytes"])
