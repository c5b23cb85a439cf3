"""What a run will need, before it is started: memory a device, seconds an update, days; as records.

Source: `dalle.training.cost` for the arithmetic; the paper's App. E.2 for compressed gradients; PyTorch's FSDP2 for what
sharding moves. Of GPUs nothing is measured: `ASSUMPTIONS` says what is taken for granted. A CPU is asked.
"""

import math
from dataclasses import asdict, dataclass, replace

from dalle.clip import CLIP
from dalle.dvae import DiscreteVAE
from dalle.training.cost import (
    BACKWARD,
    FP32,
    activations,
    clip_flops,
    count_parameters,
    dvae_flops,
    layer_matrices,
    parameters_by_part,
    transformer_flops,
)
from dalle.training.cpu import Machine, cpu_dtype, measured, plan_cpu
from dalle.training.devices import DEVICES, USABLE, Device
from dalle.training.recipe import Optimization, Recipe, TransformerTraining, clip_config, transformer_config
from dalle.training.rows import Memory, Row, Speed, kept_state, speed_of, state_on_each
from dalle.transformer import TransformerConfig

COUNTS = (1, 8, 64, 256, 512, 1024)  # devices that a table is made for
RANK_STEP, RANK_SHARE = (
    128,
    0.2258,
)  # the least rank that kept the loss, of d: 512 of 1920, 640 of 2688, 896 of 3968

ASSUMPTIONS = (
    "an update is the recipe's batch, shared out to all devices; FLOPs are the model's own: the masks' pairs, no recompute",
    "MFU is assumed (h100, a100 45 %, v100 30 %; --mfu sets it), and holds without checkpointing; with it an update"
    " computes the forward pass twice. This code's MFU on GPUs has not been measured",
    "weights, gradients and moments lie sharded over as few GPUs as can hold them: one, a machine of 8, or all; weights"
    " and gradients travel in fp32 (v100: 16 bits), and autocast's 16-bit copy of all weights is held whole",
    "the network inside a machine is hidden where it takes less time than the computing; between machines, behind the"
    " backward pass, two thirds of it; rates a device, GB/s inside / between: h100 450 / 50, a100 300 / 25, v100 150 / 1.6",
    "compressed: PowerSGD of the layers' matrices as in the paper (rank 896 at width 3968: 14 %), all else as it is",
    "94 % of a device's memory can be used; v100 keeps what the paper kept (16-bit weights and moments), which this code"
    " does not: its weights are fp32",
)
CPU_ASSUMPTIONS = (
    "the rates were measured just now, on {machine}; of them each part of an update reaches the share in"
    " `dalle/training/cpu.py`",
    "nothing else runs on the machine; reading and encoding pictures, validation and sheets are left out",
)


@dataclass(frozen=True)
class Stage:
    """A model's training as a whole."""

    parameters: int
    flops_per_picture: int  # forward and backward
    pictures_per_step: int
    steps: int
    seconds: float | None = None  # of the whole stage, on a CPU

    @property
    def flops(self) -> int:
        """Of the whole stage."""
        return self.flops_per_picture * self.pictures_per_step * self.steps


@dataclass(frozen=True)
class Plan:
    """Everything that `dalle plan` says."""

    parameters: int
    parameters_by_part: dict[str, int]
    flops_per_step: int  # of the transformer
    tokens_per_step: int
    compression_rank: int
    compression_ratio: float  # of what PowerSGD sends over what it stands for
    stages: dict[str, Stage]
    rows: tuple[Row, ...]
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """As a tree of JSON values, bytes and seconds."""
        tree = asdict(self)
        for name, stage in self.stages.items():
            tree["stages"][name]["flops"] = stage.flops
        return tree


