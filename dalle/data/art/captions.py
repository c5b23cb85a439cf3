"""The words of the emoji set: noun phrases for what is shown, object keys, measured colours, captions."""

import hashlib
import re
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from dalle.data.art.names import Emoji, split_tone
from dalle.data.art.packages import Style

_MASS_NOUNS = frozenset(
    """
    bread rice fog ice milk butter salt cheese honey bacon sushi tofu meat cloud-computing water luggage
    baggage customs money yarn thread broccoli garlic popcorn oden dango ramen spaghetti tempura sake tea
    coffee coal soap jewelry lipstick hail snow lightning baseball badminton golf softball bowling karate
    judo wrestling mail fire currency skateboarding foggy cooking camping tennis wood hockey lacrosse pong
    information maracas men women people children feet teeth mice geese
    """.split()
)
_NO_PLURAL = re.compile(
    r"(ss|us|is|as|'s|os|lens|series|bus|gas|chess|canvas|compass|tennis|hibiscus|lotus|octopus|cactus|walrus|glass)$"
)
_PREPOSITIONS = "with|in|of|on|and|holding|facing|wearing|behind|without|over|for|at|to|from"
_PROPER_NAMES = re.compile(
    "Japan|Moai|Christmas|French|European|Mah|ATM|CD|DVD|DNA|ID|P |T-|Sagitt|Easter|Great"
)
# Names that no rule turns into a noun phrase.
_PHRASES = {
    "breast-feeding": "a woman breast-feeding",
    "dashing away": "a dash cloud",
    "dizzy": "dizzy stars",
    "four leaf clover": "a four leaf clover",
    "high voltage": "a high voltage sign",
    "horse racing": "a horse race",
    "locked": "a closed padlock",
    "locked with key": "a closed padlock with a key",
    "locked with pen": "a closed padlock with a pen",
    "milky way": "the milky way",
    "mount fuji": "Mount Fuji",
    "palms up together": "palms up together",
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "skis": "skis",
    "star-struck": "a star-struck face",
    "unlocked": "an open padlock",
}
# Category words of the Unicode subgroups, where they say more than the name does.
_CATEGORIES = {
    "face-smiling": "smiling face",
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-bug": "bug",
    "animal-marine": "sea animal",
    "animal-reptile": "reptile",
    "animal-amphibian": "amphibian",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "food",
    "food-asian": "asian food",
    "food-sweet": "sweet",
    "place-map": "map",
    "place-geographic": "landscape",
    "place-building": "place",
    "place-religious": "religious place",
    "place-other": "place",
    "transport-ground": "vehicle",
    "transport-water": "boat",
    "transport-air": "aircraft",
    "time": "clock",
    "sky-weather": "sky and weather",
    "event": "celebration",
    "award-medal": "medal",
    "arts-crafts": "arts and crafts",
    "musical-instrument": "musical instrument",
    "light-video": "light and video",
    "book-paper": "book and paper",
    "other-object": "object",
    "transport-sign": "sign",
    "religion": "religious symbol",
    "zodiac": "zodiac sign",
    "av-symbol": "media button",
    "gender": "gender symbol",
    "math": "math symbol",
    "alphanum": "button",
    "geometric": "shape",
    "country-flag": "country flag",
    "subdivision-flag": "flag",
    "person-role": "profession",
    "person-fantasy": "fantasy character",
    "person-activity": "activity",
    "person-sport": "sport",
    "body-parts": "body part",
    "cat-face": "cat face",
    "monkey-face": "monkey",
    "face-costume": "costume face",
    "face-negative": "face",
    "face-concerned": "worried face",
    "face-neutral-skeptical": "neutral face",
    "face-unwell": "sick face",
    "face-sleepy": "sleepy face",
    "face-hat": "face with a hat",
    "face-glasses": "face with glasses",
    "face-affection": "loving face",
    "face-tongue": "face with tongue",
    "face-hand": "face with a hand",
} | {
    word: word
    for word in (
        "drink dishware hotel sport game clothing sound music phone computer money mail writing office lock "
        "tool science medical household warning arrow punctuation currency keycap flag hands person family "
        "emotion heart"
    ).split()
}
_COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (252, 205, 60),
    "green": (80, 165, 60),
    "teal": (40, 165, 160),
    "blue": (60, 130, 215),
    "light blue": (150, 205, 240),
    "purple": (135, 80, 180),
    "pink": (240, 130, 170),
    "brown": (130, 85, 50),
    "black": (25, 25, 25),
    "gray": (140, 145, 150),
    "white": (252, 252, 252),
    "beige": (240, 210, 170),
    "dark blue": (35, 60, 110),
}


