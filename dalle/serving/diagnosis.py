"""The diagnosis: what a training run's numbers say is wrong with it, in plain words, and by which rule.

Every rule is a function of one stage's numbers. It speaks only when a threshold with a source is passed; a run that
nothing is said of may still be a bad one. Losses are in nats; windows count rows of metrics.jsonl, one for ten updates.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Literal

from dalle.serving.watch import Row, RunSnapshot, StageState

Severity = Literal["info", "warning", "error"]
Rule = Callable[["Numbers"], "Remark | None"]

FIRST_ROWS = 3  # the mean of a run's first rows is where it began
MIN_WINDOW = 5  # rows
WINDOW_SHARE = 0.05  # of all rows, in a window


@dataclass(frozen=True)
class Remark:
    """One thing that is wrong, or likely to be."""

    severity: Severity
    stage: str | None
    text: str  # what, with its numbers, and what to do
    why: str  # the rule's threshold and where it comes from


@dataclass(frozen=True)
class Numbers:
    """One stage's state and rows."""

    state: StageState
    rows: list[Row]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(updates done, value) of every row that has a finite value of that name."""
        pairs = ((row.step, row.values.get(name)) for row in self.rows)
        return [(step, float(value)) for step, value in pairs if value is not None]

    def values(self, name: str) -> list[float]:
        """The values alone."""
        return [value for _, value in self.series(name)]

    def last(self, name: str) -> float | None:
        """The newest value."""
        return next(iter(self.values(name)[-1:]), None)

    def setting(self, name: str, default: float) -> float:
        """A number of the stage's recipe."""
        value = self.state.settings.get(name)
        return float(value) if isinstance(value, int | float) else default

    def remark(self, severity: Severity, text: str, why: str) -> Remark:
        """A remark on this stage."""
        return Remark(severity, self.state.stage, text, why)


def diagnose(look: RunSnapshot, now: float) -> list[Remark]:
    """All remarks on a run at the time `now`, seconds since 1970: the worst first, then stage by stage."""
    remarks = list(_of_run(look, now))
    for state in look.stages:
        numbers = Numbers(state, look.of(state.stage))
        if numbers.rows:
            remarks += [remark for rule in RULES if (remark := rule(numbers)) is not None]
    order = ("error", "warning", "info")
    return sorted(remarks, key=lambda remark: order.index(remark.severity))


def _of_run(look: RunSnapshot, now: float) -> Iterator[Remark]:
    for remark in (bad_samples(look), stalled(look, now)):
        if remark is not None:
            yield remark


# Numbers that are none


def non_finite(numbers: Numbers) -> Remark | None:
    """Updates whose loss or gradient was NaN or infinite."""
    why = (
        "One skipped update harms nothing (Chowdhery et al. 2022, PaLM, 5.1: about 20 loss spikes in a run, skipped over);"
        " training gives up by itself after 20 in a row. Said from the first on, a warning above 1 % of all updates."
    )
    recent = [row for row in numbers.rows if "loss" in row.values][-1:]
    if recent and recent[0].values["loss"] is None:
        return numbers.remark(
            "error",
            f"The loss of update {recent[0].step} is not a number. If it stays so, training stops by itself: "
            f"lower {numbers.state.stage}_training.learning_rate, and look at the data.",
            why,
        )
    n_skipped = int(numbers.last("n_non_finite") or 0)
    if n_skipped == 0:
        return None
    step = max(numbers.state.step, 1)
    is_many = n_skipped > 0.01 * step
    advice = f"; lower {numbers.state.stage}_training.learning_rate" if is_many else ", too few to matter"
    text = f"{n_skipped} of {step} updates were skipped because loss or gradient was not finite{advice}."
    return numbers.remark("warning" if is_many else "info", text, why)


# The training loss


def not_falling(numbers: Numbers) -> Remark | None:
    """A stage that began from random weights and has learned nothing yet."""
    losses = numbers.series("loss")
    warmup = numbers.setting("warmup_steps", 0)
    is_early = len(losses) < FIRST_ROWS + _window_size(losses) or losses[-1][0] < warmup + 200
    if numbers.state.is_continued or is_early:
        return None
    first = fmean(value for _, value in losses[:FIRST_ROWS])
    last = fmean(value for _, value in _window(losses))
    if first - last >= 0.02 * abs(first):
        return None
    return numbers.remark(
        "error",
        f"The loss does not fall: it began at {first:.3f} and is {last:.3f} after {losses[-1][0]} updates. Is the "
        "learning rate far too small or too large? Do captions and pictures belong together?",
        "Random weights give nearly the loss of blind guessing, from which every run of ours fell by more than 30 % in its "
        "first 200 updates after warm-up; said when it fell by less than 2 %.",
    )


