"""`build_emoji_set`: the open emoji art set as a folder of captioned pictures, drawn from npm packages.

    OUT/metadata.jsonl         one row a picture: file_name, captions, split, style, object, license ...
    OUT/images/STYLE/NAME.png  RGB on white
    OUT/README.md              card: counts, licences, attributions, sha256 of the training ids

The same packages give the same metadata, byte for byte.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dalle.data.art.captions import gender_of, make_captions, measure_colours, object_key, object_phrase
from dalle.data.art.drawing import (
    Drawing,
    choose_measured,
    draw,
    measure_extent,
    read_drawings,
    require_renderer,
    scale_of,
)
from dalle.data.art.names import TONES, EmojiNames
from dalle.data.art.packages import Style, check_packages, fetch_packages, select_styles
from dalle.data.art.splits import NEAR_RMSE, Item, admit_extra, assign_splits, nearest_rmse

_THUMBNAIL = 16  # side of the pictures that are compared with each other
_CHUNK = 64  # pictures a task of the pool


@dataclass(frozen=True)
class _Drawn:
    """What is kept in memory of one picture that was drawn and saved."""

    drawing: Drawing
    sha256: bytes  # of its pixels
    colours: list[str]
    thumbnail: npt.NDArray[np.float32]  # (16 * 16 * 3,) in [0, 1]


@dataclass
class BuildReport:
    """What a build kept and dropped."""

    # Plain dictionaries: `dataclasses.asdict` would count the items of a Counter.
    splits: dict[str, int] = field(default_factory=dict)
    styles: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> pictures
    n_hard_combos: int = 0
    train_sha256: str = ""  # of the sorted file names of split train, one a line


def build_emoji_set(
    out: Path,
    *,
    size: int = 128,
    extra: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
    npm_folder: Path | None = None,
    n_workers: int | None = None,
) -> BuildReport:
    """Draw the emoji set into the new folder `out` and return what it holds.

    size: side of the pictures in pixels, a multiple of 16. extra: sets to add (`openmoji`, `openmoji-black`,
    `emojione-v1`: share-alike; `symbola` or `symbola=FILE`). npm_folder: a node_modules folder that holds the
    pinned packages; without one they are fetched once by npm. n_workers: processes that draw (default: two);
    1 draws in this one, more need a main module that can be imported, as all of `multiprocessing` does.

    Raises ValueError when the folder is taken, a size or set is not known, or a program is missing.
    """
    say = progress or (lambda message: None)
    out = Path(os.path.abspath(out))  # `.` has no name to put a sibling beside
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give a new folder for the emoji set, or remove it")
    if size < 2 * _THUMBNAIL or size % _THUMBNAIL:
        raise ValueError(f"picture size is {size}; it must be a multiple of {_THUMBNAIL} of at least 32")
    styles, font = select_styles(extra)
    require_renderer(styles)
    npm_folder = (
        fetch_packages(styles, progress) if npm_folder is None else check_packages(npm_folder, styles)
    )
    started = time.perf_counter()
    names = EmojiNames(npm_folder)
    drawings = {style.name: read_drawings(style, npm_folder, names, font) for style in styles}
    say(f"read {sum(map(len, drawings.values()))} pictures of {len(styles)} styles in {_since(started)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")  # renamed at the end: a killed build leaves no half set
    shutil.rmtree(partial, ignore_errors=True)
    for style in styles:
        (partial / "images" / style.name).mkdir(parents=True)
    dropped: Counter[str] = Counter()
    drawn = _draw_all(styles, drawings, partial, size, n_workers or min(2, os.cpu_count() or 1), dropped, say)
    started, by_name = time.perf_counter(), {style.name: style for style in styles}
    rows = [_make_row(picture, by_name[picture.drawing.style], names) for picture in drawn]
    metadata, refused = _split_rows(rows)
    for name in refused:
        (partial / name).unlink()
    dropped["added, too near a held-out picture"] = len(refused)
    report = _report(metadata, dropped)
    say(f"captions, splits and neighbours in {_since(started)}")
    with open(partial / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in metadata)
    _write_card(partial, styles, size, report)
    if out.exists():
        out.rmdir()  # it is empty
    partial.rename(out)
    say(f"{len(metadata)} pictures in {out}")
    return report


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.0f} s"


def _draw_all(
    styles: Sequence[Style],
    drawings: Mapping[str, Sequence[Drawing]],
    folder: Path,
    size: int,
    n_workers: int,
    dropped: Counter[str],
    say: Callable[[str], None],
) -> list[_Drawn]:
    """Draw and save every picture; drop and count blanks, broken ones and all but the first of equal ones."""
    pool = start_pool(n_workers) if n_workers > 1 else None
    run = map if pool is None else pool.map
    try:
        kept: list[_Drawn] = []
        seen: set[bytes] = set()
        for style in styles:
            started = time.perf_counter()
            named = [d for d in drawings[style.name] if d.emoji is not None]
            dropped["without a name"] += len(drawings[style.name]) - len(named)
            extents = [e for part in run(_measure_chunk, _chunks(choose_measured(named))) for e in part]
            scale = scale_of(extents)
            tasks = [(part, scale, size, folder) for part in _chunks(named)]
            for part in run(_draw_chunk, tasks):
                for result in part:
                    if isinstance(result, str):
                        dropped[result] += 1
                    elif result.sha256 in seen:
                        dropped["same bytes as another"] += 1
                        (folder / _file_name(result.drawing)).unlink()
                    else:
                        seen.add(result.sha256)
                        kept.append(result)
            say(f"drew {len(named)} of {style.name} at scale {scale:.3f} in {_since(started)}")
        return kept
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def start_pool(n_workers: int) -> ProcessPoolExecutor:
    """Start processes that end when this one is killed; a plain pool's would wait for ever."""
    return ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _chunks(drawings: Sequence[Drawing]) -> list[Sequence[Drawing]]:
    return [drawings[start : start + _CHUNK] for start in range(0, len(drawings), _CHUNK)]


