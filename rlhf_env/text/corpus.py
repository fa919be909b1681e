"""A built-in corpus: short film reviews from a small grammar, good, bad, mixed and indifferent in equal parts."""

from __future__ import annotations

import itertools
import random
import re
from functools import cache
from typing import TypeVar

BUILT_IN_REVIEWS = "builtin:reviews"  # what a file of texts, or of prompts, is called that is this corpus

_T = TypeVar("_T")
_SIZE = 4000

_WORDS = {
    "thing": (
        "film movie story plot acting cast script dialogue music ending pacing direction opening soundtrack"
    ).split(),
    "very": "very really quite rather so".split(),
    "person": ["lead actor", "young actress", "whole cast", "older brother", "new director", "quiet teacher"],
    "topic": [
        "a small town",
        "a family by the sea",
        "two sisters",
        "an old detective",
        "a long journey",
        "a teacher and her class",
        "a summer in the city",
        "a dog that talks",
        "the last day of school",
        "a band on the road",
    ],
    "time": ["last night", "on sunday", "with my sister", "at home", "in a full theater"],
    "where": ["on the train", "near the end", "in the kitchen", "at the station", "under the bridge"],
    "kind": ["film", "movie", "story", "drama", "picture"],
    "good adjective": (
        "good great wonderful brilliant charming funny beautiful delightful clever strong enjoyable entertaining "
        "excellent lovely fun warm smart fresh perfect honest exciting amusing impressive gentle sweet"
    ).split(),
    "bad adjective": (
        "bad awful terrible boring dull weak stupid ugly horrible poor annoying disappointing lame sad messy lazy "
        "painful pathetic ridiculous dreadful empty confusing fake miserable forced"
    ).split(),
    "plain adjective": "long short quiet simple old familiar slow loud ordinary different modern plain".split(),
    "good verb": ["loved", "enjoyed", "liked", "admired"],
    "bad verb": ["hated", "disliked", "resented", "regretted"],
    "plain verb": ["noticed", "followed", "remembered", "watched"],
}

# What a review begins with, and how it may go on. A feeling comes only after the beginning.
_PATTERNS = [
    ("the {thing} is", " {very} {adjective1}."),
    ("the {thing} is", " {adjective1} {link} the {thing} is {adjective2}."),
    ("i thought the {thing} was", " {very} {adjective1}."),
    ("i thought the {thing} was", " {adjective1}, {link} the {thing} was {very} {adjective2}."),
    ("to me the {thing} felt", " {adjective1} {link} {very} {adjective2}."),
    ("it is", " a {adjective1} {kind} about {topic}, {link} the {thing} is {adjective2}."),
    ("this is", " a {adjective1} {kind} with a {adjective2} ending."),
    ("we watched it {time}", " and i {verb1} the {thing}."),
    ("i watched it {time}", " and {verb1} the {thing}, {link} i {verb2} the {thing}."),
    ("the {person} gives", " a {adjective1} performance in a {adjective2} {kind}."),
    ("for an hour the {thing} is", " {adjective1}, {link} then it becomes {adjective2}."),
    ("there is a scene {where}", " that is {very} {adjective1}, {link} the rest is {adjective2}."),
]
_MOODS = [("good", "good"), ("bad", "bad"), ("good", "bad"), ("bad", "good"), ("plain", "plain")]


@cache
def _film_reviews() -> tuple[str, ...]:
    rng, reviews = random.Random(0), {}
    while len(reviews) < _SIZE:
        opening, rest = _pick(rng, _PATTERNS)
        reviews[_fill(rng, opening + rest, _pick(rng, _MOODS))] = None
    return tuple(reviews)


def film_reviews() -> list[str]:
    """4,000 distinct one-sentence reviews in lower case, always the same ones in the same mixed order."""
    return list(_film_reviews())


def review_openings() -> list[str]:
    """79 distinct neutral beginnings of the reviews, to be used as prompts."""
    openings: dict[str, None] = {}
    for opening, _ in _PATTERNS:
        slots = re.findall(r"{(\w+)}", opening)
        for words in itertools.product(*(_WORDS[slot] for slot in slots)):
            openings[opening.format(**dict(zip(slots, words, strict=True)))] = None
    return list(openings)


def _fill(rng: random.Random, pattern: str, mood: tuple[str, str]) -> str:
    used: set[str] = set()

    def word(match: re.Match[str]) -> str:
        slot, number = match.groups()
        if slot == "link":
            return "and" if mood[0] == mood[1] else "but"
        options = _WORDS[f"{mood[int(number) - 1]} {slot}" if number else slot]
        choice = _pick(rng, [option for option in options if option not in used])
        used.add(choice)
        return choice

    return re.sub(r"\ba (?=[aeiou]|honest)", "an ", re.sub(r"{(\w+?)(\d?)}", word, pattern))


def _pick(rng: random.Random, options: list[_T]) -> _T:
    # Python promises the sequence of random() for all versions, but not that of choice().
    return options[int(rng.random() * len(options))]
