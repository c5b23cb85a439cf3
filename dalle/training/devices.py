"""What a plan knows of accelerators: their rates, memory and networks.

Sources: NVIDIA's data sheets of the V100 SXM2 16 GB, A100 SXM 80 GB and H100 SXM 80 GB (dense 16-bit rates). Networks
differ from cluster to cluster: those here are of common machines, and assumptions.
"""

from dataclasses import dataclass

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