def make_plan(
    recipe: Recipe,
    n_devices: int | None = None,
    device: str | None = None,
    mfu: float | None = None,
    machine: Machine | None = None,
) -> Plan:
    """Plan a recipe for so many devices of a kind; without a number or a kind, for several.

    A plan for "cpu" is for `machine`; without one, this CPU is measured. Raises ValueError for an unknown kind, a number
    that does not divide the batch, and a share that is none.
    """
    config = transformer_config(
        recipe.transformer, recipe.dvae, recipe.tokenizer.vocab_size, recipe.tokenizer.max_tokens
    )
    training = recipe.transformer_training
    batch = training.batch_size * training.accumulation
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"mfu is {mfu}; it is the share of the peak that is used: above 0, at most 1")
    if device is not None and device not in (*DEVICES, "cpu"):
        raise ValueError(f"gpu {device!r} is unknown: use {', '.join(DEVICES)} or cpu")
    if n_devices is not None and (n_devices < 1 or batch % n_devices):
        raise ValueError(f"gpus is {n_devices}; it has to divide the batch of {batch} sequences an update")
    if device == "cpu":
        if n_devices not in (None, 1):
            raise ValueError(f"gpus is {n_devices}; a plan for cpu is for one process")
        machine = machine or measured(cpu_dtype(training))
        rows = [plan_cpu(config, training, machine)]
    else:
        counts = [n_devices] if n_devices else [count for count in COUNTS if batch % count == 0]
        kinds = [DEVICES[device]] if device else list(DEVICES.values())
        rows = [
            _plan_row(config, training, kind, count, mfu or kind.mfu) for kind in kinds for count in counts
        ]
    parts = parameters_by_part(config)
    return Plan(
        parameters=sum(parts.values()),
        parameters_by_part=dict(parts),
        flops_per_step=batch * transformer_flops(config).update,
        tokens_per_step=batch * (config.n_text_tokens + config.n_image_tokens),
        compression_rank=paper_rank(config.d_model),
        compression_ratio=paper_ratio(config.d_model, paper_rank(config.d_model)),
        stages=_stages(recipe, config, sum(parts.values()), rows[0].speed, machine),
        rows=tuple(rows),
        assumptions=ASSUMPTIONS
        if machine is None
        else (ASSUMPTIONS[0], *(line.format(machine=machine) for line in CPU_ASSUMPTIONS)),
    )


def paper_rank(width: int) -> int:
    """Total rank over the machine that the paper would use: the next multiple of 128 (table 1)."""
    return RANK_STEP * math.ceil(RANK_SHARE * width / RANK_STEP)


def paper_ratio(width: int, rank: int, n_shards: int = 8) -> float:
    """Elements of P and Q over elements of the gradient: r (m + 2) / (2 d m), at most 1 (table 2)."""
    return min(1.0, rank * (n_shards + 2) / (2 * width * n_shards))


# --- On GPUs ------------------------------------------------------------------------------------------------


