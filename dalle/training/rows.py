"""A row of a plan: what the transformer's training takes on one number of one kind of device, and how it adds up."""

from dataclasses import dataclass

from dalle.training.cost import BF16, FP32, layer_matrices, parameters_by_part, transformer_flops
from dalle.training.devices import OVERLAP, State
from dalle.training.recipe import TransformerTraining
from dalle.transformer import TransformerConfig


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: float
    gradients: float
    moments: float
    average: float
    gathered: (
        float  # whole: the layer at work, the next one, a gradient, what no layer holds; autocast's copies
    )
    activations_per_sequence: float
    checkpointed_per_sequence: float
    total: float  # with the micro-batch of the plan
    available: float | None  # None: as much as the machine has


@dataclass(frozen=True)
class Speed:
    """Seconds of one update, and what follows from them; `compressed`: with the paper's PowerSGD between machines."""

    computing: float
    inside: float  # network of the machine
    between: float  # network between machines
    between_compressed: float
    step: float
    step_compressed: float
    tokens_per_second: float
    mfu: float  # model FLOPs over the peak of all devices
    days: float  # of the whole stage
    days_compressed: float
    device_hours: float


@dataclass(frozen=True)
class Row:
    """The transformer's training on one number of one kind of device."""

    device: str
    n_devices: int
    n_shards: int  # devices that hold one copy of the weights together
    sequences: int  # a device and update
    fits: int  # sequences at once, at most
    fits_checkpointed: int
    micro_batch: int  # 0: does not fit
    is_checkpointed: bool
    memory: Memory
    speed: Speed | None  # None: does not fit
    settings: tuple[str, ...]  # what a recipe sets to run like this, as --set takes it


def kept_state(training: TransformerTraining) -> State:
    """Bytes that this code keeps of a weight: fp32, with the moments of the recipe's optimizer."""
    average = 0 if training.average_on_cpu else FP32
    moments = {"adamw": 8, "adamw16": 4, "muon": 4}[training.optimizer]
    others = {"weights": 4, "gradients": 4, "moments": 8, "average": average}
    return {"matrices": others | {"moments": moments}, "others": others}


def state_on_each(
    config: TransformerConfig, state: State, n_shards: int, has_copies: bool = True
) -> dict[str, float]:
    """Bytes on each of `n_shards` devices, and of what they gather for a while: from others, or as 16-bit copies."""
    n_matrices = layer_matrices(config)
    n_others = sum(parameters_by_part(config).values()) - n_matrices
    held = {
        name: (n_matrices * state["matrices"][name] + n_others * state["others"][name]) / n_shards
        for name in state["matrices"]
    }
    layer = n_matrices / config.n_layers
    is_fp32 = state["matrices"]["weights"] == FP32
    held["gathered"] = 0.0
    if (
        n_shards > 1
    ):  # two layers' weights and a gradient; FSDP2 keeps embeddings and heads, the paper dropped them
        stay = n_others if is_fp32 else n_others / 2
        held["gathered"] += state["matrices"]["weights"] * 3 * layer + state["others"]["weights"] * stay
    if is_fp32 and has_copies:  # autocast keeps them until the backward pass is over
        held["gathered"] += BF16 * (n_matrices + n_others)
    return held


def speed_of(
    config: TransformerConfig,
    training: TransformerTraining,
    computing: float,
    traffic: tuple[float, float, float],
    n_devices: int,
    peak: float,
) -> Speed:
    inside, between, compressed = traffic
    step, step_compressed = (
        max(computing, inside) + max(0.0, seconds - OVERLAP * computing) for seconds in (between, compressed)
    )
    batch = training.batch_size * training.accumulation
    days = training.steps * step / 86400
    return Speed(
        computing=computing,
        inside=inside,
        between=between,
        between_compressed=compressed,
        step=step,
        step_compressed=step_compressed,
        tokens_per_second=batch * (config.n_text_tokens + config.n_image_tokens) / step,
        mfu=batch * transformer_flops(config).update / (step * n_devices * peak),
        days=days,
        days_compressed=training.steps * step_compressed / 86400,
        device_hours=24 * days * n_devices,
    )
