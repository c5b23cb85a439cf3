"""From the file name of an emoji picture to its code points and its Unicode CLDR name, keywords and group.

The packages name one emoji in a dozen spellings (`1f34e`, `red-apple`, `apple-1`, `redapple`). They are
resolved through the names and short codes of emojibase, the name tables of the icon packages, and a list made
by hand.
"""

import functools
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # emojibase numbers them 1 to 5
_CHARS_PACKAGES = ("noto", "twemoji", "fluent-emoji-flat", "fluent-emoji-high-contrast")
_SHARED_CHARS = {
    "fluent-emoji": "fluent-emoji-flat"
}  # this package has no name table; the names are the same
_DIGITS = "zero one two three four five six seven eight nine".split()
# Python's Unicode names grow with each release; later emoji are left out so that every Python resolves alike.
_LAST_UNICODE = 14.0
# `1f34e`, `23-fe0f-20e3`, but not the words `face` and `3d`.
_CODE_POINTS = re.compile(r"(?=.*\d)(?=.{4})[0-9a-f]{2,6}([-_][0-9a-f]{2,6})*", re.IGNORECASE)


@dataclass(frozen=True)
class Emoji:
    """What Unicode says about one emoji."""

    key: str  # code points in upper-case hex without FE0F, e.g. "1F44B-1F3FB"
    codepoints: str | None  # the same, fully qualified; None for pictures that are no emoji
    label: str  # CLDR short name, e.g. "waving hand: light skin tone"
    keywords: tuple[str, ...] = ()
    group: str | None = None
    subgroup: str | None = None
    tones: tuple[int, ...] = ()  # 1 to 5
    base_label: str = ""  # the label without skin tone
    unicode_version: float = 0.0  # of the Emoji standard that brought it


def code_key(codepoints: str) -> str:
    """Return code points in one spelling: `1f44b_fe0f` -> `1F44B`."""
    parts = [part.lstrip("0") or "0" for part in re.split("[-_ ]", codepoints.upper())]
    return "-".join(part for part in parts if part != "FE0F")


def slug(name: str) -> str:
    """Return a name in lower-case ASCII words joined by hyphens."""
    name = re.sub("[’'“”!]", "", name.lower().replace("&", " and "))
    name = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return re.sub("[^a-z0-9]+", "-", name).strip("-")


