"""The figures of a report that matter most, in words: each with its interval, beside the best baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

GALLERY_NAMES = {"style": "99 of its style", "style_and_object": "those and its object in other styles"}
QUERY_NAMES = {
    "draws": "one draw",
    "chosen": "chosen by CLIP",
    "another_seed": "another seed",
    "draws_of_other_captions": "shuffled captions",
    "random_copy": "copy: random style",
    "mean_copy": "copy: mean of styles",
    "donor_copy": "copy: best donor style",
    "reconstructions": "dVAE reconstruction",
}


class Line(NamedTuple):
    """One figure, and what is to be said of it."""

    section: str
    what: str
    figure: str
    note: str = ""


def lines(report: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the figures that matter most, in the order of the report."""
    if tokenizer := report.get("image_tokenizer"):
        ink = f"ink {_number(tokenizer['ink_psnr'])}"
        yield Line("image tokenizer", "PSNR, dB", f"{tokenizer['psnr']:.2f}", ink)
        perplexity = f"perplexity {tokenizer['perplexity']:.0f} of {tokenizer['n_codes']}"
        yield Line("image tokenizer", "codes used", f"{tokenizer['codes_used']:.1%}", perplexity)
    for split, losses in report.get("transformer", {}).items():
        if losses["n_pictures"]:
            shuffled = f"{losses['image_loss_shuffled']:.3f} with shuffled captions"
            yield Line("transformer", f"{split}: image loss, nats", f"{losses['image_loss']:.3f}", shuffled)
    for name, gallery in report.get("retrieval", {}).get("galleries", {}).items():
        for query, figures in gallery["queries"].items():
            section = f"nearest of: {GALLERY_NAMES.get(name, name)}"
            against = gallery["against_copying"].get(query)
            yield Line(
                section, QUERY_NAMES.get(query, query), share(figures["recall_at_1"]), verdict(against)
            )


def share(estimate: Mapping[str, Any]) -> str:
    """A share in percent with its interval and n; or why there is none."""
    if estimate["value"] is None:
        return str(estimate["refused"])
    return f"{estimate['value']:.1%} ({estimate['low']:.1%} to {estimate['high']:.1%}, n {estimate['n']})"


def verdict(against: Mapping[str, Any] | None) -> str:
    """Whether a figure beats the best copy by two standard errors."""
    if against is None or against["baseline"] is None or against.get("value") is None:
        return ""
    name = QUERY_NAMES.get(against["baseline"], against["baseline"])
    change = f"{against['value'] * 100:+.1f} ± {against['standard_error'] * 100:.1f} points"
    return f"{'beats' if against['beats'] else 'does not beat'} {name} ({change})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
