"""Which layouts a data set has: all that are found are read, none hides another.

Layouts: tables that name picture files (tables.py), tar shards (shards.py), tables with the pictures in them
(parquet.py), COCO captions (coco.py), pictures with caption files beside them (folder.py), and what `dalle data filter`
wrote (selection.py). Every reader yields a Pair for a usable sample and a BadSample for one that is skipped: none is
dropped unseen.
"""

import posixpath
import re
from collections import Counter
from itertools import chain
from pathlib import Path, PurePosixPath

from dalle.data import coco, parquet, places, selection, shards, tables
from dalle.data.folder import read_folder
from dalle.data.places import Files, normal
from dalle.data.samples import CAPTION_COLUMNS, ReadOptions, Samples, has_suffix

PICTURE_TABLES = (".parquet", ".arrow")
ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
LOOKED_FOR = (
    "looked for metadata.jsonl, .csv, .tsv or .parquet and other tables with a picture and a caption column (file_name "
    f"and one of {', '.join(CAPTION_COLUMNS)}), *.tar shards (x.jpg with x.txt, x.caption or x.json), *.parquet tables "
    "with the pictures in them (image with bytes, and a caption column as above; .arrow too), a COCO captions .json "
    "(images and annotations), pictures (jpg, png, webp, gif, bmp, tiff, avif, heic) with a .txt of the same name beside "
    "each (--captions-from folder or name does without), and what `dalle data filter` wrote"
)


def read_samples(source: str | Path, options: ReadOptions, exclude: tuple[str, ...]) -> tuple[Samples, Files]:
    """The samples of a source, and its files, whose notes say what was not read once the samples are consumed."""
    root = _located(source)
    if not places.is_folder(root):
        files, label = _single(root)
        return _samples_of_file(files, label, options), files
    if selection.is_selection(Path(root)):
        return selection.read_selection(Path(root)), Files(root)
    if not places.is_address(root) and places.is_own(root):
        raise ValueError(
            f"{source} is a model, a run or a token store of dalle, and no data set: give the pictures"
        )
    files = places.list_files(root, exclude)
    return _samples_of_folder(files, options), files


def _located(source: str | Path) -> str:
    """The path or address of a source; what is neither there nor at an address is looked for on the Hub."""
    if places.is_address(source):
        return str(source)
    path = Path(source).expanduser()
    if path.exists():
        return str(path)
    hub = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", str(source))
    if hub is None or not isinstance(source, str):
        raise ValueError(
            f"{source} does not exist: give a folder, a table, a .tar, a COCO .json, an address such as "
            "s3://bucket/folder, or a Hub id owner/name"
        )
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(hub[1], repo_type="dataset", revision=hub[2])
    except Exception as error:  # the Hub's client raises errors of many libraries
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{source} is no folder here, and as a data set of the Hub it cannot be had: {reason}"
        ) from error


# --- a folder ---


def _samples_of_folder(files: Files, options: ReadOptions) -> Samples:
    """The samples of all layouts together; a picture that a table or COCO file lists is that layout's."""
    named = [name for name in files.sizes if _is_metadata(name)]
    doubled = Counter(posixpath.dirname(name) for name in named).most_common(1)
    if doubled and doubled[0][1] > 1:
        raise ValueError(f"{files.path(doubled[0][0])} holds {doubled[0][1]} metadata tables; keep one")
    named += [name for name in files.sizes if _is_other_table(files, name, options)]
    tars = [name for name in files.sizes if has_suffix(name, (".tar",))]
    embedded = [name for name in files.sizes if has_suffix(name, PICTURE_TABLES) and name not in named]
    found, unreadable = parquet.picture_tables(files, embedded, options)
    trees = ((name, coco.coco_tree(files, name)) for name in coco.coco_sources(files))
    annotated = [(name, tree) for name, tree in trees if tree is not None]

    archives = [name for name in files.sizes if has_suffix(name, ARCHIVES)]
    files.notes += [f"{name} is an archive: not read; unpack it if it holds pictures" for name in archives]
    listed: set[str] = set()
    referring = chain(
        *(tables.read_table(files, name, options) for name in named),
        *(coco.read_coco(files, name, tree) for name, tree in annotated),
    )
    for sample in referring:
        listed.add(normal(sample.key))
        yield sample
    for name in tars:
        yield from shards.read_shard(files, name, options)
    yield from unreadable
    if found:
        yield from parquet.read_tables(found, options)
    is_alone = not (named or tars or found or annotated)
    yield from read_folder(files, options, listed, is_alone)


def _is_metadata(name: str) -> bool:
    path = PurePosixPath(name)
    return path.stem.lower() == "metadata" and path.suffix.lower() in tables.SUFFIXES


def _is_other_table(files: Files, name: str, options: ReadOptions) -> bool:
    is_table = has_suffix(name, tables.SUFFIXES) and not _is_metadata(name)
    return is_table and tables.is_data_table(files, name, options)


# --- a single file ---


def _single(path: str) -> tuple[Files, str]:
    """The folder around a file, and the file's name in it; COCO's annotations/ lies beside its pictures."""
    folder, name = (
        path.rsplit("/", 1) if places.is_address(path) else map(str, (Path(path).parent, Path(path).name))
    )
    if PurePosixPath(folder).name == "annotations" and name.lower().endswith(".json"):
        folder, name = str(Path(folder).parent), f"annotations/{name}"
    state = places.state_of(path)
    if state is None:
        raise ValueError(
            f"{path} does not exist or cannot be read as a file: give a folder, a table or a .tar"
        )
    return Files(folder, {name: state.n_bytes}), name


def _samples_of_file(files: Files, label: str, options: ReadOptions) -> Samples:
    if has_suffix(label, PICTURE_TABLES) and not _is_metadata(label):
        found, unreadable = parquet.picture_tables(files, [label], options)
        if found:
            return parquet.read_tables(found, options)
        if has_suffix(label, (".arrow",)) or unreadable:
            return iter(unreadable)
    if has_suffix(label, tables.SUFFIXES):
        return tables.read_table(files, label, options)
    if has_suffix(label, (".tar",)):
        return shards.read_shard(files, label, options)
    tree = coco.coco_tree(files, label) if has_suffix(label, (".json",)) else None
    if tree is not None:
        return coco.read_coco(files, label, tree)
    raise ValueError(f"no captions found in {files.path(label)}: {LOOKED_FOR}")