def _compact(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def split_tone(label: str) -> tuple[str, list[str]]:
    """Split a label into the label without skin tones and the tone words, in order."""
    tones = re.findall(r"(medium-light|medium-dark|light|medium|dark) skin tone", label)
    base = re.sub(r",? ?(medium-light|medium-dark|light|medium|dark) skin tone", "", label)
    base = re.sub(r":\s*,\s*", ": ", base)
    return re.sub(r"[:,]\s*$", "", base).strip(), tones


class EmojiNames:
    """The emoji of emojibase, and the resolving of file names to them."""

    def __init__(self, npm_folder: Path) -> None:
        """Read the name tables of a node_modules folder that holds the pinned packages."""
        folder = npm_folder / "emojibase-data" / "en"
        self.emoji = _read_emojibase(folder)
        self._by_tone = {(e.base_label, e.tones): key for key, e in self.emoji.items() if e.tones}
        self._chars = {
            name: _read_chars(npm_folder / "@iconify-json" / name / "chars.json") for name in _CHARS_PACKAGES
        }
        self._by_name = {slug(e.label): key for key, e in reversed(self.emoji.items())}  # the first one wins
        for chars in self._chars.values():
            for name, keys in chars.items():
                self._by_name.setdefault(name, keys[0])
        self._by_short_code = _read_short_codes(folder / "shortcodes")
        self._by_compact: dict[str, str] = {}
        for table in (self._by_name, self._by_short_code, _unicode_names(self.emoji)):
            for name, key in table.items():
                if key in self.emoji:
                    self._by_compact.setdefault(_compact(name), key)

    @functools.cached_property
    def labels(self) -> frozenset[str]:
        """All CLDR short names."""
        return frozenset(e.label for e in self.emoji.values())

    def find(self, name: str, style: str) -> Emoji | None:
        """Return the emoji that a picture of this file name in this style shows, or None."""
        if style == "fxemoji" and name in _FXEMOJI:
            return self.emoji.get(_FXEMOJI[name])
        key = self._find_key(name, style)
        return self.emoji.get(key) if key is not None else None

    def _find_key(self, name: str, style: str) -> str | None:
        if name in _SPELLINGS:
            return _SPELLINGS[name]
        for key in self._chars.get(_SHARED_CHARS.get(style, style), {}).get(name, ()):
            if key in self.emoji:
                return key
        if re.fullmatch(_CODE_POINTS, name):
            for key in (code_key(name), f"{code_key(name)}-E007F"):  # some flags lack their end tag
                if key in self.emoji:
                    return key
        digit = re.fullmatch(r"(?:digit-)?(\w+)", name)
        if digit and digit[1] in _DIGITS and name.startswith("digit-"):
            return f"3{_DIGITS.index(digit[1])}-20E3"
        if re.fullmatch("[0-9]", name):
            return f"3{name}-20E3"
        # The first group gives way, so that the tone of `hand-medium-dark` is not `dark`.
        toned = re.fullmatch(r"(.*?)-(medium-light|medium-dark|light|medium|dark)(?:-skin-tone)?", name)
        if toned and (base := self._find_key(toned[1], style)) in self.emoji:
            assert base is not None
            key = self._by_tone.get((self.emoji[base].base_label, (TONES.index(toned[2]) + 1,)), "")
            if key:
                return key
        return self._find_spelling(name)

    def _find_spelling(self, name: str) -> str | None:
        spellings = [name]
        if flag := re.fullmatch(r"flag-for-(?:flag-)?(.*)", name):
            spellings += ["flag-" + flag[1], flag[1], "flag-" + flag[1].replace("and-", "")]
        spellings.append(re.sub("^cat-face-", "cat-", name))
        if numbered := re.fullmatch(r"(.*[a-z])-?\d+", name):
            spellings.append(numbered[1])
        for table in (self._by_name, self._by_short_code):
            for spelling in spellings:
                if table.get(spelling) in self.emoji:
                    return table[spelling]
        for spelling in map(_compact, spellings):
            if spelling in self._by_compact:
                return self._by_compact[spelling]
            for word in ("face", "button", "sign", "symbol", "mark", "emoji"):
                key = self._by_compact.get(spelling + word)
                if key is None and spelling.endswith(word):
                    key = self._by_compact.get(spelling.removesuffix(word))
                if key is not None:
                    return key
        return None

    def describe(self, name: str, style: str) -> Emoji | None:
        """Return the emoji of a picture; else its file name as the label; None where that says nothing."""
        found = self.find(name, style)
        if found is not None:
            return found
        if re.fullmatch(_CODE_POINTS, name):
            return None  # an emoji that has no name
        label = re.sub(r" \d+$", "", name.replace("-", " ").replace("_", " "))
        if style == "fxemoji":
            label = self._words.split(name)
        label = re.sub(
            r" (medium light|medium dark|light|medium|dark) skin tone$",
            lambda m: f": {m[1].replace(' ', '-')} skin tone",
            label,
        )
        base, tones = split_tone(label)
        return Emoji(
            "name:" + _compact(label),
            None,
            label,
            tones=tuple(TONES.index(tone) + 1 for tone in tones),
            base_label=base,
        )

    @functools.cached_property
    def _words(self) -> "_WordSplitter":
        return _WordSplitter(self.emoji.values())


def read_openmoji(npm_folder: Path) -> dict[str, Emoji]:
    """Read OpenMoji's own list, which also names pictures that are no emoji; keys as `code_key`."""
    found: dict[str, Emoji] = {}
    for row in json.loads((npm_folder / "openmoji" / "data" / "openmoji.json").read_text(encoding="utf-8")):
        tags = [tag.strip() for tag in f"{row['tags']},{row['openmoji_tags']}".split(",")]
        base, tones = split_tone(row["annotation"])
        found[code_key(row["hexcode"])] = Emoji(
            code_key(row["hexcode"]),
            None if row["group"].startswith("extras") else row["hexcode"],
            row["annotation"],
            tuple(tag for tag in tags if tag),
            row["group"],
            row["subgroups"],
            tuple(TONES.index(tone) + 1 for tone in tones),
            base,
        )
    return found


def _read_emojibase(folder: Path) -> dict[str, Emoji]:
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    groups = {row["order"]: row["key"] for row in messages["groups"]}
    subgroups = {row["order"]: row["key"] for row in messages["subgroups"]}
    emoji: dict[str, Emoji] = {}
    for base in json.loads((folder / "data.json").read_text(encoding="utf-8")):
        for row in (base, *base.get("skins", ())):
            tone: Any = row.get("tone", [])
            emoji[code_key(row["hexcode"])] = Emoji(
                code_key(row["hexcode"]),
                row["hexcode"],
                row["label"],
                tuple(row.get("tags", base.get("tags", ()))),
                groups.get(row.get("group")),
                subgroups.get(row.get("subgroup")),
                tuple(tone) if isinstance(tone, list) else (tone,),
                base["label"],
                float(base["version"]),
            )
    return emoji


def _read_chars(path: Path) -> dict[str, list[str]]:
    """Read an icon package's table of code point -> name, turned round."""
    table: dict[str, list[str]] = defaultdict(list)
    for codepoints, name in json.loads(path.read_text(encoding="utf-8")).items():
        table[name].append(code_key(codepoints))
    return dict(table)


def _read_short_codes(folder: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        for codepoints, codes in json.loads(path.read_text(encoding="utf-8")).items():
            for code in [codes] if isinstance(codes, str) else codes:
                table.setdefault(slug(code), code_key(codepoints))
    return table


def _unicode_names(emoji: Mapping[str, Emoji]) -> dict[str, str]:
    """Return the formal Unicode names of single-character emoji, which fxemoji's file names follow."""
    single = {int(k, 16) for k, e in emoji.items() if "-" not in k and e.unicode_version <= _LAST_UNICODE}
    return {unicodedata.name(chr(c)): f"{c:X}" for c in sorted(single) if unicodedata.name(chr(c), "")}


class _WordSplitter:
    """Splits run-together words (`bookmarktab`) into the likeliest words of the emoji names."""

    def __init__(self, emoji: Iterable[Emoji]) -> None:
        counts: Counter[str] = Counter()
        for e in emoji:
            for word in re.findall("[a-z]+", e.label.lower()):
                counts[word] += 3  # names are surer than keywords
            for word in re.findall("[a-z]+", " ".join(e.keywords).lower()):
                counts[word] += 1
        counts.update(dict.fromkeys(_EXTRA_WORDS, 3))
        short = {"a", "of", "in", "on", "up", "to", "at", "no", "tv", "cd", "ok", "pc", "id", "by", "or"}
        counts = Counter({word: n for word, n in counts.items() if len(word) > 2 or word in short})
        total = sum(counts.values())
        self._costs = {word: -math.log(n / total) for word, n in counts.items()}

    def split(self, name: str) -> str:
        return " ".join(
            word
            for run in re.findall(r"[a-z]+|\d+", name.lower())
            for word in ([run] if run.isdigit() else self._split_run(run))
        )

    def _split_run(self, run: str) -> list[str]:
        """Return the cheapest split (Viterbi over end positions); an unknown piece costs 12 + 9 a letter."""
        best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first n letters, start of their last word
        for end in range(1, len(run) + 1):
            starts = range(max(0, end - 18), end)
            cost = {s: best[s][0] + self._costs.get(run[s:end], 12.0 + 9 * (end - s)) for s in starts}
            start = min(starts, key=cost.__getitem__)
            best.append((cost[start], start))
        words, end = [], len(run)
        while end:
            start = best[end][1]
            words.append(run[start:end])
            end = start
        return words[::-1]


_EXTRA_WORDS = """
icon printer folder fax page pages documents contact speaker modem cassette video button mouse pink wallet
stamped raised oclock thirty fox heart tear joy guapi mao smile tongue scream fear grin sweat negative squared
latin capital sideways index finger semicolon increase decrease font size three rays above below sleuth spy
muted fish eye script bold ballot cancellation cross pennant missing hard soft shell floppy touch tone
lightning mood bubble lower upper pencil minimize maximize ascend descend notched overlap portable ringing
storm cartridge networked computers waitress turned wired womans unified ideograph clockwise
""".split()


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


# Spellings that no table holds (streamline, fxemoji).
_SPELLINGS = _pairs(
    """
    aubergine 1F346 2hearts 1F495 anguish 1F627 aok 1F44C americasglobe 1F30E asiaaustraliaglobe 1F30F
    europeafricaglobe 1F30D babyangel 1F47C crazy-face 1F92A beermug 1F37A clinkingbeermugs 1F37B
    exclamation-mark 2757 monkeyhearnoevil 1F649 monkeyseenoevil 1F648 monkeyspeaknoevil 1F64A poo 1F4A9
    snowman 2603 ghost 1F47B robot 1F916 wineglass 1F377 cocktail 1F378 pizza 1F355
    man-in-suit-levitating 1F574 man-in-suit-levitating-light-skin-tone 1F574-1F3FB
    man-in-suit-levitating-medium-light-skin-tone 1F574-1F3FC
    man-in-suit-levitating-medium-skin-tone 1F574-1F3FD
    man-in-suit-levitating-medium-dark-skin-tone 1F574-1F3FE man-in-suit-levitating-dark-skin-tone 1F574-1F3FF
    """
)
# fxemoji's own names. Its `cat`, `dog`, `pig` and `mouse` are faces; whole animals are called `catside` ...
_FXEMOJI = _pairs(
    """
    cat 1F431 dog 1F436 pig 1F437 mouse 1F42D pigside 1F416 dogside 1F415 catside 1F408 mouseside 1F401
    bunnyside 1F407 leopardside 1F406 dragonside 1F409 dragonhead 1F432 chilipepper 1F336 confetti 1F38A
    evergreen 1F332 bolt 26A1 bride 1F470 bunny 1F430 cellphone 1F4F1 flexbicep 1F4AA heartblue 1F499
    heartgreen 1F49A heartpurple 1F49C heartyellow 1F49B heartarrow 1F498 gma 1F475 gpa 1F474 guyguy 1F46C
    girlgirl 1F46D girlguy 1F46B hampster 1F439 headmassage 1F486 heels 1F460 monkeyhear 1F649 monkeysee 1F648
    monkeyspeak 1F64A fishcakeswirl 1F365 grineyes 1F604 grinsquint 1F606 grinsweat 1F605 grintears 1F602
    grinwide 1F603 frown 1F641 kisseyes 1F619 kissclosedeyes 1F61A screamfear 1F631 present 1F381
    pigsnout 1F43D perservere 1F623 dissapointedrelief 1F625 construct 1F477 bowing 1F647 acorn 1F330
    banknotedollar 1F4B5 banknoteeuro 1F4B6 banknotepound 1F4B7 banknoteyen 1F4B4 bookmarktab 1F4D1
    bouquetofflowers 1F490 bullhorn 1F4E2 chartdownwardstrend 1F4C9 chartupwardstrend 1F4C8
    chartupwardstrendyen 1F4B9 chineseflag 1F1E8-1F1F3 franceflag 1F1EB-1F1F7 greatbritainflag 1F1EC-1F1E7
    italianflag 1F1EE-1F1F9 japanflag 1F1EF-1F1F5 koreaflag 1F1F0-1F1F7 spanishflag 1F1EA-1F1F8
    russiaflag 1F1F7-1F1FA russianflag 1F1F7-1F1FA usaflag 1F1FA-1F1F8 germanflag 1F1E9-1F1EA
    germanyflag 1F1E9-1F1EA fallingleaf 1F342 leaffluttering 1F343 forkknife 1F374 high5 1F64C handup 1F64B
    japaneseangrymask 1F479 leftmagnifyingglass 1F50D rightmagnifyingglass 1F50E lockandkey 1F510
    makeupbag 1F45D manltepiececlock 1F570 mantlepiececlock 1F570 mensrunner 1F45F mensshoe 1F45E
    mansshirt 1F454 nogesture 1F645 okgesture 1F646 handheldvideocamera 1F4F9 highspeedtrainbulletnose 1F685
    heavyexclaimationmarksymbol 2757 doubleexclaimationmark 203C exclaimationquestionmark 2049
    eightspokedasterix 2733 frontfacingchick 1F425 notebookdecorativecover 1F4D4 openmailboxraised 1F4EC
    openmailboxlowered 1F4ED closedmailboxraised 1F4EB closedmailboxlowered 1F4EA controlknob 1F39B
    controlknobs 1F39B diamondshapewithdotinside 1F4A0 envelopedownarrowabove 1F4E9 phonerightarrowleft 1F4F2
    pinkwallet 1F45B onebuttonmouse 1F5B1 printericon 1F5A8 opticaldiscicon 1F4BF blackquestionmark 2753
    potablewatersystem 1F6B0 sleuthspy 1F575 smiletongue 1F61B anguish 1F627 videocasette 1F4FC
    sunraincloud 1F326 downpointingsmallredtrisngle 1F53B uppointingsmallredtrisngle 1F53A
    whiteexclaimationmark 2755 toykotower 1F5FC silhouetteohjapan 1F5FE thoughtbaloon 1F4AD
    waningbibbousmoon 1F316 negativesquaredlatincaptiala 1F170 negativesquaredlatincaptialb 1F171
    negativesquaredlatincaptialo 1F17E saggitarius 2650 spurtingwhale 1F433 tennisball 1F3BE
    sixpointedstarwithdot 1F52F womansshirt 1F45A sandals 1F461 tigerside 1F405 smileeyes 1F60A
    sweatsplash 1F4A6 backwithleftwardsarrow 1F519 endwithleftwardsarrow 1F51A onarrowleftright 1F51B
    soonwithrightarrow 1F51C topwithupwardsarrow 1F51D blackpushpin 1F4CC
    """
    + "".join(f" clock{h}oclock {0x1F550 + h - 1:X} clock{h}thirty {0x1F55C + h - 1:X}" for h in range(1, 13))
)
