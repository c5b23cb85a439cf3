"""COCO captions: a .json of images and annotations, and Karpathy's form of it with sentences and splits.

Source: cocodataset.org/#format-data; Karpathy and Fei-Fei 2015 (dataset_coco.json, dataset_flickr30k.json).
"""

import posixpath
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from dalle.data.pair import BadSample, Rejected
from dalle.data.places import Files
from dalle.data.samples import Samples, is_unsafe, json_object, make_pair, printable


def coco_sources(files: Files) -> list[str]:
    """JSON files that may hold captions; beside captions_*.json no others (instances_*) are parsed."""

    def is_named(name: str) -> bool:
        return posixpath.basename(name).startswith(("captions_", "dataset_"))

    def is_near(name: str) -> bool:
        return posixpath.basename(posixpath.dirname(name)) in ("", "annotations")

    trees = [name for name in files.sizes if name.lower().endswith(".json")]
    near = [name for name in trees if is_named(name) or is_near(name)]
    return [name for name in near if is_named(name)] or near


def coco_tree(files: Files, name: str) -> dict[str, Any] | None:
    """The JSON of a file when it has the shape of COCO captions: images[] with sentences, or with annotations[]."""
    # bytes that are no UTF-8 become lone surrogates, which the checks find caption by caption
    tree = json_object(files.read(name).decode("utf-8-sig", "surrogateescape"))
    if tree is None or not isinstance(tree.get("images"), list):
        return None
    if any(isinstance(image, dict) and isinstance(image.get("sentences"), list) for image in tree["images"]):
        return tree
    annotations = tree.get("annotations")
    is_captions = isinstance(annotations, list) and any(
        isinstance(a, dict) and "caption" in a for a in annotations
    )
    return tree if is_captions else None


def read_coco(files: Files, source: str, tree: Mapping[str, Any]) -> Samples:
    """Images of one captions file with all their captions.

    Pictures lie beside the file, beside its folder annotations/, in images/, or in a folder named like its split:
    captions_val2017.json -> val2017/, images/val2017/, val/.
    """
    label = posixpath.basename(source)
    captions: dict[object, list[object]] = {}
    for annotation in tree.get("annotations") or ():
        if isinstance(annotation, dict) and isinstance(annotation.get("image_id"), int | str):
            captions.setdefault(annotation["image_id"], []).append(annotation.get("caption"))
        else:
            yield BadSample(label, "an annotation without image_id")
    listed: set[object] = set()
    for image in tree["images"]:
        record = dict(image) if isinstance(image, dict) else {}
        name, number = record.pop("file_name", None), record.pop("id", None)
        if isinstance(record.get("sentences"), list):
            name, number = _karpathy(record, captions, len(listed))
            listed.add(number)
        key = name if isinstance(name, str) else f"{label}: image {number}"
        try:
            if not isinstance(name, str) or not isinstance(number, int | str):
                raise Rejected("an image without file_name and id")
            listed.add(number)
            if is_unsafe(name):
                raise Rejected(f"unsafe path {printable(name)!r}")
            places = (files.find(home + name) for home in _homes(source))
            key, n_bytes = next((place for place in places if place is not None), (name, None))
            if n_bytes is None:
                raise Rejected("missing image file")
            if number not in captions:
                raise Rejected("no caption among the annotations")
            path = files.path(key)
            yield make_pair(key, captions[number], record, path, n_bytes, sample=name, home=source)
        except Rejected as error:
            yield BadSample(printable(key), str(error))
    for number in captions.keys() - listed:
        yield BadSample(printable(f"{label}: image {number}"), "captions of an image that is not listed")


def _karpathy(
    record: dict[str, Any], captions: dict[object, list[object]], position: int
) -> tuple[str | None, int]:
    """Name and number of an image with sentences, whose captions are added to the others."""
    sentences = record.pop("sentences")
    name, folder = record.pop("filename", None), record.pop("filepath", None)
    captions[position] = [s.get("raw") for s in sentences if isinstance(s, dict)] or [None]
    is_below = isinstance(name, str) and isinstance(folder, str) and folder
    return (posixpath.join(folder, name) if is_below else name), position


def _homes(source: str) -> Iterator[str]:
    """Folders with a "/" behind each, "" for the root, where the pictures of a captions file may lie."""
    stem = PurePosixPath(source).stem
    named = stem.removeprefix("captions_")
    word = named.rstrip("0123456789").rstrip("_-")
    folder = posixpath.dirname(source)
    bases = [folder, posixpath.dirname(folder)] if posixpath.basename(folder) == "annotations" else [folder]
    extra = "flickr30k-images" if "flickr30k" in stem else named
    for base in bases:
        start = f"{base}/" if base else ""
        for part in (named, "", f"images/{named}", "images", word, f"images/{word}", extra):
            yield start + (f"{part}/" if part else "")
