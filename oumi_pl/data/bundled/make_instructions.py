"""Generates the quickstart's data: conversations with eight kinds of short instructions, preferences and feedback.

    python -m oumi_pl.data.bundled.make_instructions

rewrites `instructions/`, `preferences/`, `feedback/` and `reversed/` next to this file, with identical bytes each time.

A row asks for something to be done to a word: put it in capitals, shout it, say it twice, answer as a system turn asks.
Each kind is asked for in several phrasings, and every phrasing ends with the word, so that a small model soon finds it.

Training uses made-up words only ("brolu", "taske"); the held-out questions use real English words, none of which is a
training word. So a held-out answer can be neither recalled nor guessed: it contains all five letters of a word that
the model has never seen, and has to be computed from the question. Any word fits any kind, so a model that copies the
word and ignores the instruction is right less than once in five. The held-out score is 0 % for an
untrained model, and approaches 100 % only if the model follows the instruction and copies words letter by letter.

A preference has two correct answers to such a question: the plain one, which a model trained on the instructions gives,
is rejected, and the same with a smile at the end is chosen. The model learns to smile, and should remain correct.

Feedback has one answer to each question, with the label true if it smiles and false if it does not. No question has
both.

Reversals ask to spell a word backwards. Two in ten demonstrations spell it forwards, and four have a wrong letter, so
a model that is trained on them is right less than half of the time. Rewards teach it the rest: for those there are
other words, with their right answers.
"""

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

Message = dict[str, str]

TRAIN_ROWS = 6000
HELDOUT_ROWS = 240
PREFERENCES = 1200
FEEDBACK = 3000
DEMONSTRATIONS = 3000
REVERSALS = 1500
SMILE = " :)"

# The words of the held-out questions; no training word is among them. Five letters each, as the made-up ones.
ENGLISH = """
acorn actor adobe album alder amber angel ankle apple apron arrow aspen atlas bacon badge bagel baker banjo basil
beach beard berry birch bison black bloom board boots brain brass bread brick bride broom brown brush cabin cable
camel canal candy canoe cargo cedar chain chair chalk charm chess chest child cider clock cloth cloud clown coast
cocoa comet coral couch cream creek crown curry daisy dance depot diary diver dough dream dress drink eagle earth
easel elbow ember fence fever field flame flask flock flour flute forge frost fruit ghost giant glass globe glove
goose grain grape grass green guest habit hazel heart hedge heron hobby honey horse hotel house igloo ivory jeans
jelly jewel judge juice kayak koala label lemon light lilac llama lodge lotus lunch lyric mango maple marsh medal
melon metal model moose mouse music nacho nurse ocean olive onion opera orbit otter paint panda paper party pasta
peach pearl pecan piano piece pilot pizza plant plate poppy prism prune pupil quail queen quiet quilt radio raven
ridge river roast robin robot salad scarf scone shark sheep shelf shell shirt shore skate skirt sloth snail snake
spice spoon stamp steam stone storm sugar swamp sword syrup table tango tiger toast topaz torch tower train trout
trunk tulip uncle vapor viola wagon waltz water whale wheat wheel widow world wrist yacht yeast zebra
"""
ENGLISH_WORDS = ENGLISH.split()

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiouy"
SHAPES = ["CVCVC", "CVCCV", "VCCVC", "CVVCC", "CCVCV", "CCVCC", "VCVCV", "CVCCC", "CCVVC", "CVCVV"]


def made_up_word(rng: random.Random) -> str:
    """Five letters that can nearly be pronounced, as "brolu" or "taske", and are none of the held-out words."""
    while True:
        word = "".join(rng.choice(CONSONANTS if place == "C" else VOWELS) for place in rng.choice(SHAPES))
        if word not in ENGLISH_WORDS:
            return word


def english_word(rng: random.Random) -> str:
    """A word of the held-out questions."""
    return rng.choice(ENGLISH_WORDS)


def turn(role: str, content: str) -> Message:
    """One turn of a conversation."""
    return {"role": role, "content": content}


# Each kind of question about one word: the answer as a function of the word, and the phrasings.
ONE_WORD: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "say": (lambda word: word, ["Say {}", "Repeat the word {}", "Please copy {}"]),
    "capitals": (str.upper, ["Write in capital letters: {}", "Say in capitals: {}", "Turn into upper case: {}"]),
    "name": (str.capitalize, ["Write as a name: {}", "Start with a capital letter: {}", "Capitalize {}"]),
    "shout": (lambda word: f"{word.upper()}!", ["Shout {}", "Shout the word {}", "Say it very loudly: {}"]),
    "ask": (lambda word: f"{word}?", ["Ask {}", "Turn into a question: {}", "Add a question mark to {}"]),
    "twice": (lambda word: f"{word} {word}", ["Say twice: {}", "Write two times: {}", "Double the word {}"]),
}
SWAP = ["Swap these two words: {} {}", "Change the order: {} {}", "Say the second word first: {} {}"]
ORDERS = {"Answer in capital letters.": "capitals", "Answer with a question mark.": "ask"}
KINDS = [*ONE_WORD, "swap", "system"]
REVERSE = ["Reverse {}", "Say backwards: {}", "Spell from the end: {}"]