def _measure_chunk(drawings: Sequence[Drawing]) -> list[float]:
    extents = []
    for drawing in drawings:
        try:
            extent = measure_extent(drawing)
        except ValueError:
            continue  # counted when it is drawn in full
        if extent is not None:
            extents.append(extent)
    return extents


def _file_name(drawing: Drawing) -> str:
    return f"images/{drawing.style}/{drawing.name}.png"


def _draw_chunk(task: tuple[Sequence[Drawing], float, int, Path]) -> list[_Drawn | str]:
    """Draw, measure and save; a picture that is dropped gives the reason instead."""
    drawings, scale, size, folder = task
    results: list[_Drawn | str] = []
    for drawing in drawings:
        try:
            picture = draw(drawing, scale, size)
        except ValueError:
            results.append("cannot be drawn")
            continue
        pixels = np.asarray(picture)  # (size, size, 3)
        if pixels.min() > 250:
            results.append("blank")
            continue
        picture.save(folder / _file_name(drawing), compress_level=1)
        cell = size // _THUMBNAIL
        blocks = pixels.reshape(_THUMBNAIL, cell, _THUMBNAIL, cell, 3)
        thumbnail = (blocks.mean(axis=(1, 3)) / 255).astype(np.float32).reshape(-1)
        digest = hashlib.sha256(pixels.tobytes()).digest()
        results.append(_Drawn(drawing, digest, measure_colours(pixels), thumbnail))
    return results


@dataclass(frozen=True)
class _Row:
    """A picture and its metadata."""

    item: Item
    is_default: bool
    thumbnail: npt.NDArray[np.float32]
    fields: dict[str, object]


def _make_row(picture: _Drawn, style: Style, names: EmojiNames) -> _Row:
    drawing, emoji = picture.drawing, picture.drawing.emoji
    assert emoji is not None
    package = f"{style.package}@{style.version}" if style.package else style.name
    item = Item(
        object_key(emoji.base_label, names.labels),
        style.name,
        style.family_of(drawing.name),
        drawing.name,
        has_tone=bool(emoji.tones),
    )
    fields: dict[str, object] = {
        "file_name": _file_name(drawing),
        "captions": make_captions(emoji, style, picture.colours, drawing.name),
        "split": "train",
        "combo_hard": False,
        "style": style.name,
        "family": item.family,
        "object": object_phrase(emoji),
        "okey": item.object_key,
        "codepoints": emoji.codepoints,
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "skin_tone": [TONES[tone - 1] for tone in emoji.tones] or None,
        "gender": gender_of(emoji.label),
        "colors": picture.colours,
        "license": style.licence,
        "source": f"{package}/{drawing.name}",
    }
    return _Row(item, style.flag is None, picture.thumbnail, fields)


