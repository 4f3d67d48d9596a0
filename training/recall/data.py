"""Text the recall model is trained on: a list of codes, then questions about them.

One sample reads like this (`<s>` and `</s>` are the tokenizer's begin and end tokens)::

    <s>Codes: heron 471, maple 902, birch 118. Code of maple?
    maple 902</s>

Every name stands at most once in a list, so exactly one answer is right and it stands in the prompt.
The answer says the name again because the code stands right after it in the list: finding what followed
the current token earlier is learned far sooner than finding what followed a token some way back.
"""

import random
from dataclasses import dataclass

NAME_LIST = """
acorn amber anchor apple apron arrow badge bagel banjo barn basil basket beach bean bear beetle bell
bench birch bird boat bone book boot bottle bowl branch bread brick bridge brush bucket button cabin
cable cactus cake camel candle canoe canyon carrot castle cedar chair cherry circle clay cliff clock
cloud clover coast cobra comet copper coral cotton crane crow crown daisy delta desert dolphin donkey
door dragon drum eagle ember engine falcon feather fern ferry fiddle field finch flint flute forest
fossil fox frost garden ginger glacier glove goose granite grape hammer harbor hawk hazel heron hill
honey horse island ivory jacket jasmine jungle kettle kite ladder lake lamp lantern leaf lemon lily
lion lizard magnet maple marble meadow melon mirror moon moss mountain needle nest oak oasis ocean
olive onion orchid otter owl paddle panda paper parrot peach pearl pebble pencil pepper piano pigeon
pine planet plum pond poppy prairie quartz rabbit raven reef ribbon river robin rocket rose saddle
salmon sand shell silver sparrow spider spoon spruce star stone sugar sunset swan table temple thunder
tiger timber tower train tulip tunnel turtle valley velvet violin walnut water whale willow window wolf
"""
NAMES = NAME_LIST.split()

DIGITS_PER_CODE = 3
WORDINGS = ("Code of {}?", "What is the code of {}?", "{}?")


@dataclass(frozen=True)
class Sample:
    """A conversation over one list: the text before each answer, and the answers."""

    prompts: list[str]
    answers: list[str]


def make_sample(rng: random.Random, facts: int, questions: int, wording: str, newline: bool) -> Sample:
    """Draw a list of `facts` codes and ask `questions` times for one of them in that wording.

    A name may be asked for again: were each asked once, leaving out the codes already given would do
    for half of the answers, and the model would settle on that instead of looking the name up.

    The first prompt holds the list and the first question, separated by a newline (as where the list
    is the system message) or by a space (as where both stand in one user message).
    """
    names = rng.sample(NAMES, facts)
    codes = ["".join(rng.choices("0123456789", k=DIGITS_PER_CODE)) for _ in names]
    listing = ", ".join(f"{name} {code}" for name, code in zip(names, codes, strict=True))
    asked = rng.choices(range(facts), k=questions)
    prompts = [wording.format(names[i]) for i in asked]
    prompts[0] = f"Codes: {listing}." + ("\n" if newline else " ") + prompts[0]
    return Sample(prompts=prompts, answers=[f"{names[i]} {codes[i]}" for i in asked])