def add_article(phrase: str) -> str:
    """Put `a` or `an` before a noun phrase where English wants one: `an apple`, but `bread`."""
    if not phrase or re.match("(a|an|the|two|three|four|five|some|my) ", phrase):
        return phrase
    before = re.match(rf"^(.+?) (?:{_PREPOSITIONS})\b", phrase)  # the head noun stands before a preposition
    head = (before[1] if before else phrase).split()[-1].lower()
    is_person = re.match("(person|man|woman) ", phrase) is not None
    if head in _MASS_NOUNS or (not is_person and head.endswith("s") and not _NO_PLURAL.search(head)):
        return phrase
    if re.match("(people|men|women) ", phrase):
        return phrase
    if re.match("(hour|honest|heir|x-)", phrase.lower()):
        return "an " + phrase
    if re.match("(uni|use|eu|ewe|one|once|u[- ])", phrase.lower()):
        return "a " + phrase
    spelled_out = re.match("(SOS|NG|M |X)", phrase)
    return ("an " if phrase[0].lower() in "aeiou" or spelled_out else "a ") + phrase


def _join(nouns: Sequence[str]) -> str:
    phrases = [add_article(noun) for noun in nouns]
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def object_phrase(emoji: Emoji) -> str:
    """Return a natural noun phrase for a CLDR short name: `person: beard` -> `a person with a beard`."""
    name, tones = split_tone(emoji.label)
    name = re.sub("[“”]", '"', name).replace("’", "'")
    if len(name) < 2:
        return f"a swatch of {emoji.label}" if "tone" in emoji.label else f"the symbol {emoji.label}"
    phrase = _phrase_of(name, emoji)
    if tones:
        phrase += f" with {' and '.join(dict.fromkeys(tones))} skin"
    return phrase


def _phrase_of(name: str, emoji: Emoji) -> str:
    kind, _, rest = name.partition(": ")
    if rest and kind == "flag":
        return "the flag of " + re.sub("^The ", "the ", rest)
    if rest and kind == "keycap":
        return "a keycap with " + {"#": "a hash sign", "*": "an asterisk"}.get(rest, f"the number {rest}")
    if rest and kind == "family":
        return f"a family of {_join(rest.split(', '))}"
    if rest and kind == "couple with heart":
        return f"a couple with a heart, {_join(rest.split(', '))}"
    if rest and kind == "kiss":
        return f"{_join(rest.split(', '))} kissing"
    if rest and kind in ("man", "woman", "person"):
        return f"a {kind} " + {"beard": "with a beard", "bald": "who is bald"}.get(rest, f"with {rest}")
    if emoji.subgroup == "zodiac":
        return f"the zodiac sign {name}"
    if name.startswith("input "):
        return f"the {name} symbol"
    if "o'clock" in name or "thirty" in name:
        return f"a clock showing {name}"
    if name.startswith("regional indicator "):
        return f"the letter {name[-1]}"
    name = re.sub(r"\s*\(.*?\)", "", name) or name
    name = name.replace(": facing ", ", facing ")
    if name in _PHRASES:
        return _PHRASES[name]
    if (emoji.subgroup == "math" and " " not in name) or name in ("radioactive", "biohazard", "prohibited"):
        return f"the {name} sign"
    if name == "restroom" or re.match("no [a-z-]+$", name):
        return f"a {name} sign"
    if re.match("(Tokyo|Statue)", name):
        return f"the {name}"
    if re.match("(Mount|Santa|Mrs|Mx) ?", name):
        return name
    keeps_case = emoji.group in ("flags", "symbols") or _PROPER_NAMES.match(name) or name[:2].isupper()
    return add_article(name if keeps_case else name[0].lower() + name[1:])


_SAME_OBJECTS = {
    "prince": "person with crown",
    "princess": "person with crown",
    "old person": "older person",
    "merman": "merperson",
    "mermaid": "merperson",
    "mrs. claus": "santa claus",
    "mx claus": "santa claus",
    "person and person holding hands": "people holding hands",
}


