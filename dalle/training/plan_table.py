"""A plan as lines of text: what the models are, a table with a row for each number of devices, what is assumed."""

from collections.abc import Sequence

from dalle.training.devices import GIGA
from dalle.training.log import duration
from dalle.training.plan import Plan
from dalle.training.rows import Row

HEADS = (
    ("device", "gpu"),
    ("GPUs", "gpus"),
    ("shards", "a copy"),
    ("weights", "GB"),
    ("gradients", "GB"),
    ("moments", "GB"),
    ("activations", "GB a sequence"),
    ("checkpointed", "GB a sequence"),
    ("fit", "sequences"),
    ("fit", "checkpointed"),
    ("batch", "a GPU"),
    ("memory", "GB a GPU"),
    ("computing", "s"),
    ("network", "s, inside"),
    ("between", "s, plain"),
    ("between", "s, compressed"),
    ("tokens/s", ""),
    ("time", "plain"),
    ("time", "compressed"),
    ("GPU-hours", ""),
)


def lines(plan: Plan) -> list[str]:
    """The plan as text; a `c` after the micro-batch says that its activations are checkpointed.

    The settings to run a row with are said where the rows are of one number of devices.
    """
    if plan.rows[0].device == "cpu":
        return [*_heading(plan), "", *(f"- {line}" for line in plan.assumptions)]
    text = [*_heading(plan), "", *_table(plan.rows), ""]
    if len({row.n_devices for row in plan.rows}) == 1:
        to_type = [
            (row.device, " ".join(f"--set {setting}" for setting in row.settings)) for row in plan.rows
        ]
        text += [*(f"{device}: {settings}" for device, settings in to_type if settings), ""]
    return text + [f"- {line}" for line in plan.assumptions]


def _heading(plan: Plan) -> list[str]:
    parts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters_by_part.items())
    lines = [f"transformer  {plan.parameters:,} parameters: {parts}"]
    for name, stage in plan.stages.items():
        lines.append(
            f"{name:<12} {stage.parameters:,} parameters; {_si(stage.flops_per_picture)}FLOP a picture forward and "
            f"backward; {stage.steps:,} updates of {stage.pictures_per_step:,}: {stage.flops:.2e} FLOP"
            + ("" if stage.seconds is None else f", {duration(stage.seconds)}")
        )
    seconds = [stage.seconds for stage in plan.stages.values() if stage.seconds is not None]
    if seconds:
        lines.append(f"all stages   {duration(sum(seconds))}")
    lines.append(f"an update    {_si(plan.flops_per_step)}FLOP, {plan.tokens_per_step:,} tokens")
    row = plan.rows[0]
    if row.device == "cpu" and row.speed is not None:
        lines[-1] += f", {row.speed.step:.2f} s ({row.speed.tokens_per_second:,.0f} tokens/s)"
        return [*lines, f"memory       {row.memory.total / GIGA:.1f} GB"]
    lines.append(
        f"compression  PowerSGD at rank {plan.compression_rank} over a machine of 8 sends "
        f"{plan.compression_ratio:.1%} of the layers' gradients"
    )
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    cells = [[head for head, _ in HEADS], [unit for _, unit in HEADS], *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _cells(row: Row) -> list[str]:
    memory, speed = row.memory, row.speed
    sizes = [memory.weights, memory.gradients, memory.moments]
    sizes += [memory.activations_per_sequence, memory.checkpointed_per_sequence]
    cells = [row.device, str(row.n_devices), str(row.n_shards), *(f"{size / GIGA:.2f}" for size in sizes)]
    cells += [
        str(row.fits),
        str(row.fits_checkpointed),
        f"{row.micro_batch}{'c' if row.is_checkpointed else ''}",
    ]
    cells.append(f"{memory.total / GIGA:.1f}")
    if speed is None:
        return [*cells[:-2], "none", cells[-1], *["-"] * 8]
    seconds = (speed.computing, speed.inside, speed.between, speed.between_compressed)
    cells += [f"{second:.2f}" for second in seconds]
    cells.append(f"{speed.tokens_per_second:,.0f}")
    cells += [duration(86400 * days) for days in (speed.days, speed.days_compressed)]
    return [*cells, f"{speed.device_hours:,.0f}" if speed.device_hours >= 10 else f"{speed.device_hours:.1f}"]


def _si(number: float) -> str:
    """A large number with its prefix: 94.2 T."""
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g} "
