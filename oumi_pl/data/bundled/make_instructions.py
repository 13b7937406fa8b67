"""Makes the quickstart's conversations: short instructions about words, in eight kinds.

    python -m oumi_pl.data.bundled.make_instructions

rewrites `instructions/train.jsonl` and `instructions/heldout.jsonl` beside this file, byte for byte the same each time.

A row asks for something to be done to a word: say it twice, put it in capitals, spell it, answer as a system turn asks,
recall a name from an earlier turn. Several phrasings ask for each kind of answer.

Training uses made-up words only ("brolu", "tasken"); the held-out questions use real English words, none of which is
a training word. So a held-out answer can be neither recalled nor guessed: every answer holds each letter of a word of
four letters or more that the model has never met, and the model has to compute it from the question. A model that
ignored the instruction would also fail, since each word fits every kind. The held-out score is therefore 0 % for an
untrained model, and stays there until the model has learned both to read the instruction and to carry a word over.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path

Message = dict[str, str]

TRAIN_ROWS = 4800
HELDOUT_ROWS = 240

# The words of the held-out questions; no training word is among them.
ENGLISH_WORDS = """
acorn amber angle apple april arrow autumn badge baker basil basket beach berry bird black blanket blue boat bottle
branch bread breeze brick bridge brook brown brush bucket butter button cabin cable camel candle carpet castle cedar
chair chalk cherry circle clock cloud clover coast cotton cousin crane cream crowd crown dance desert dinner dolphin
dragon dream eagle earth echo elbow ember engine falcon farmer feather fence field finger flame flute forest fountain
frost garden ginger glass globe gold grape grass green guitar hammer harbor harvest hazel heron hill honey horse
island ivory jacket jaguar jelly jungle kettle kitten knight ladder lake lamp lantern laurel leaf lemon linen lion
lizard maple marble market meadow melon mint mirror monkey moon morning mountain museum needle nest north nutmeg
ocean olive onion orange orchid otter oven owner oyster paint palace panda paper parrot peach pearl pebble pencil
pepper piano pillow pine planet plum pocket pond poplar potato prince pumpkin purple quartz queen quilt rabbit rain
raven ribbon rice river robin rocket rope rose ruby saddle salmon sand scarf school season shadow sheep shell ship
silver smoke snow soap sparrow spider spoon spring squirrel star stone storm stream street sugar summer sunset table
temple thunder tiger timber tomato tower trail train tulip tunnel turtle valley velvet village violet violin voyage
wagon walnut water wheat wheel willow window winter wolf wonder wood yellow zebra
""".split()

ONSETS = "b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gl gr pl pr qu sh sk sl sm sn sp st str th tr wh"
VOWELS = "a a e e i i o o u a e i o u ai ea ee oa oo ou"
CODAS = "b ck d f g k l ll m n nd ng nk p r rd rm rn s sh ss st t th tt v w x y z"


def made_up_word(rng: random.Random) -> str:
    """A word of four to eight letters that can be pronounced: "brolu", "tasken"."""
    while True:
        syllables = []
        for _ in range(rng.choice([1, 2, 2, 2, 3])):
            onset = rng.choice(ONSETS.split()) if rng.random() < 0.9 else ""
            coda = rng.choice(CODAS.split()) if rng.random() < 0.5 else ""
            syllables.append(onset + rng.choice(VOWELS.split()) + coda)
        word = "".join(syllables)
        if 4 <= len(word) <= 8:
            return word


def user(content: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    """A system turn."""
    return {"role": "system", "content": content}


# Phrasings of the kinds that are one question about one word, and the answer as a function of the word.
ONE_WORD: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "say": (lambda word: word, ["Say {}.", 'Repeat the word "{}".', "Please write {} for me."]),
    "twice": (
        lambda word: f"{word} {word}",
        ["Say {} twice.", 'Write "{}" two times.', "Please repeat {} two times."],
    ),
    "capitals": (
        str.upper,
        ['Write "{}" in capital letters.', "Say {} in capitals.", "Turn {} into upper case."],
    ),
    "spell": ("-".join, ["Spell {}.", 'Spell the word "{}".', "How do you spell {}?"]),
    "brackets": (lambda word: f"({word})", ["Put {} in brackets.", 'Write "{}" in brackets.']),
    "reverse": (lambda word: word[::-1], ["Reverse {}.", 'Write "{}" backwards.', "What is {} spelled backwards?"]),
}
SWAP = ["Swap {} and {}.", 'Change the order of "{} {}".', "Put {} after {}."]


def conversation(kind: str, words: list[str], rng: random.Random) -> list[Message]:
    """One conversation of a kind about the given words; `rng` picks the phrasing."""
    first, second = words
    if kind in ONE_WORD:
        answer, phrasings = ONE_WORD[kind]
        return [user(rng.choice(phrasings).format(first)), assistant(answer(first))]
    if kind == "swap":
        return [user(rng.choice(SWAP).format(first, second)), assistant(f"{second} {first}")]
    if kind == "system":
        order, style = rng.choice([("Answer in capital letters.", str.upper), ("Answer in brackets.", "({})".format)])
        question = rng.choice(["Say {}.", 'Repeat the word "{}".']).format(first)
        return [system(order), user(question), assistant(style(first))]
    if kind == "name":
        name = first.capitalize()
        hello = rng.choice(["My name is {}.", "Hello, I am {}."]).format(name)
        question = rng.choice(["What is my name?", "Who am I?"])
        return [user(hello), assistant(f"Hello, {name}!"), user(question), assistant(f"You are {name}.")]
    raise ValueError(f"no kind is called {kind!r}")


KINDS = [*ONE_WORD, "swap", "system", "name"]


def make_rows(count: int, draw: Callable[[random.Random], str], seed: int) -> list[dict[str, list[Message]]]:
    """`count` different conversations, the kinds in equal shares and in random order."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, list[Message]]] = {}
    while len(rows) < count:
        first, second = draw(rng), draw(rng)
        if first == second:
            continue
        row = {"messages": conversation(KINDS[len(rows) % len(KINDS)], [first, second], rng)}
        rows[json.dumps(row)] = row
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def training_word(rng: random.Random) -> str:
    """A made-up word that is not among the held-out words."""
    while (word := made_up_word(rng)) in ENGLISH_WORDS:
        pass
    return word


def main() -> None:
    """Write the two files beside this one."""
    folder = Path(__file__).parent / "instructions"
    folder.mkdir(exist_ok=True)
    parts = {
        "train": make_rows(TRAIN_ROWS, training_word, seed=1),
        "heldout": make_rows(HELDOUT_ROWS, lambda rng: rng.choice(ENGLISH_WORDS), seed=2),
    }
    for name, rows in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