def _plan_row(
    config: TransformerConfig, training: TransformerTraining, device: Device, n_devices: int, mfu: float
) -> Row:
    sequences = training.batch_size * training.accumulation // n_devices
    kept = activations(config, "cuda")
    state = device.state or kept_state(training)
    for n_shards in dict.fromkeys((1, math.gcd(n_devices, device.n_in_machine), n_devices)):
        held = state_on_each(config, state, n_shards)
        free = device.memory * USABLE - sum(held.values())
        fits, fits_checkpointed = (max(0, int(free // kept.kept(how))) for how in (False, True))
        if fits_checkpointed:
            break  # as few devices to a copy as can hold it: the less there is to send
    is_checkpointed = fits == 0
    micro_batch = _divisor(sequences, fits_checkpointed if is_checkpointed else fits)
    memory = Memory(
        **held,
        activations_per_sequence=kept.kept(False),
        checkpointed_per_sequence=kept.kept(True),
        total=sum(held.values()) + max(micro_batch, 1) * kept.kept(is_checkpointed),
        available=device.memory,
    )
    speed = None
    if micro_batch:
        flops = transformer_flops(config)
        computed = flops.update + (flops.forward if is_checkpointed else 0)
        computing = sequences * computed / (device.flops * mfu)
        traffic = _traffic(config, device, n_devices, n_shards, sequences // micro_batch)
        speed = speed_of(config, training, computing, traffic, n_devices, device.flops)
    return Row(
        device.name,
        n_devices,
        n_shards,
        sequences,
        fits,
        fits_checkpointed,
        micro_batch,
        is_checkpointed,
        memory,
        speed,
        _settings(training, n_devices, n_shards, sequences, micro_batch, is_checkpointed)
        if device.state is None and micro_batch
        else (),
    )


def _settings(
    training: TransformerTraining,
    n_devices: int,
    n_shards: int,
    sequences: int,
    micro_batch: int,
    is_checkpointed: bool,
) -> tuple[str, ...]:
    mode = "ddp" if n_shards == 1 else "shard" if n_shards == n_devices else "hybrid"
    settings = [
        f"transformer_training.batch_size={micro_batch * n_devices}",
        f"transformer_training.accumulation={sequences // micro_batch}",
        f"distributed.mode={mode}",
    ]
    settings += [f"distributed.shard_size={n_shards}"] if mode == "hybrid" else []
    settings += ["distributed.checkpoint_blocks=true"] if is_checkpointed else []
    settings += ["transformer_training.precision=bf16"] if training.precision == "fp16_resblock" else []
    return tuple(settings)


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to a limit; 0 when there is none."""
    return next((divisor for divisor in range(min(n, limit), 0, -1) if n % divisor == 0), 0)


def _traffic(
    config: TransformerConfig, device: Device, n_devices: int, n_shards: int, n_rounds: int
) -> tuple[float, float, float]:
    """Seconds of an update's traffic: inside a machine, between machines, and that compressed.

    Weights are gathered twice in each of `n_rounds` micro-batches, gradients reduced once. A ring sends a byte twice.
    """
    n_matrices = layer_matrices(config)
    n_weights = sum(parameters_by_part(config).values())
    width = (
        FP32 if device.state is None else device.state["matrices"]["weights"]
    )  # bytes that travel of a weight
    is_one_machine = n_devices <= device.n_in_machine
    of_shards = device.inside if n_shards <= device.n_in_machine else device.between
    inside = width * n_weights * (n_shards - 1) / n_shards * (2 * n_rounds + 1) / of_shards
    n_replicas = n_devices // n_shards
    ring = (
        2 * (n_replicas - 1) / n_replicas / n_shards / (device.inside if is_one_machine else device.between)
    )
    ratio = paper_ratio(config.d_model, paper_rank(config.d_model), n_shards)
    sent = width * n_matrices * ratio + FP32 * (n_weights - n_matrices)
    return inside, width * n_weights * ring, min(sent, width * n_weights) * ring


# --- The other stages -------------------------------------------------------------------------


def _stages(
    recipe: Recipe, config: TransformerConfig, n_weights: int, speed: Speed | None, machine: Machine | None
) -> dict[str, Stage]:
    """The stages; on a CPU with their seconds: the transformer's by `speed`, the others' at a share of the peak."""

    def stage(n_parameters: int, flops: int, training: Optimization, share: float) -> Stage:
        n_pictures = training.batch_size * training.accumulation
        seconds = training.steps * flops * n_pictures / (machine.flops * share) if machine else None
        return Stage(n_parameters, flops, n_pictures, training.steps, seconds)

    dvae = recipe.dvae if recipe.decoder_training is None else recipe.dvae.mirrored()
    n_dvae = count_parameters(lambda: DiscreteVAE(dvae))
    efficiency = machine.efficiency.dvae if machine else 1.0
    update = (1 + BACKWARD) * sum(dvae_flops(dvae))
    stages = {"dvae": stage(n_dvae, update, recipe.dvae_training, efficiency)}
    if recipe.decoder_training is not None:
        n_decoder = count_parameters(lambda: DiscreteVAE(recipe.dvae).decoder)
        encode, decode = dvae_flops(recipe.dvae)
        update = encode + (1 + BACKWARD) * decode
        stages["decoder"] = stage(n_decoder, update, recipe.decoder_training, efficiency)
    of_transformer = stage(n_weights, transformer_flops(config).update, recipe.transformer_training, 1.0)
    seconds = of_transformer.steps * speed.step if machine and speed else None
    stages["transformer"] = replace(of_transformer, seconds=seconds)
    if recipe.clip is not None and recipe.clip_training is not None:
        clip = clip_config(recipe.clip, recipe.tokenizer.vocab_size, recipe.tokenizer.max_tokens)
        n_clip, update = count_parameters(lambda: CLIP(clip)), (1 + BACKWARD) * clip_flops(clip)
        stages["clip"] = stage(
            n_clip, update, recipe.clip_training, machine.efficiency.clip if machine else 1.0
        )
    return stages
