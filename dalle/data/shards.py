"""WebDataset and img2dataset tar shards, read in place.

Source: the WebDataset convention (members of one sample agree up to a dot of the name); POSIX tar.
"""

import os
import tarfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from dalle.data import places
from dalle.data.pair import BadSample, Pair, Rejected
from dalle.data.places import Files, normal
from dalle.data.samples import (
    CAPTION_SUFFIXES,
    MAX_CAPTION_BYTES,
    OTHER_PICTURES,
    PICTURE_SUFFIXES,
    ReadOptions,
    Samples,
    caption_column,
    captions_of_name,
    captions_of_text,
    is_unsafe,
    json_object,
    make_pair,
    printable,
)

TAR_BLOCK = 512  # bytes; POSIX ustar
ANY_PICTURE = PICTURE_SUFFIXES | OTHER_PICTURES

Members = dict[str, tarfile.TarInfo]  # suffix in lower case -> member


def read_shard(files: Files, label: str, options: ReadOptions) -> Samples:
    """Samples of one tar, whose members are indexed by their headers and never extracted.

    A sample's name ends at the last dot, so that v1.00.jpg and v1.01.jpg are two; a further picture of a sample
    (good.seg.png beside good.png and good.json) is none of its own. Of a truncated shard the whole samples before the
    cut are kept, and one BadSample tells of the rest.
    """
    path = files.path(label)
    with places.open_binary(path) as file:
        index = _index(file, files.sizes[label])
        for name, reason in index.problems.values():
            yield BadSample(printable(f"{label}/{name}"), reason)
        for stem in index.samples:
            for found in _sample(label, path, file, stem, index.samples, options):
                at_the_cut = index.damage is not None and stem == index.last
                if not (at_the_cut and isinstance(found, BadSample)):  # the shard's own BadSample tells of it
                    yield found
    if index.damage is not None:
        reason = f"{index.damage}; the whole samples before that point are kept"
        yield BadSample(printable(label), reason, is_container=True)


class _Index(NamedTuple):
    samples: dict[str, Members]  # name up to the last dot -> members
    problems: dict[str, tuple[str, str]]  # name up to the last dot -> member and reason, one a sample
    damage: str | None  # why the rest of the shard could not be read
    last: str  # the sample before the end or the damage


def _index(file: BinaryIO, n_bytes: int) -> _Index:
    samples: dict[str, Members] = {}
    problems: dict[str, tuple[str, str]] = {}
    damage: str | None = None
    last = ""
    incomplete: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                last, suffix = _sample_name(member.name)
                problem = _member_problem(member, suffix)
                if member.isdir() or os.path.basename(member.name).startswith("."):  # ._x.jpg of macOS
                    continue
                if problem is not None:
                    problems.setdefault(last, (member.name, problem))
                    incomplete.add(last)
                elif member.offset_data + member.size > n_bytes:
                    incomplete.add(last)  # cut within this member
                elif suffix in samples.setdefault(last, {}):
                    problems.setdefault(last, (member.name, "duplicate key"))
                else:
                    samples[last][suffix] = member
            # tarfile stops without a word at a damaged header; a whole tar ends in empty blocks
            file.seek(archive.offset)
            if file.read(TAR_BLOCK) != bytes(TAR_BLOCK):
                damage = f"the shard is truncated or damaged at byte {archive.offset} of {n_bytes}"
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = f"the shard is truncated or damaged ({error})"
    whole = {stem: members for stem, members in samples.items() if stem not in incomplete}
    return _Index(whole, problems, damage, last)


def _sample_name(name: str) -> tuple[str, str]:
    """A member's name up to the last dot, composed, and the suffix in lower case."""
    stem, suffix = os.path.splitext(normal(name))
    return stem, suffix.lower()


def _main_sample(stem: str) -> str:
    """The sample that WebDataset counts a name to: up to the first dot of its last part."""
    folder, slash, base = stem.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _member_problem(member: tarfile.TarInfo, suffix: str) -> str | None:
    if is_unsafe(member.name):
        return "unsafe path"
    if not member.isreg() or member.issparse():
        return "not a regular file"
    if (suffix in CAPTION_SUFFIXES or suffix == ".json") and member.size > MAX_CAPTION_BYTES:
        return f"the member has {member.size} bytes; at most {MAX_CAPTION_BYTES} are read"
    return None


def _sample(
    label: str,
    shard: str,
    file: BinaryIO,
    stem: str,
    samples: Mapping[str, Members],
    options: ReadOptions,
) -> Samples:
    """The pictures of one sample; members of other kinds (pickles among them) are never read."""
    members = samples[stem]
    pictures = [member for suffix, member in members.items() if suffix in ANY_PICTURE]
    main = _main_sample(stem)
    if not pictures:
        for suffix, member in members.items():
            if suffix in CAPTION_SUFFIXES or (
                suffix == ".json" and caption_column(json_object(_content(file, member)) or {}, options)
            ):
                yield BadSample(printable(f"{label}/{member.name}"), "missing image file beside this caption")
                return
        return
    if main != stem and not _has_caption(members) and _is_whole(samples.get(main, {})):
        return  # a mask or depth map of the sample `main`
    for picture in pictures:
        try:
            yield _pair(label, shard, file, picture, members, options)
        except Rejected as error:
            yield BadSample(printable(f"{label}/{picture.name}"), str(error))


def _pair(
    label: str, shard: str, file: BinaryIO, picture: tarfile.TarInfo, members: Members, options: ReadOptions
) -> Pair:
    record: dict[str, Any] = {}
    if ".json" in members:
        parsed = json_object(_content(file, members[".json"]))
        if parsed is None:
            raise Rejected("the .json member is not a JSON object")
        record = parsed
    column = caption_column(record, options)
    captions = record.pop(column) if column is not None else None
    text = next((suffix for suffix in CAPTION_SUFFIXES if suffix in members), None)
    if text is not None:
        captions = captions_of_text(_content(file, members[text]))
    elif column is None:
        if options.captions_from is None:
            raise Rejected("no caption: the sample has no .txt, .caption or .json with a caption")
        captions = captions_of_name(picture.name, options.captions_from)
    return make_pair(
        f"{label}/{picture.name}", captions, record, shard, picture.size,
        offset=picture.offset_data, sample=picture.name, home=label,
    )  # fmt: skip


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _has_caption(members: Members) -> bool:
    return ".json" in members or any(suffix in members for suffix in CAPTION_SUFFIXES)


def _is_whole(members: Members) -> bool:
    return _has_caption(members) and any(suffix in members for suffix in ANY_PICTURE)