def diverged(numbers: Numbers) -> Remark | None:
    """A loss that fell, and rose again by half of what it had fallen or more."""
    losses = numbers.values("loss")
    size = _window_size(losses)
    if len(losses) < FIRST_ROWS + 2 * size:
        return None
    means = [fmean(losses[start : start + size]) for start in range(0, len(losses) - size + 1)]
    first, best, last = fmean(losses[:FIRST_ROWS]), min(means), means[-1]
    noise = pstdev(losses[-size:]) / math.sqrt(size)
    if last - best <= max(0.5 * (first - best), 0.1 * abs(first), 3 * noise):
        return None
    return numbers.remark(
        "error",
        f"The loss diverges: it had fallen from {first:.3f} to {best:.3f} and is {last:.3f} again. Lower "
        f"{numbers.state.stage}_training.learning_rate, or lengthen warmup_steps, and start the stage anew.",
        "Mean of the last 5 % of rows against the best such mean: said when half of what was won is lost again, and the "
        "rise is more than a tenth of the first loss and than three standard errors. Runs of ours that went on from given "
        "weights rose by up to 7 % in their warm-up, and came back.",
    )


def rate_is_zero(numbers: Numbers) -> Remark | None:
    """Updates that change nothing."""
    rates = numbers.series("learning_rate")
    peak = max((rate for _, rate in rates), default=0.0)
    steps = numbers.state.steps
    if not rates or numbers.state.status == "done" or (steps is not None and rates[-1][0] >= steps):
        return None
    step, rate = rates[-1]
    if peak > 0 and rate > 1e-6 * peak:
        return None
    return numbers.remark(
        "warning",
        f"The learning rate is {rate:g} at update {step}: nothing is learned any more. RunSnapshot at learning_rate, "
        "final_learning_rate and decay_steps, or stop the stage.",
        "AdamW changes a weight by about the learning rate an update; below a millionth of its peak even all later updates "
        "together change nothing that fp32 shows.",
    )


# What held-out pictures say

# Figures of the validation: which stage's, whether lower is better, and how much worse than its best is said.
_HELD_OUT = {
    "validation_image_loss": ("transformer", True, "held-out image loss", "nats"),
    "validation_psnr": ("dvae", False, "held-out PSNR", "dB"),
    "validation_recall_caption_to_picture": ("clip", False, "held-out recall", ""),
}


def overfitted(numbers: Numbers) -> Remark | None:
    """Held-out figures get worse while the training loss still falls."""
    for name, (stage, is_loss, words, unit) in _HELD_OUT.items():
        figures = numbers.series(name)
        if numbers.state.stage != stage or len(figures) < 3:
            continue
        sign = 1 if is_loss else -1
        best_step, best = min(figures, key=lambda pair: sign * pair[1])
        last_step, last = figures[-1]
        if last_step == best_step or sign * (last - best) <= _tolerance(numbers, name, best):
            continue
        losses = numbers.series("loss")
        at_best = [value for step, value in losses if abs(step - best_step) <= (last_step - best_step) / 4]
        since = [value for step, value in losses if step > last_step - (last_step - best_step) / 4]
        if not at_best or not since or fmean(since) >= fmean(at_best):
            continue
        advice = "Fewer steps, more data or dropout help."
        return numbers.remark(
            "warning",
            f"Overfitting: the {words} was best at update {best_step} ({best:.4g} {unit}) and is {last:.4g} {unit} at "
            f"update {last_step}, while the training loss still falls. {advice}".replace("  ", " ").replace(
                " )", ")"
            ),
            "Prechelt 1998, 'Early stopping - but when?', criterion GL: a held-out loss 1 % above its best; for PSNR 0.5 dB, "
            "the difference commonly taken as visible; for recall three standard errors of the held-out set's size.",
        )
    return None


def _tolerance(numbers: Numbers, name: str, best: float) -> float:
    """How much worse than its best a figure may be: more than its own noise."""
    if name == "validation_psnr":
        return 0.5
    if name == "validation_image_loss":
        return 0.01 * abs(best)
    return 3 * math.sqrt(best * (1 - best) / numbers.setting("n_validation", 512))