def object_key(label: str, labels: Collection[str]) -> str:
    """Return the key of an object: one for all gender variants of a label without skin tone.

    `man cook`, `woman cook` and `cook` are one object, so that a held-out cook was seen in no variant.
    """
    key = label.replace("’", "'")
    for word, neutral in (("(?:wo)?man", "person"), ("(?:wo)?men", "people"), ("boy|girl", "child")):
        key = re.sub(rf"\b(?:{word})\b(?!')", neutral, key)
    key = re.sub("^(kiss|couple with heart): .*", r"\1", key)
    key = re.sub(": facing (right|left)$", "", key)  # a mirror image
    if key.startswith("family: "):
        key = key.replace("adult", "person")
    if key.startswith(("person ", "people ")) and (neutral := key.partition(" ")[2]) in labels:
        key = neutral
    return _SAME_OBJECTS.get(key.lower(), key.lower())


def gender_of(label: str) -> str | None:
    """Return `female`, `male`, `mixed` or `neutral` for people, None for the rest."""
    words = set(re.findall("[a-z']+", label.lower()))
    female = words & set(
        "woman women girl mother princess queen bride grandma lady mrs female ballerina".split()
    )
    male = words & set("man men boy father prince king groom grandpa sir male santa".split())
    if female and male:
        return "mixed"
    if female or male:
        return "female" if female else "male"
    return "neutral" if words & set("person people child adult baby older".split()) else None


def measure_colours(pixels: npt.NDArray[np.uint8]) -> list[str]:
    """Return up to three colour words for the ink of a picture (H, W, 3), by nearest colour in CIE Lab."""
    sample = pixels[2::4, 2::4].reshape(-1, 3)  # (P, 3)
    ink = sample[sample.min(axis=1) < 235]
    if len(ink) < 4:
        return ["white"]
    palette = to_lab(np.array(list(_COLOURS.values())))
    nearest = ((to_lab(ink)[:, None] - palette[None]) ** 2).sum(axis=2).argmin(axis=1)  # (P,)
    share = np.bincount(nearest, minlength=len(palette)) / len(ink)
    order = np.argsort(-share, kind="stable")[:3]
    return [list(_COLOURS)[i] for i in order if share[i] > 0.15]


def to_lab(rgb: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Return sRGB in 0..255, (P, 3), as CIE Lab under D65."""
    linear = rgb / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / np.array([0.9505, 1, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def _an(word: str) -> str:
    return ("an " if word[0] in "aeio" else "a ") + word


def make_captions(emoji: Emoji, style: Style, colours: Sequence[str], name: str) -> list[str]:
    """Return three to six captions of different forms; the first is the primary `PHRASE, STYLE style`.

    Which of the equal variants a picture gets hangs on its style and file name alone.
    """
    phrase = object_phrase(emoji)

    def draw_lot(tag: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{tag}/{style.name}/{name}".encode()).digest()[:8], "big")

    def pick(tag: str, options: Sequence[str]) -> str:
        return options[draw_lot(tag) % len(options)]

    word = pick("word", style.words)
    captions = [f"{phrase}, {style.words[0]} style", f"an emoji of {phrase} in {word} style"]
    forms = [
        f"{phrase} drawn as {_an(word)} emoji",
        f"{_an(word)} emoji of {phrase}",
        f"{_an(word)} style picture of {phrase}",
        f"{phrase} in the style of {word} emoji",
    ]
    captions.append(pick("form", forms))
    keywords = [
        k
        for k in emoji.keywords
        if k.lower() not in phrase.lower() and re.fullmatch("[a-z][a-z' -]{2,20}", k.lower())
    ]
    if keywords:
        keywords = sorted(keywords, key=lambda k: draw_lot(f"keyword {k}"))[: (1, 2, 2, 3)[draw_lot("n") % 4]]
        listed = ", ".join(keywords)
        forms = [
            f"an emoji of {phrase}, {listed}, {word} style",
            f"{listed}: {phrase}, {word} style",
            f"{_an(word)} emoji meaning {' and '.join(keywords[:2])}: {phrase}",
        ]
        captions.append(pick("keywords", forms))
    category = _CATEGORIES.get(emoji.subgroup or "")
    if category is not None:
        forms = [f"{phrase}, {_an(category)} emoji, {word} style", f"{_an(word)} {category} emoji: {phrase}"]
        captions.append(pick("category", forms))
    if not style.is_colour:
        captions.append(f"a black and white drawing of {phrase}, {word} style")
    elif colours and not phrase.startswith("the "):
        forms = [f"{phrase}, mostly {colours[0]}, {word} style", f"{_an(word)} emoji of {phrase} in "]
        forms[1] += " and ".join(colours[:2])
        captions.append(pick("colours", forms))
    return list(dict.fromkeys(captions))
