"""report.html: the whole report on one self-contained page, pictures and plots in it, no script.

Every table shows n, the interval and the best baseline; what was refused is said in its place.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dalle import files
from dalle.evaluation.plots import Curve, plot
from dalle.evaluation.summary import GALLERY_NAMES, QUERY_NAMES, lines, share, verdict

STYLE = """
:root{--ink:#1b1f24;--paper:#fff;--soft:#59636e;--line:#d7dce1;--good:#116329;--bad:#a40e26;--band:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--paper:#0f1318;--soft:#9aa5b1;--line:#2f3740;--good:#57c27a;
--bad:#ff8a8a;--band:#171c22}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:62rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:2.6rem;border-top:1px solid var(--line);padding-top:1.2rem}
p.note,td.note,caption{color:var(--soft)}code{font-size:.85em;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;margin:.8rem 0}
th,td{text-align:left;padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
caption{text-align:left;padding-bottom:.3rem}.good{color:var(--good)}.bad{color:var(--bad)}
img.sheet{max-width:100%;image-rendering:pixelated;border:1px solid var(--line)}
svg{max-width:100%;height:auto}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.plots{display:flex;flex-wrap:wrap;gap:1.2rem}details pre{background:var(--band);padding:1rem;overflow:auto;
font-size:.8rem;max-height:30rem}
"""
SHEETS = {
    "reconstructions.png": "Held-out pictures above their reconstructions: what the tokens hold.",
    "worst.png": "The pictures that the tokens hold worst, above their reconstructions.",
    "draws.png": "True pictures above one draw of their captions, none picked by looks.",
    "chosen.png": "True pictures above the draw that the model's CLIP chose.",
}


class Html(str):
    """Text that is HTML already."""


def write_page(report: Mapping[str, Any], out: Path) -> None:
    """Write OUT/report.html from a report and the sheets beside it."""
    body = "\n".join(
        [
            _head(report),
            _section(
                "In short", _table(("section", "what", "figure (95 %)", "beside"), map(list, lines(report)))
            ),
            _section("Retrieval of pictures never seen", _retrieval(report.get("retrieval"))),
            _section("What choosing is worth", _curves(report.get("curves"))),
            _section("Samples as a set", _samples(report.get("samples"))),
            _section("Memory", _memory(report.get("memorisation"))),
            _section("Composed scenes and words", _composition(report.get("composition"))),
            _section("Pictures", _sheets(out)),
            _section("How this was measured", _origin(report)),
        ]
    )
    title = escape(f"Evaluation of {report['model']['name']}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )
    files.write_bytes(out / "report.html", page.encode())


def _head(report: Mapping[str, Any]) -> str:
    data = ", ".join(f"{split} {n:,}" for split, n in report["data"]["measured"].items())
    return (
        f"<h1>Evaluation of {escape(str(report['model']['name']))}</h1>"
        f'<p class="note">Held-out pictures: {escape(data)}. Intervals are of 95 %. A figure that does not beat its '
        f"baseline by two standard errors is said not to.</p>"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def _refusal(section: Mapping[str, Any] | None) -> str | None:
    """What stands in place of a section that is not there, or that has a sentence for figures; None for a whole one."""
    if section is None:
        return ""
    return f'<p class="note">{escape(section["refused"])}</p>' if "refused" in section else None


def _retrieval(section: Mapping[str, Any] | None) -> str:
    if section is None or "galleries" not in section:
        return _refusal(section) or ""
    parts = [
        f'<p class="note">How often the answer to a caption is nearer to its true picture (16x16 RGB) than to any other '
        f"of the gallery. Rows: {escape(section['rows'])}; CLIP chooses one of {section['n_candidates']}.</p>"
    ]
    for name, gallery in section["galleries"].items():
        rows = [
            [
                QUERY_NAMES.get(query, query),
                share(figures["recall_at_1"]),
                share(figures["recall_at_5"]),
                number(figures["median_rank"], 1),
                _judged(gallery["against_copying"].get(query)),
            ]
            for query, figures in gallery["queries"].items()
        ]
        chance = gallery["chance"]["recall_at_1"]
        caption = f"Gallery: {GALLERY_NAMES.get(name, name)}." + (f" Chance {chance:.1%}." if chance else "")
        parts.append(
            _table(("answer", "nearest", "among five", "median rank", "against copying"), rows, caption)
        )
    styles = section["galleries"].get("style", {}).get("by_style", {})
    queries = list(dict.fromkeys(query for figures in styles.values() for query in figures))
    rows = [[style, *(share(figures[query]) for query in queries)] for style, figures in styles.items()]
    if rows:
        parts.append(
            _table(
                ("style", *(QUERY_NAMES.get(q, q) for q in queries)), rows, "Nearest of its style, by style."
            )
        )
    return "".join(parts)


def _judged(against: Mapping[str, Any] | None) -> str:
    text = verdict(against)
    if not text or against is None:
        return text
    return Html(f'<span class="{"good" if against["beats"] else "bad"}">{escape(text)}</span>')


def _curves(section: Mapping[str, Any] | None) -> str:
    if (refusal := _refusal(section)) is not None or section is None:
        return refusal or ""
    names = {"style": "nearest of its style", "style_and_object": "nearest with its object's other styles"}
    plots = []
    for name, rows in section["chosen_by_clip"].items():
        curves = [Curve("chosen by CLIP", *_points(rows, "n", "score"))]
        if name in section["best_possible"]:
            curves.append(Curve("best possible", *_points(section["best_possible"][name], "n", "score")))
        plots.append(plot(names.get(name, f"CLIPScore by the {name}"), "candidates", curves, is_log=True))
    for name, network in section["kernel"].items():
        rows = [row for row in network["counts"] if row["value"] is not None]
        if rows:
            plots.append(
                plot(
                    f"kernel distance, {name}",
                    "candidates",
                    [Curve("chosen", *_points(rows, "candidates", "value"))],
                    is_log=True,
                )
            )
    note = f"{section['n_captions']} captions, {section['n_candidates']} candidates each; bars are two standard errors."
    return f'<p class="note">{note}</p><div class="plots">{"".join(plots)}</div>'


def _points(
    rows: Sequence[Mapping[str, Any]], x: str, y: str
) -> tuple[list[float], list[float], list[float]]:
    """The fields x and y of each row, and two standard errors of y."""
    errors = [2 * float(row.get("standard_error") or 0) for row in rows]
    return [float(row[x]) for row in rows], [float(row[y]) for row in rows], errors


def _samples(section: Mapping[str, Any] | None) -> str:
    if (refusal := _refusal(section)) is not None or section is None:
        return refusal or ""
    parts = []
    for name, network in section["networks"].items():
        head = ("set", "Fréchet", "kernel x 1000", "precision", "recall", "inception score")
        rows = []
        for row in network["blur"]:
            for kind, figures in row.items():
                if kind == "blur":
                    continue
                blur = f", blur {row['blur']} px" if row["blur"] else ""
                rows.append(
                    [
                        kind.replace("_", " ") + blur,
                        number(figures["frechet"], 2),
                        number(figures["kernel"], 2, 1000),
                        number(figures["precision"], 3),
                        number(figures["recall"], 3),
                        number(figures["inception_score"], 2) if "inception_score" in figures else "",
                    ]
                )
        caption = f"{name}, sha256 {network['sha256'][:12]}: not FID, and comparable with no other network's numbers."
        parts.append(_table(head, rows, caption))
        known = [row for row in network["blur"] if row["draws"]["frechet"]["value"] is not None]
        if known:
            values = [row["draws"]["frechet"]["value"] for row in known]
            curve = Curve("draws", [float(row["blur"]) for row in known], values, [0.0] * len(known))
            parts.append(plot(f"Fréchet distance, {name}", "blur of both sides, px", [curve]))
    return "".join(parts)


def _memory(section: Mapping[str, Any] | None) -> str:
    if (refusal := _refusal(section)) is not None or section is None:
        return refusal or ""
    parts = []
    for name, measure in section["measures"].items():
        rows = [
            [
                QUERY_NAMES.get(kind, kind.replace("_", " ")),
                number(figures["median"], 3),
                share(figures["near"]),
                share(figures["nearer_than_true"]) if "nearer_than_true" in figures else "",
            ]
            for kind, figures in measure.items()
            if isinstance(figures, Mapping) and "median" in figures
        ]
        head = (
            "picture",
            "median distance to train",
            f"below {measure['near_is_below']:.3f}",
            "nearer than the true one",
        )
        parts.append(
            _table(head, rows, f"Nearest of {section['n_training_pictures']:,} training pictures, by {name}.")
        )
    return "".join(parts)


def _composition(section: Mapping[str, Any] | None) -> str:
    if (refusal := _refusal(section)) is not None or section is None:
        return refusal or ""
    rows = []
    for kind, table in section["kinds"].items():
        if "refused" in table:
            rows.append([kind, table["refused"], "", "", "", ""])
            continue
        names = ("true_pictures", "reconstructions", "draws", "chosen", "draws_of_other_captions")
        rows.append([kind, *(share(table[name]) if name in table else "" for name in names)])
    head = ("kind", "true pictures", "reconstructions", "one draw", "chosen by CLIP", "shuffled captions")
    return _table(head, rows, "Share of pictures that show what the caption asks for, by exact checkers.")


def _sheets(out: Path) -> str:
    parts = []
    for name, caption in SHEETS.items():
        if (out / name).is_file():
            data = base64.b64encode((out / name).read_bytes()).decode()
            image = f'<img class="sheet" alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            parts.append(f'<p class="note">{escape(caption)}</p>{image}')
    return "".join(parts)


def _origin(report: Mapping[str, Any]) -> str:
    rows = [
        ["command", report.get("command", "")],
        ["model", json.dumps(report["model"])],
        ["data", json.dumps(report["data"])],
        ["settings", json.dumps(report["settings"])],
        ["versions", json.dumps(report["versions"])],
        ["unreadable", str(report.get("unreadable", {}).get("n", 0))],
        ["seconds", json.dumps(report.get("times", {}))],
    ]
    return _table(("", ""), [[name, Html(f"<code>{escape(text)}</code>")] for name, text in rows])


def number(estimate: Mapping[str, Any], digits: int, scale: float = 1.0) -> str:
    """A figure with its interval where it has one; or why there is none."""
    if estimate["value"] is None:
        return str(estimate["refused"])
    text = f"{scale * estimate['value']:.{digits}f}"
    if "low" in estimate:
        text += f" ({scale * estimate['low']:.{digits}f} to {scale * estimate['high']:.{digits}f})"
    return text


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", is_html: bool = False
) -> str:
    def cell(text: str) -> str:
        return f"<td>{text if isinstance(text, Html) else escape(text)}</td>"

    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