def captions_unread(numbers: Numbers) -> Remark | None:
    """A transformer that draws the same whatever the caption says."""
    own, other = numbers.series("validation_image_loss"), numbers.series("validation_image_loss_shuffled")
    if len(own) < 2 or len(own) != len(other):
        return None
    gain = other[-1][1] - own[-1][1]
    if gain >= 0.01 * abs(own[-1][1]):
        return None
    return numbers.remark(
        "warning",
        f"Captions are hardly read: held-out pictures cost {own[-1][1]:.3f} nats a token with their own captions and "
        f"{other[-1][1]:.3f} with those of other pictures. Do captions say what their pictures show? Small models learn "
        "pixels first: it may still come.",
        "A caption is worth the difference of the two losses; in the bundled model's run it was 15 % at the first "
        "validation and 24 % at the last. Said below 1 %, from the second validation on.",
    )


# The codebook


def collapsed(numbers: Numbers) -> Remark | None:
    """A dVAE that writes all pictures with a few of its codes."""
    shares = numbers.series("validation_codes_used")
    n_codes = numbers.state.model.get("n_codes")
    if len(shares) < 2 or not isinstance(n_codes, int):
        return None
    step, share = shares[-1]
    used, steps = round(share * n_codes), numbers.state.steps or 0
    why = (
        "Vector quantizers that keep less than 12 % of a large codebook in use are called collapsed (Zhu et al. 2024, "
        "VQGAN-LC, abstract); our own healthy runs used over three quarters after a quarter of their updates. Said below "
        "10 % as an error from the second validation on, below 50 % as a warning after a quarter of the updates."
    )
    advice = (
        "raise kl_weight more slowly (kl_steps), or lower the temperature later"
        if numbers.state.model.get("quantizer") == "gumbel"
        else "are the pictures all alike, or the held-out ones very few? Otherwise lower the learning rate"
    )
    if share < 0.1:
        text = f"The codebook has collapsed: {used} of {n_codes} codes are used at update {step}; {advice}."
        return numbers.remark("error", text, why)
    if share < 0.5 and step >= steps / 4:
        text = f"Much of the codebook is idle: {used} of {n_codes} codes are used at update {step}; {advice}."
        return numbers.remark("warning", text, why)
    return None


RULES: tuple[Rule, ...] = (
    non_finite,
    diverged,
    not_falling,
    collapsed,
    overfitted,
    captions_unread,
    rate_is_zero,
)


# The run as a whole


def bad_samples(look: RunSnapshot) -> Remark | None:
    """Pictures that could not be read."""
    if look.n_bad == 0:
        return None
    n_seen = max((_pictures_seen(state) for state in look.stages), default=0)
    is_many = n_seen > 0 and look.n_bad > 0.005 * n_seen
    reason, n = look.bad_reasons.most_common(1)[0]
    return Remark(
        "warning" if is_many else "info",
        None,
        f"{look.n_bad} samples could not be read and were left out; the most frequent reason ({n} times): {reason}. All are "
        "in run/bad_samples.jsonl.",
        "Training ends by itself when 1 % of the samples are bad; said always, a warning from half of that on, counted "
        "against the pictures seen so far.",
    )


def _pictures_seen(state: StageState) -> int:
    sizes = [state.settings.get("batch_size"), state.settings.get("accumulation", 1)]
    return state.step * math.prod(size for size in sizes if isinstance(size, int))


def stalled(look: RunSnapshot, now: float) -> Remark | None:
    """A run that is not finished and says nothing any more."""
    begun = [state for state in look.stages if look.of(state.stage)]
    if not begun or begun[-1].status != "running":  # between stages pictures are encoded, in silence
        return None
    gaps = [gap for state in begun for gap in _gaps(look.of(state.stage))]
    silence = now - look.updated_at
    limit = max(600.0, 5 * max(gaps, default=0.0))
    if silence <= limit:
        return None
    return Remark(
        "warning",
        begun[-1].stage,
        f"No news for {_duration(silence)}; the longest silence before was {_duration(max(gaps, default=0.0))}. The run was "
        "stopped, or hangs: the same command goes on from its last checkpoint.",
        "Five times the longest gap between two rows so far, but ten minutes at least.",
    )


def _gaps(rows: Sequence[Row]) -> Iterator[float]:
    """Seconds between rows that one process wrote."""
    seconds = [row.values.get("seconds") for row in rows]
    for before, after in itertools.pairwise(seconds):
        if before is not None and after is not None and after >= before:
            yield after - before


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"


def _window_size(values: Sequence[object]) -> int:
    return max(MIN_WINDOW, int(len(values) * WINDOW_SHARE))


def _window(series: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return series[-_window_size(series) :]
