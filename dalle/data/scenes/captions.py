"""The captions of a scene: the same facts in several forms; the first is the plainest."""

import functools

from dalle.data.art.captions import add_article
from dalle.data.art.packages import STYLES
from dalle.data.scenes.objects import load_objects
from dalle.data.scenes.scene import OPPOSITE, Scene, Thing
from dalle.data.scenes.shapes import PLURALS

_WORDS = {style.name: style.words for style in STYLES}
_NUMBERS = ("zero", "one", "two", "three", "four")
_BESIDE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_PLACES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}


def make_captions(scene: Scene) -> list[str]:
    """Return three to five captions, each with every attribute; a changed attribute keeps their forms."""
    if scene.kind == "word":
        return _word_captions(scene)
    if scene.kind == "top_bottom":
        return _pair_captions(scene)
    if scene.kind == "ground":
        first = noun_phrase(scene.things[0])
        phrases = [
            f"{first} on {add_article(scene.ground)} background",
            f"{first} in front of {add_article(scene.ground)} background",
        ]
        return _in_style(phrases, "", scene)
    return _in_style(_phrases(scene), _on_ground(scene), scene)


@functools.cache
def _plurals() -> dict[str, str]:
    """Return the plurals of objects and shapes that are not noun + s."""
    return PLURALS | {obj.noun: obj.plural for obj in load_objects() if obj.plural is not None}


def noun_phrase(thing: Thing) -> str:
    """Return `a big red apple`."""
    return add_article(_noun(thing))


def _noun(thing: Thing) -> str:
    return " ".join(word for word in (thing.size, thing.color, thing.object) if word is not None)


def _on_ground(scene: Scene) -> str:
    return "" if scene.ground == "white" else f" on {add_article(scene.ground)} background"


def _phrases(scene: Scene) -> list[str]:
    """Return two or three noun phrases for what is shown."""
    thing = scene.things[0]
    first = noun_phrase(thing)
    if scene.kind == "count":
        number, noun = _NUMBERS[scene.count], _noun(thing)
        if scene.count > 1:
            noun = " ".join(w for w in (thing.color, _plurals().get(thing.object, thing.object + "s")) if w)
        return [f"{number} {noun}", f"exactly {number} {noun}"]
    if scene.kind == "position":
        assert scene.relation is not None
        relation, second = scene.relation, noun_phrase(scene.things[1])
        return [
            f"{first} {_BESIDE[relation]} {second}",
            f"{second} {_BESIDE[OPPOSITE[relation]]} {first}",
            f"{first} {_PLACES[relation]} and {second} {_PLACES[OPPOSITE[relation]]}",
        ]
    if len(scene.things) == 2:  # sizes
        second = noun_phrase(scene.things[1])
        return [f"{first} and {second}", f"{second} beside {first}"]
    if scene.kind == "size":
        synonym = {"big": "large", "small": "tiny"}[str(thing.size)]
        return [first, add_article(_noun(thing).replace(str(thing.size), synonym, 1))]
    rest = " ".join(word for word in (thing.size, thing.object) if word is not None)
    return [first, f"{add_article(rest)} that is {thing.color}"]


def _in_style(phrases: list[str], ground: str, scene: Scene) -> list[str]:
    """Return the phrases with style and ground said in different places."""
    style = next((thing.style for thing in scene.things if thing.style is not None), None)
    if style is None:
        whole = [phrase + ground for phrase in phrases]
        return [*whole, f"a picture of {whole[0]}", f"{whole[0]}, plain shapes"]
    word, other = _WORDS[style]
    captions = [f"{phrase}{ground}, {word} style" for phrase in phrases]
    captions.append(f"an emoji of {phrases[0]}{ground} in {other} style")
    captions.append(phrases[0] + ground)
    return captions


def _word_captions(scene: Scene) -> list[str]:
    assert scene.word is not None and scene.color is not None
    ground, spelled = _on_ground(scene), " ".join(scene.word)
    letters = f"{scene.font} {scene.color} letters"
    return [
        f'the word "{scene.word}" in {letters}{ground}',
        f"the letters {spelled} in {scene.font} {scene.color}{ground}",
        f'{letters} that say "{scene.word}", spelled {spelled}{ground}',
        f'{add_article(scene.color)} word "{scene.word}" in {scene.font} letters{ground}',
    ]


def _pair_captions(scene: Scene) -> list[str]:
    top, bottom = (_WORDS[str(thing.style)] for thing in scene.things)
    thing, ground = scene.things[0].object, _on_ground(scene)
    return [
        f"the exact same {thing}, {top[0]} style on top, {bottom[0]} style on the bottom{ground}",
        f"the same {thing} twice{ground}: {top[1]} style above, {bottom[1]} style below",
        f"{add_article(thing)} in {top[0]} style on the top and the exact same {thing} in {bottom[0]} style "
        f"on the bottom{ground}",
    ]
