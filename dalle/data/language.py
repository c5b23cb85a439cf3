"""Which language a caption is written in: by its script, then by a vote of its function words.

Source: paper App. C drops captions that are not English by cld3 (github.com/google/cld3). differs: cld3's network is no
dependency of ours; a caption in which no language has a say is left undecided.
"""

import re
import unicodedata
from collections import Counter

MAX_FOREIGN_SHARE = 0.2  # of the letters, in another script than Latin
MIN_VOTES = 2  # of another language, and more than English has

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")

# Frequent words; one of several languages votes for all of them, but one that English has as well for English alone.
FUNCTION_WORDS = {
    "en": (
        "the a an of and in on with to for from by at is are was were it its this that these those his her their he she "
        "they as or no not be has have so we you which while near over under into next behind front"
    ),
    "de": (
        "der die das den dem des ein eine einen einem einer eines und ist sind war auf mit für von zu im am beim nicht auch "
        "sich vor nach über unter zwischen neben einigen sein ihre oder aus wie bei zum zur"
    ),
    "fr": (
        "le la les un une des du de et est sont dans sur avec pour par au aux sous qui que ne pas ce cette ces son sa ses "
        "leur en devant derrière près d'un d'une l'eau"
    ),
    "es": (
        "el la los las un una unos unas de del y es son en con por para sobre al que se su sus como más está están entre "
        "bajo junto frente"
    ),
    "it": (
        "il lo la gli le un una uno di del della dei delle degli e è sono in nel nella con per su sul sulla al alla che si "
        "come da dal accanto sotto sopra"
    ),
    "pt": (
        "o os as um uma uns umas de do da dos das e é são em no na nos nas com por para sobre ao que se seu sua como está "
        "entre sob ao lado"
    ),
    "nl": (
        "de het een en van op in met voor aan is zijn was naar bij onder over door uit niet ook zich deze dit die tussen "
        "naast hun haar staat zit"
    ),
    "sv": "en ett och är på med för av till som den det från vid under över mellan inte sig sin sitt har framför bredvid",
    "da": "en et og er på med for af til som den det fra ved under over mellem ikke sig sin har foran",
    "no": "en et og er på med for av til som den det fra ved under over mellom ikke seg sin har foran",
    "pl": "i w na z do od po jest są nie się przy pod nad przed obok jego jej oraz dla który która",
    "cs": "a v na s z do od po je jsou není se při pod nad před vedle jeho její pro který která",
    "fi": "ja on ovat ei se että kanssa alla päällä edessä vieressä jossa joka mukana sekä oli",
    "tr": "ve bir bu şu ile için olan üzerinde altında yanında önünde gibi çok daha değil var",
    "id": "yang dan di ke dari dengan untuk pada ini itu adalah sebuah seorang di atas bawah dalam",
    "vi": "của và là trong trên với một những các cho được người này đó bên dưới",
    "hu": "a az egy és van vannak nem is alatt fölött mellett előtt között hogy aki ami",
    "ro": "și un o este sunt în pe cu pentru din la de care sub lângă între nu se",
}
ENGLISH = frozenset(FUNCTION_WORDS["en"].split())
OTHERS = {code: frozenset(words.split()) - ENGLISH for code, words in FUNCTION_WORDS.items() if code != "en"}
SCRIPTS = {"CYRILLIC": "ru", "GREEK": "el", "HEBREW": "he", "ARABIC": "ar", "DEVANAGARI": "hi", "THAI": "th"}
SCRIPTS |= {"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko"}


def language_of(caption: str) -> str | None:
    """The ISO 639-1 code of a caption's language, "und" in a script that is not listed; None: undecided."""
    letters = [letter for letter in caption if letter.isalpha()]
    foreign = Counter(script for letter in letters if (script := _script(letter)) != "LATIN")
    if letters and sum(foreign.values()) > MAX_FOREIGN_SHARE * len(letters):
        kana = next((script for script in ("HIRAGANA", "KATAKANA") if script in foreign), None)
        return SCRIPTS.get(kana or foreign.most_common(1)[0][0], "und")
    words = WORD.findall(caption.lower())
    english = sum(word in ENGLISH for word in words)
    votes = {language: sum(word in known for word in words) for language, known in OTHERS.items()}
    best = max(votes, key=lambda language: votes[language])
    if votes[best] >= MIN_VOTES and votes[best] > english:
        return best
    return "en" if english else None


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0]
