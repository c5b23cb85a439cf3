"""`build_scenes`: composed scenes as a folder of captioned pictures, cut from an art set.

    OUT/metadata.jsonl         one row a picture: file_name, captions, split, scene, things, license ...
    OUT/images/KIND/NNNNN.png  RGB
    OUT/README.md              card: counts, licences, attributions

The same art set, seed and numbers give the same folder, byte for byte.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dalle.data.art.emoji import start_pool
from dalle.data.art.packages import DEFAULT_STYLES
from dalle.data.art.splits import NEAR_RMSE, nearest_rmse
from dalle.data.scenes.captions import make_captions
from dalle.data.scenes.card import write_card
from dalle.data.scenes.compose import Composer, share_out
from dalle.data.scenes.drawing import draw_scene
from dalle.data.scenes.lettering import FONTS_BY_NAME, fetch_fonts
from dalle.data.scenes.library import looks_of, shape_looks
from dalle.data.scenes.objects import Source, find_sources, load_objects, read_art
from dalle.data.scenes.scene import KINDS, Kind, Scene
from dalle.data.scenes.shapes import SHAPE_LICENCE
from dalle.images import open_image

_THUMBNAIL = 16  # side at which pictures are compared
_CHUNK = 64  # scenes a task of the pool


@dataclass
class SceneReport:
    """What a build kept and dropped."""

    # Plain dictionaries: `dataclasses.asdict` would count the items of a Counter.
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)  # kind -> split -> pictures
    n_too_near: int = 0  # dropped: a scene of train that is nearly a held-out picture of the art set


def build_scenes(
    art: Path,
    out: Path,
    *,
    n: int = 20_000,
    seed: int = 0,
    size: int = 128,
    max_letters: int = 4,
    kinds: Sequence[Kind] = KINDS,
    progress: Callable[[str], None] | None = None,
    npm_folder: Path | None = None,
    n_workers: int | None = None,
) -> SceneReport:
    """Compose `n` scenes from the art set in `art` into the new folder `out` and return what it holds.

    size: side of the pictures in pixels, a multiple of 16. max_letters: of words, 2 to 6. kinds: which kinds of
    scenes. npm_folder: a node_modules folder that holds the pinned fonts; without one they are fetched once by
    npm. n_workers: processes (default: two).

    Raises ValueError when the folder is taken, a number is out of range, or the art set is none.
    """
    say = progress or (lambda message: None)
    out = Path(os.path.abspath(out))  # `.` has no name to put a sibling beside
    _check(out, n, size, max_letters)
    rows = read_art(art)
    fonts = fetch_fonts(npm_folder, progress) if "word" in kinds else {}
    sources = find_sources(art, rows, load_objects(), frozenset(style.name for style in DEFAULT_STYLES))
    if not sources:
        raise ValueError(f"{art} has no train drawing of any object of scenes: build the whole art set")
    n_workers = n_workers or min(2, os.cpu_count() or 1)
    pool = start_pool(n_workers) if n_workers > 1 else None
    run = map if pool is None else pool.map
    try:
        looks = [look for found in run(looks_of, sources) for look in found] + shape_looks()
        say(f"{len(sources)} drawings in {len(looks)} looks")
        composer = Composer(looks, known_words(rows, max_letters), seed, max_letters)
        scenes = [
            drawn for kind, share in share_out(n, kinds).items() for drawn in composer.draw(kind, share)
        ]
        say(f"composed {len(scenes)} scenes")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(
            out.name + ".partial"
        )  # renamed at the end: a killed build leaves no half set
        shutil.rmtree(partial, ignore_errors=True)
        for kind in kinds:
            (partial / "images" / kind).mkdir(parents=True)
        by_style = {(source.object, source.style): source for source in sources}
        names = [f"images/{scene.kind}/{i:06d}.png" for i, (scene, _) in enumerate(scenes)]
        metadata = [
            _row(name, scene, split, by_style) for name, (scene, split) in zip(names, scenes, strict=True)
        ]
        tasks = []
        for start in range(0, len(scenes), _CHUNK):
            part = [scene for scene, _ in scenes[start : start + _CHUNK]]
            used = {(t.object, t.style) for scene in part for t in scene.things if t.style is not None}
            drawings = {key: by_style[key] for key in sorted(used)}
            tasks.append((part, names[start : start + _CHUNK], drawings, fonts, size, partial))
        thumbnails = np.concatenate(list(run(_draw_chunk, tasks)))
        held_out = _held_out(art, rows)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    is_near = nearest_rmse(thumbnails, held_out) < NEAR_RMSE
    kept = []
    report = SceneReport({kind: {} for kind in kinds})
    for row, near in zip(metadata, is_near, strict=True):
        if near and row["split"] == "train":
            (partial / row["file_name"]).unlink()
            report.n_too_near += 1
            continue
        kept.append(row)
        counts = report.kinds[row["scene"]]
        counts[row["split"]] = counts.get(row["split"], 0) + 1
    with open(partial / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    write_card(partial, report.kinds, report.n_too_near, seed, size, sources)
    if out.exists():
        out.rmdir()  # it is empty
    partial.rename(out)
    say(f"{len(kept)} scenes in {out}")
    return report


def _check(out: Path, n: int, size: int, max_letters: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: give a new folder for the scenes, or remove it")
    if n < 1:
        raise ValueError(f"number of scenes is {n}; it must be at least 1")
    if size < 2 * _THUMBNAIL or size % _THUMBNAIL:
        raise ValueError(f"picture size is {size}; it must be a multiple of {_THUMBNAIL} of at least 32")
    if not 2 <= max_letters <= 6:
        raise ValueError(f"letters of a word are at most {max_letters}; 2 to 6 are possible")


def known_words(rows: Iterable[Mapping[str, Any]], max_letters: int) -> list[str]:
    """Return the words of 2 to `max_letters` letters in the captions of the art set, in capitals, sorted."""
    found: set[str] = set()
    for row in rows:
        for caption in row["captions"]:
            found.update(re.findall(r"(?<![\w'-])[a-z]{2,6}(?![\w'-])", caption.lower()))
    return sorted(word.upper() for word in found if len(word) <= max_letters)


def _row(name: str, scene: Scene, split: str, sources: Mapping[tuple[str, str], Source]) -> dict[str, Any]:
    """Return the metadata of a picture."""
    drawings = [sources[t.object, t.style] for t in scene.things if t.style is not None]
    licences = {source.licence for source in drawings}
    origins = [source.source for source in drawings]
    if any(thing.style is None for thing in scene.things):
        licences.add(SHAPE_LICENCE)
    if scene.font is not None:
        font = FONTS_BY_NAME[scene.font]
        licences.add(font.licence)
        origins.append(f"{font.package}@{font.version}")
    style = "letters" if scene.word is not None else drawings[0].style if drawings else "shapes"
    fields = {
        "file_name": name,
        "captions": make_captions(scene),
        "split": split,
        "style": style,
        "license": " AND ".join(sorted(licences)),
        "sources": sorted(set(origins)),
    }
    return fields | scene.to_fields()


_Task = tuple[Sequence[Scene], Sequence[str], Mapping[tuple[str, str], Source], Mapping[str, Path], int, Path]


def _draw_chunk(task: _Task) -> npt.NDArray[np.float32]:
    """Draw and save scenes; return their thumbnails, see `_thumbnail`, (N, 768)."""
    scenes, names, sources, fonts, size, folder = task
    thumbnails = []
    for scene, name in zip(scenes, names, strict=True):
        picture = draw_scene(scene, sources, fonts, size)
        picture.save(folder / name, compress_level=1)
        thumbnails.append(_thumbnail(picture))
    return np.stack(thumbnails)


def _held_out(art: Path, rows: Iterable[Mapping[str, Any]]) -> npt.NDArray[np.float32]:
    """Return the thumbnails of the pictures that the art set holds out, (H, 768)."""
    names = [row["file_name"] for row in rows if row["split"] != "train"]
    found = [_thumbnail(open_image(art / name)) for name in names]
    return np.array(found, dtype=np.float32).reshape(len(found), 3 * _THUMBNAIL**2)


def _thumbnail(picture: Image.Image) -> npt.NDArray[np.float32]:
    """Return a square picture at 16 x 16 RGB in [0, 1], flat."""
    small = picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1) / np.float32(255)
