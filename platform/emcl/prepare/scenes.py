"""The sample set's scenes, with their captions and questions.

A scene is one object with an action, or two that interact. Nearly every scene has a twin that differs
only in temporal order (left to right / right to left, appears / disappears, towards / away from), so that a
model which ignores the order of frames cannot tell them apart.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from emcl.data.samples import QAPair

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
SIZES = ("small", "large")
BACKGROUNDS = ("striped", "checkered", "dotted", "cloudy")

SHAPE_WORDS = {"circle": ("circle", "disc"), "cross": ("cross", "plus")}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}

ACTIONS: dict[str, tuple[str, ...]] = {
    "moves right": ("moves left to right", "goes from the left to the right", "travels rightwards"),
    "moves left": ("moves right to left", "goes from the right to the left", "travels leftwards"),
    "moves up": ("moves up", "rises from the bottom to the top", "climbs upwards"),
    "moves down": ("moves down", "falls from the top to the bottom", "drops downwards"),
    "grows": ("grows", "gets bigger and bigger", "becomes larger"),
    "shrinks": ("shrinks", "gets smaller and smaller", "becomes smaller"),
    "appears": ("appears", "shows up out of nowhere", "comes into view and stays"),
    "disappears": ("disappears", "vanishes", "is there and then gone"),
    "turns clockwise": ("circles clockwise", "goes around clockwise", "makes a clockwise round"),
    "turns back": ("circles counterclockwise", "goes around counterclockwise", "makes a counterclockwise round"),
}
"""Action of one object -> its wordings in captions."""

INTERACTIONS: dict[str, tuple[str, ...]] = {
    "after": ("{a} appears after {b}", "first there is {b}, then {a} appears", "{b} is joined by {a}"),
    "before": ("{a} disappears before {b}", "{a} vanishes while {b} stays", "{b} stays alone when {a} is gone"),
    "towards": ("{a} moves towards {b}", "{a} comes close to {b}", "{a} approaches {b}"),
    "away": ("{a} moves away from {b}", "{a} leaves {b} behind", "{a} departs from {b}"),
    "around": ("{a} circles around {b}", "{a} orbits {b}", "{b} is circled by {a}"),
    "follows": ("{a} follows {b}", "{a} chases {b} from left to right", "{b} moves to the right and {a} follows"),
}
"""Interaction of two objects -> its wordings in captions."""

SIZELESS = ("grows", "shrinks")
"""Actions that change the size, so that naming one would be ambiguous."""


TWINS = (
    ("moves right", "moves left"),
    ("moves up", "moves down"),
    ("grows", "shrinks"),
    ("appears", "disappears"),
    ("turns clockwise", "turns back"),
    ("after", "before"),
    ("towards", "away"),
)
"""Actions that differ only in temporal order."""


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """What happens; everything else about a clip (texture, noise, position, speed) is random."""

    action: str
    a: Thing
    b: Thing | None = None


def single_scenes() -> list[Scene]:
    """All scenes of one object."""
    scenes = []
    for action, shape, colour in itertools.product(ACTIONS, SHAPES, COLOURS):
        sizes = (None,) if action in SIZELESS else SIZES
        scenes += [Scene(action, Thing(shape, colour, size)) for size in sizes]
    return scenes


def double_scenes() -> list[Scene]:
    """All scenes of two objects that differ in shape and in colour."""
    things = [Thing(shape, colour) for shape, colour in itertools.product(SHAPES, COLOURS)]
    pairs = [(a, b) for a, b in itertools.permutations(things, 2) if a.shape != b.shape and a.colour != b.colour]
    return [Scene(action, a, b) for action, (a, b) in itertools.product(INTERACTIONS, pairs)]


def families(scenes: list[Scene]) -> list[list[Scene]]:
    """Groups scenes with their twins, in the order of each group's first scene."""
    first_of = {action: pair[0] for pair in TWINS for action in pair}
    groups: dict[tuple[str, Thing, Thing | None], list[Scene]] = {}
    for scene in scenes:
        groups.setdefault((first_of.get(scene.action, scene.action), scene.a, scene.b), []).append(scene)
    return list(groups.values())


def captions(scene: Scene, rng: random.Random, count: int = 4) -> list[str]:
    """`count` different captions, each naming every attribute of the scene."""
    texts: list[str] = []
    while len(texts) < count:
        text = _caption(scene, rng)
        if text not in texts:
            texts.append(text)
    return texts


def _caption(scene: Scene, rng: random.Random) -> str:
    if scene.b is not None:
        phrase = rng.choice(INTERACTIONS[scene.action])
        text = phrase.format(a=_noun(scene.a, rng), b=_noun(scene.b, rng))
        return rng.choice(("{}", "{}", "in this video {}", "we see that {}")).format(text)
    subject, verb = _noun(scene.a, rng), rng.choice(ACTIONS[scene.action])
    frames = ("{s} {v}", "{s} {v}", "there is {s} that {v}", "in this video {s} {v}", "we see how {s} {v}")
    return rng.choice(frames).format(s=subject, v=verb)


def _noun(thing: Thing, rng: random.Random) -> str:
    words = [thing.colour, rng.choice(SHAPE_WORDS.get(thing.shape, (thing.shape,)))]
    if thing.size is not None:
        words.insert(0, rng.choice(SIZE_WORDS[thing.size]))
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def questions(scene: Scene, background: str) -> list[QAPair]:
    """Five or more questions with one-word answers."""
    a, b = scene.a, scene.b
    asked: list[tuple[str, Any]] = [("what does the background look like?", background)]
    if b is None:
        asked += [
            ("how many objects are there?", "one"),
            (f"what color is the {a.shape}?", a.colour),
            (f"what is the {a.colour} object?", a.shape),
            (f"what does the {a.shape} do?", scene.action.split()[0]),
        ]
        if a.size is not None:
            asked.append((f"how big is the {a.shape}?", a.size))
        if scene.action.startswith("moves"):
            asked.append((f"where does the {a.shape} move?", scene.action.split()[1]))
        return [{"question": question, "answer": answer} for question, answer in asked]
    asked += [
        ("how many objects are there?", "two"),
        (f"what color is the {a.shape}?", a.colour),
        (f"what color is the {b.shape}?", b.colour),
        (f"what is the {a.colour} object?", a.shape),
        (f"what is the {b.colour} object?", b.shape),
    ]
    if scene.action in ("after", "before"):
        first = {"after": b, "before": a}[scene.action]
        event = {"after": "is there first", "before": "disappears first"}[scene.action]
        asked.append((f"which object {event}?", first.shape))
    else:
        asked.append(("which object moves?", "both" if scene.action == "follows" else a.shape))
    return [{"question": question, "answer": answer} for question, answer in asked]
