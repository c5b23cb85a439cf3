"""WebDataset and img2dataset tar shards, read in place.

Source: the WebDataset convention (members of one sample agree up to the first dot of the name); POSIX tar.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dalle.data.layouts import (
    CAPTION_SUFFIXES,
    MAX_CAPTION_BYTES,
    PICTURE_SUFFIXES,
    BadSample,
    Rejected,
    Rows,
    caption_column,
    captions_of_text,
    checked_row,
    is_unsafe,
    json_object,
    printable,
)

TAR_BLOCK = 512  # bytes; POSIX ustar


def read_shard(root: Path, shard: Path) -> Rows:
    """Samples of one tar, whose members are indexed by their headers and never extracted.

    Of a truncated shard the whole samples before the cut are kept, and one BadSample tells of the rest.
    """
    label = shard.relative_to(root).as_posix()
    with shard.open("rb") as file:
        index = _index(file, shard.stat().st_size)
        for name, reason in index.problems.values():
            yield BadSample(printable(f"{label}/{name}"), reason)
        for stem, members in index.samples.items():
            for row in _sample(label, shard, file, members):
                at_the_cut = index.damage is not None and stem == index.last
                if not (at_the_cut and isinstance(row, BadSample)):  # the shard's own BadSample tells of it
                    yield row
    if index.damage is not None:
        yield BadSample(printable(label), f"{index.damage}; the whole samples before that point are kept")


class _Index(NamedTuple):
    samples: dict[str, dict[str, tarfile.TarInfo]]  # name up to the first dot -> suffix -> member
    problems: dict[str, tuple[str, str]]  # name up to the first dot -> member and reason, one a sample
    damage: str | None  # why the rest of the shard could not be read
    last: str  # the sample before the end or the damage


def _index(file: BinaryIO, n_bytes: int) -> _Index:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    problems: dict[str, tuple[str, str]] = {}
    damage: str | None = None
    last = ""
    incomplete: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                last, suffix = _webdataset_name(member.name)
                problem = _member_problem(member, suffix)
                if member.isdir():
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


def _webdataset_name(name: str) -> tuple[str, str]:
    """A member's name up to the first dot of its last part, and the rest in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, dot + suffix.lower()


def _member_problem(member: tarfile.TarInfo, suffix: str) -> str | None:
    if is_unsafe(member.name):
        return "unsafe path"
    if not member.isreg() or member.issparse():
        return "not a regular file"
    if (suffix in CAPTION_SUFFIXES or suffix == ".json") and member.size > MAX_CAPTION_BYTES:
        return f"the member has {member.size} bytes; at most {MAX_CAPTION_BYTES} are read"
    return None


def _sample(label: str, shard: Path, file: BinaryIO, members: Mapping[str, tarfile.TarInfo]) -> Rows:
    """The pictures of one sample; members of other kinds (pickles among them) are never read."""

    def content(suffix: str) -> bytes:
        file.seek(members[suffix].offset_data)
        return file.read(members[suffix].size)

    pictures = [member for suffix, member in members.items() if suffix in PICTURE_SUFFIXES]
    text = next((suffix for suffix in CAPTION_SUFFIXES if suffix in members), None)
    if not pictures:
        for suffix, member in members.items():
            if suffix in CAPTION_SUFFIXES or (
                suffix == ".json" and caption_column(json_object(content(suffix)) or {})
            ):
                reason = "missing image file beside this caption"
            elif suffix.endswith((*PICTURE_SUFFIXES, *CAPTION_SUFFIXES)):
                reason = f"a sample's name ends at its first dot, and {suffix} is no suffix of a picture"
            else:
                continue
            yield BadSample(printable(f"{label}/{member.name}"), reason)
            break  # one a sample
        return
    for picture in pictures:
        key = f"{label}/{picture.name}"
        try:
            record: dict[str, Any] = {}
            if ".json" in members:
                parsed = json_object(content(".json"))
                if parsed is None:
                    raise Rejected("the .json member is not a JSON object")
                record = parsed
            column = caption_column(record)
            captions = record.pop(column) if column is not None else None
            if text is not None:
                captions = captions_of_text(content(text))
            elif column is None:
                raise Rejected("no caption: the sample has no .txt, .caption or .json with a caption")
            yield checked_row(key, captions, record, str(shard), picture.size, picture.offset_data)
        except Rejected as error:
            yield BadSample(printable(key), str(error))