def _split_rows(rows: Sequence[_Row]) -> tuple[list[dict[str, object]], list[str]]:
    """Return the metadata with splits, and the files of added pictures too near a held-out one."""
    default = [row for row in rows if row.is_default]
    added = [row for row in rows if not row.is_default]
    splits = assign_splits([row.item for row in default])
    thumbnails = _stack(default)
    held_out = np.array([split.name != "train" for split in splits], dtype=bool)
    nearest = iter(nearest_rmse(thumbnails[held_out], thumbnails[~held_out]))
    metadata = []
    for row, split in zip(default, splits, strict=True):
        fields = row.fields | {"split": split.name}
        if split.name != "train":
            distance = float(next(nearest))
            fields |= {"nn_rmse": round(distance, 4), "combo_hard": split.is_hard_at(distance)}
        metadata.append(fields)
    objects = {
        row.item.object_key for row, split in zip(default, splits, strict=True) if split.name == "object"
    }
    keys = [row.item.object_key for row in added]
    admitted = admit_extra(keys, _stack(added), objects, thumbnails[held_out])
    metadata += [row.fields for row, good in zip(added, admitted, strict=True) if good]
    refused = [str(row.fields["file_name"]) for row, good in zip(added, admitted, strict=True) if not good]
    return metadata, refused


def _stack(rows: Sequence[_Row]) -> npt.NDArray[np.float32]:
    return np.array([row.thumbnail for row in rows], dtype=np.float32).reshape(len(rows), 3 * _THUMBNAIL**2)


def _report(metadata: Sequence[Mapping[str, object]], dropped: Counter[str]) -> BuildReport:
    train = sorted(str(row["file_name"]) for row in metadata if row["split"] == "train")
    return BuildReport(
        splits=dict(Counter(str(row["split"]) for row in metadata)),
        styles=dict(Counter(str(row["style"]) for row in metadata)),
        dropped=dict(+dropped),  # without the zeros
        n_hard_combos=sum(bool(row["combo_hard"]) for row in metadata),
        train_sha256=hashlib.sha256("".join(f"{name}\n" for name in train).encode()).hexdigest(),
    )


def _write_card(folder: Path, styles: Sequence[Style], size: int, report: BuildReport) -> None:
    table = [
        f"| {style.name} | {style.words[0]} style | {report.styles.get(style.name, 0)} | {style.licence} | "
        f"{f'{style.package} {style.version}'.strip() or 'font of the system'} |"
        for style in styles
    ]
    credits = [f"- {style.name}: {style.credit} ({style.licence})" for style in styles]
    lines = [
        "# Open emoji art set",
        "",
        f"{sum(report.splits.values())} pictures of {size} x {size} pixels, RGB on white, with three to six "
        f"captions each, in {len(styles)} styles. Drawn by `dalle data emoji`; `metadata.jsonl` holds one "
        "row a picture.",
        "",
        "| style | caption word | pictures | licence | npm package |",
        "|---|---|---|---|---|",
        *table,
        "",
        "## Splits",
        "",
        *[f"- {name}: {count}" for name, count in sorted(report.splits.items())],
        "",
        f"`combo` holds out an object in one style; in {report.n_hard_combos} of these pictures "
        "(`combo_hard`) no other rendering of the same drawing is in train, and no picture nearer than "
        f"{NEAR_RMSE}. `object` holds out objects in every style, `tone` single skin tones. `nn_rmse` is the "
        "distance of a held-out picture to the nearest in train, RMSE at 16 x 16 RGB in [0, 1].",
        "",
        f"sha256 of the sorted training file names, one a line: `{report.train_sha256}`",
        "",
        "Dropped: "
        + (", ".join(f"{n} {reason}" for reason, n in sorted(report.dropped.items())) or "nothing")
        + ".",
        "",
        "## Attributions",
        "",
        "All pictures were rasterised and placed on white; names and keywords are from emojibase (MIT), "
        "after Unicode CLDR.",
        "",
        *credits,
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
