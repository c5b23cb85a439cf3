"""The figures of a report that matter most, in words: each with its interval, beside the best baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

GALLERY_NAMES = {
    "style": "99 of its style",
    "style_and_object": "those and its object in other styles",
    "neighbours": "16 nearest neighbours of its picture",
}
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

    yield from _other_lines(report)


def _other_lines(report: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the figures on choosing, on sets of samples, on memory and on scenes."""
    for name, rows in report.get("curves", {}).get("chosen_by_clip", {}).items():
        if name in GALLERY_NAMES:
            gain = f"{100 * rows[-1]['gain']:+.1f} ± {100 * rows[-1]['gain_standard_error']:.1f} points over one draw"
            what = f"best of {rows[-1]['n']}, {GALLERY_NAMES[name]}"
            yield Line("choosing", what, f"{rows[-1]['score']:.1%}", gain)
    for name, network in report.get("samples", {}).get("networks", {}).items():
        first = network["blur"][0]
        if first["draws"]["frechet"]["value"] is not None:
            beside = ", ".join(
                f"{kind.replace('_', ' ')} {first[kind]['frechet']['value']:.2f}"
                for kind in ("reconstructions", "training_pictures")
                if first[kind]["frechet"]["value"] is not None
            )
            yield Line("samples", f"Fréchet on {name}", f"{first['draws']['frechet']['value']:.2f}", beside)
    for name, measure in report.get("memorisation", {}).get("measures", {}).items():
        near = f"true pictures {share(measure['true_pictures']['near'])}"
        yield Line("memory", f"draws near a training picture, {name}", share(measure["draws"]["near"]), near)
    for kind, table in report.get("composition", {}).get("kinds", {}).items():
        if "draws" in table:
            best = table.get("chosen", table["draws"])
            chance = f"shuffled captions {share(table['draws_of_other_captions'])}"
            yield Line("scenes", kind, share(best), chance)


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