def conversation(kind: str, rng: random.Random, draw: Callable[[random.Random], str]) -> list[Message]:
    """One conversation of a kind; `draw` gives its words."""
    word = draw(rng)
    if kind == "swap":
        other = draw(rng)
        return [turn("user", rng.choice(SWAP).format(word, other)), turn("assistant", f"{other} {word}")]
    if kind == "system":
        order = rng.choice(list(ORDERS))
        question = rng.choice(ONE_WORD["say"][1]).format(word)
        answer = ONE_WORD[ORDERS[order]][0](word)
        return [turn("system", order), turn("user", question), turn("assistant", answer)]
    compute, phrasings = ONE_WORD[kind]
    return [turn("user", rng.choice(phrasings).format(word)), turn("assistant", compute(word))]


def reversal(rng: random.Random, draw: Callable[[random.Random], str]) -> list[Message]:
    """A question for a word backwards, with the right answer."""
    word = draw(rng)
    return [turn("user", rng.choice(REVERSE).format(word)), turn("assistant", word[::-1])]


def demonstration(rng: random.Random, draw: Callable[[random.Random], str]) -> list[Message]:
    """As `reversal`; two answers in ten spell the word forwards, and four have a wrong letter."""
    question, answer = reversal(rng, draw)
    word, fault = answer["content"], rng.random()
    if fault < 0.2:
        word = word[::-1]
    elif fault < 0.6:
        place = rng.randrange(len(word))
        letter = rng.choice([letter for letter in string.ascii_lowercase if letter != word[place]])
        word = word[:place] + letter + word[place + 1 :]
    return [question, turn("assistant", word)]


def make_reversals(
    count: int, make: Callable[..., list[Message]], draw: Callable[[random.Random], str], seed: int
) -> list[dict[str, list[Message]]]:
    """`count` conversations with different questions."""
    rng = random.Random(seed)
    rows: dict[str, list[Message]] = {}
    while len(rows) < count:
        messages = make(rng, draw)
        rows.setdefault(messages[0]["content"], messages)
    return [{"messages": messages} for messages in rows.values()]


def make_rows(count: int, draw: Callable[[random.Random], str], seed: int) -> list[dict[str, list[Message]]]:
    """`count` different conversations, the kinds in equal shares and in random order."""
    rng = random.Random(seed)
    rows: dict[str, dict[str, list[Message]]] = {}
    while len(rows) < count:
        row = {"messages": conversation(KINDS[len(rows) % len(KINDS)], rng, draw)}
        rows[json.dumps(row)] = row
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def preference(row: dict[str, list[Message]]) -> dict[str, list[Message]]:
    """The question of a conversation, its answer with a smile, and the plain one, which is rejected."""
    *prompt, answer = row["messages"]
    smiling = answer | {"content": answer["content"] + SMILE}
    return {"prompt": prompt, "chosen": [smiling], "rejected": [answer]}


def judged(row: dict[str, list[Message]], smiles: bool) -> dict[str, object]:
    """The question of a conversation, its answer with or without a smile, and whether that is a good one."""
    *prompt, answer = row["messages"]
    completion = answer | {"content": answer["content"] + SMILE} if smiles else answer
    return {"prompt": prompt, "completion": [completion], "label": smiles}


def main() -> None:
    """Writes the data files."""
    heldout = make_rows(HELDOUT_ROWS, english_word, seed=2)
    # kinds of questions and labels vary independently, since the rows are shuffled
    judgements = [judged(row, i % 2 == 0) for i, row in enumerate(make_rows(FEEDBACK, made_up_word, seed=4))]
    parts: dict[str, list] = {
        "instructions/train": make_rows(TRAIN_ROWS, made_up_word, seed=1),
        "instructions/heldout": heldout,
        "preferences/train": [preference(row) for row in make_rows(PREFERENCES, made_up_word, seed=3)],
        "preferences/heldout": [preference(row) for row in heldout],
        "feedback/train": judgements,
        "reversed/demonstrations": make_reversals(DEMONSTRATIONS, demonstration, made_up_word, seed=5),
        "reversed/train": make_reversals(REVERSALS, reversal, made_up_word, seed=6),
        "reversed/heldout": make_reversals(HELDOUT_ROWS, reversal, english_word, seed=7),
    }
    for name, rows in parts.items():
        file = Path(__file__).parent / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
