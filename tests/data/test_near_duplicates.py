"""Near duplicates by runs of 13 words, against a plain loop over all pairs of rows."""

import json
import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from oumi_pl.callbacks.start import summary
from oumi_pl.data import near_duplicates
from oumi_pl.data.distill import DistillData
from oumi_pl.data.dpo import DPOData
from oumi_pl.data.duplicates import REPEATED, RowKeys
from oumi_pl.data.kto import KTOData
from oumi_pl.data.near_duplicates import RowTexts, grams_of, name_of, with_near_duplicates
from oumi_pl.data.rollouts import RolloutData
from oumi_pl.data.sft import SFTData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.preview.report import _repeated
from oumi_pl.runs import checksums
from oumi_pl.types import Conversation, Feedback, Preference, Text
from tests.data.test_pretrain import pretrain_data
from tests.data.test_splitting import turns, write

OPTIONS = {"tokenizer": ByteTokenizer(), "template": "chatml", "max_length": 2048, "near_duplicates": True}
VOCABULARY = [f"word{i}" for i in range(500)]


def sentences(rng, count, words):
    return [" ".join(rng.choices(VOCABULARY, k=words)).capitalize() + "." for _ in range(count)]


def change_a_word(text, rng):
    words = text.split(" ")
    words[len(words) // 2] = rng.choice(VOCABULARY)
    return " ".join(words)


def swap_neighbours(text, rng):
    """Each 13 words are as before but for their order."""
    words = text.split(" ")
    for i in range(0, len(words) - 1, 8):
        words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def reorder(text, rng):
    parts = text.split(". ")
    rng.shuffle(parts)
    return ". ".join(parts)


CHANGES = {
    "one word": change_a_word,
    "a sentence appended": lambda text, rng: text + " " + sentences(rng, 1, 12)[0],
    "sentences in another order": reorder,
    "neighbours swapped": swap_neighbours,
    "case and punctuation": lambda text, rng: text.upper().replace(".", " !"),
    "the first half": lambda text, rng: text[: len(text) // 2],
    "twice": lambda text, rng: f"{text} {text}",
    "nothing": lambda text, rng: text,
}
INSTRUCTION = "Read the following passage with care and answer the question about it in a short sentence of your own: "


def corpus(seed, count=180, originals=()):
    """Texts of 1 to 160 words, half of them a changed copy of another; some begin with a long instruction."""
    rng = random.Random(seed)
    texts = list(originals)
    for number in range(count):
        if texts and number % 2:
            text = CHANGES[rng.choice([*CHANGES])](rng.choice(texts), rng)
        else:
            text = " ".join(sentences(rng, rng.randint(1, 5), rng.choice((1, 8, 20, 32))))
        texts.append(INSTRUCTION + text if rng.random() < 0.2 else text)
    return texts[len(originals) :]


def grams(text):
    words = re.findall("[a-z0-9]+", text.lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)} or {tuple(words)}


def near_by_a_loop(texts):
    kept, near, seen = [], [], set()
    for number, text in enumerate(texts):
        if text in seen:
            continue  # word for word
        seen.add(text)
        own = grams(text)
        for other, theirs in kept:
            if len(own & theirs) / len(own | theirs) >= 0.5:
                near.append((number, other))
                break
        else:
            kept.append((number, own))
    return near


def in_training_by_a_loop(texts, training):
    """Numbers of the held-out rows, those of them that are half in training, and the training rows of each.

    A run that more than 10 training rows have doesn't count, unless a row has no others.
    """
    of_training = [(number, grams(text)) for number, text in enumerate(training) if text not in training[:number]]
    rows, half, others = [], [], {}
    for number, text in enumerate(texts):
        own = grams(text)
        owners = {gram: [other for other, theirs in of_training if gram in theirs] for gram in own}
        own = {gram for gram in own if len(owners[gram]) <= 10} or own
        known = [gram for gram in own if owners[gram]]
        if not known:
            continue
        if 2 * len(known) >= len(own):
            half.append(number)
        rows.append(number)
        others[number] = {other for gram in known for other in owners[gram]}
    return rows, half, others


def row_texts(title, texts):
    keys = RowKeys()
    for number, text in enumerate(texts):
        keys.add(f"{title}:{number}", Text(text))
    return RowTexts(name_of(keys, title), keys, lambda: enumerate(texts), title)


def agrees_with_the_loops(monkeypatch):
    monkeypatch.setattr(near_duplicates, "LISTED", 10_000)
    monkeypatch.setattr(near_duplicates, "BLOCK", 7)
    training = corpus(1)
    held_out = corpus(2, 60, training)
    whole = with_near_duplicates({}, [], [row_texts("a", training[:50]), row_texts("b", training[50:])], None)
    places = [f"a:{i}" for i in range(50)] + [f"b:{i}" for i in range(len(training) - 50)]
    expected = near_by_a_loop(training)
    shown = with_near_duplicates({}, [], [row_texts("h", held_out)], [row_texts("t", training)])["text_in_training"]
    rows, half, others = in_training_by_a_loop(held_out, training)
    assert 20 < len(expected) < 80, "near rows are neither rare nor all"
    assert len(half) < len(rows) < len(held_out)
    return (
        whole["near_duplicates"] == {"rows": len(expected), "first": [[places[i], places[j]] for i, j in expected]}
        and (shown["rows"], shown["half"]) == (len(rows), len(half))
        and [row for row, _ in shown["first"]] == [f"h:{i}" for i in rows]
        and all(int(other[2:]) in others[int(row[2:])] for row, other in shown["first"])
    )


def test_they_are_those_of_a_loop_over_all_pairs(monkeypatch):
    assert agrees_with_the_loops(monkeypatch)


FAULTS = {
    "12 words": ("WORDS", 12),
    "the order of words": ("_FACTOR", 1),
    "common phrases": ("COMMON", 10_000),
    "too few are looked up": ("_prefix", lambda size, least: size // 4 + 1),
    "any shared run is near": ("_is_near", lambda own, theirs: len(np.intersect1d(own, theirs)) > 0),
    "repeated rows": ("_numbered", lambda sources, of: [(i, g[i]) for g in of for i in range(len(g))]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_would_be_caught(monkeypatch, fault):
    monkeypatch.setattr(near_duplicates, *FAULTS[fault])
    assert not agrees_with_the_loops(monkeypatch)


def test_words_are_compared_without_case_and_punctuation_in_any_script():
    assert grams_of("One, two -- THREE!").tolist() == grams_of("one two three").tolist()
    assert len(grams_of("one two three")) == 1
    assert len(grams_of(" ... ")) == len(grams_of("")) == 0
    assert len(grams_of(" ".join(VOCABULARY[:20]))) == 8
    assert grams_of("one two").tolist() != grams_of("two one").tolist()
    # a script without spaces: each character is a word
    chinese = "人工智能正在改变我们的生活方式和工作方式"
    assert len(grams_of(chinese)) == len(chinese) - 12
    assert np.isin(grams_of(chinese), grams_of("今天" + chinese + "。ok")).all()


HINDI = "लड़की ने किताब पढ़ी और फिर अपने घर की ओर चली गई क्योंकि शाम हो चुकी थी"
TAMIL = "நான் இன்று காலையில் பள்ளிக்குச் சென்றேன்"
SINHALA = "මෙම ක්\u200dරමය ඉතා හොඳයි"
THAI = "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน"


@pytest.mark.parametrize(("text", "words"), [(HINDI, 17), (TAMIL, 5), (SINHALA, 4), ("Où était l'été ?", 4)])
def test_marks_and_joiners_are_part_of_a_word(text, words):
    assert len(text.replace("'", " ").replace(" ?", "").split()) == words
    for form in ("NFC", "NFD", "NFKC"):
        written = unicodedata.normalize(form, text)
        together = grams_of(f"{written} {' '.join(VOCABULARY[:13])}")
        assert len(together) == words + 1
        assert together.tolist() == grams_of(f"{text} {' '.join(VOCABULARY[:13])}").tolist()


def test_a_character_with_its_marks_is_a_word_of_a_script_without_spaces():
    letters = sum(not unicodedata.category(character).startswith("M") for character in THAI)
    assert len(grams_of(THAI)) == letters - 12 > 10
    assert np.isin(grams_of(THAI), grams_of("ok " + THAI[:20] + THAI[20:] + "ครับ")).all()
    assert len(grams_of("カタカナー" * 3)) == 3
    assert grams_of("ｶﾀｶﾅ \uff12").tolist() == grams_of("カタカナ 2").tolist()


def text_in_training(held_out, training):
    return with_near_duplicates({}, [], [row_texts("h", held_out)], [row_texts("t", training)])["text_in_training"]


def test_a_long_template_around_a_short_question_is_not_text_of_training():
    template = long_text(0, 60)
    training = [f"{template} {' '.join(words)}" for words in np.array(VOCABULARY[:90]).reshape(15, 6)]
    asked = f"{template} Who wrote the {{}}, and when?"
    others = [asked.format("Iliad"), asked.format("Edda")]
    assert text_in_training(others, training) == {"rows": 0, "half": 0, "first": []}
    # the question itself is in training, and is what names the row there
    shared = text_in_training(others, [*training, others[1]])
    first = [["h:0", "t:15"], ["h:1", "t:15"]]
    assert shared == {"rows": 2, "half": 2, "first": first}, "both begin like the question, and with its first half"


def test_a_row_with_nothing_but_common_phrases_is_in_training():
    common = long_text(0, 20)
    training = [f"{common} {word}" for word in VOCABULARY[:12]]
    assert text_in_training([common, long_text(1, 20)], training) == {"rows": 1, "half": 1, "first": [["h:0", "t:0"]]}


@pytest.mark.parametrize("fault", [None, "hash order"])
def test_rows_that_share_a_template_are_compared_with_few_others(monkeypatch, fault):
    """Each row has two parts that it shares with one other row each, so that these are no unique text either."""
    rng, hits = np.random.default_rng(0), []
    template, *parts = rng.integers(0, 2**63, (302, 35), np.uint64)
    rows = [(i, np.unique(np.concatenate([template[:30], parts[i], parts[i + 1]]))) for i in range(300)]

    def counted(others):
        hits.extend(others := list(others))
        return Counter(others)

    monkeypatch.setattr(near_duplicates, "Counter", counted)
    if fault:
        monkeypatch.setattr(np, "lexsort", lambda keys: np.arange(len(keys[0])))
    assert near_duplicates.near_duplicates(rows) == []
    assert (len(hits) > 100_000) == bool(fault), f"the template is looked up: {len(hits)}"


def long_text(seed, words=100):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def opened(data):
    for split in ("train", "validation"):
        if data.sources[split] is not None:
            data.make(split)
    return data.report()


def test_the_report_names_near_rows_of_training_and_of_every_held_out_source(tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "system", "content": INSTRUCTION}, *turns("Why?", long_text(i))]} for i in range(6)]
    near = {"messages": turns("Why?", long_text(1) + " indeed.")}
    train = write(tmp_path / "train.jsonl", [*rows[:5], {"id": 9} | rows[0], near, {"messages": turns("W", "x")}])
    first = write(
        tmp_path / "first.jsonl", [rows[5], {"messages": turns("What?", " ".join(long_text(2).split()[:30]))}]
    )
    second = write(tmp_path / "second.jsonl", [{"messages": turns("Who?", "Nobody.")}, {"messages": turns("w", "X!")}])
    report = opened(SFTData(train, [first, second], **OPTIONS))
    assert report["train"]["near_duplicates"] == {"rows": 1, "first": [[f"{train}:7", f"{train}:2"]]}
    assert report["train"]["duplicates"]["rows"] == 1, "which is not counted as near"
    assert report["validation"]["near_duplicates"] == {"rows": 0, "first": []}
    assert report["validation"]["text_in_training"] == {
        "rows": 2,
        "half": 2,
        "first": [[f"{first}:2", f"{train}:3"], [f"{second}:2", f"{train}:8"]],
    }
    assert [source["text_in_training"] for source in report["validation"]["sources"]] == [1, 1]
    assert "1 near an earlier row" in summary(report["train"])
    assert "2 share a run of 13 words (or all, if shorter) with training (2 with half of their runs)" in summary(
        report["validation"]
    )
    assert f"{train}:7 ~ {train}:2" in _repeated(report["train"])["near an earlier row"]
    # a second run reads the counts from the cache
    monkeypatch.setattr(near_duplicates, "grams_of", lambda text: pytest.fail("counted again"))
    again = SFTData(train, [first, second], **OPTIONS)
    assert opened(again) == report
    # and counts again if they are damaged: a digit would be wrong in silence
    monkeypatch.undo()
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "cache"))
    files = list((tmp_path / "cache" / "near_duplicates").glob("*.json"))
    assert len(files) == 2
    for file in files:
        file.write_text(file.read_text().replace('"rows": 1', '"rows": 3'))
    assert opened(SFTData(train, [first, second], **OPTIONS)) == report
    # `drop` leaves out what repeats a row word for word, and near rows are counted as before
    monkeypatch.setenv("OUMI_PL_CACHE", str(tmp_path / "other"))
    dropped = opened(SFTData(train, [first, second], **OPTIONS, duplicates="drop"))["train"]
    assert dropped["dropped"] == {REPEATED: 1}
    assert dropped["near_duplicates"] == report["train"]["near_duplicates"]


def test_without_the_option_nothing_is_counted_and_a_run_can_be_resumed_with_either(tmp_path):
    file = write(tmp_path / "train.jsonl", [{"messages": turns("Why?", long_text(i))} for i in range(4)])
    counted, plain = SFTData(file, **OPTIONS), SFTData(file, **OPTIONS | {"near_duplicates": False})
    counted.make("train")
    plain.make("train")
    assert "near_duplicates" in counted.report()["train"]
    assert "near_duplicates" not in plain.report()["train"]
    assert counted.made_from() == plain.made_from()


def test_pairs_prompts_and_distilled_answers_are_compared_too(tmp_path):
    good, bad = long_text(1), long_text(2)
    pairs = [{"prompt": long_text(i, 30), "chosen": good[9 * i :], "rejected": bad[9 * i :]} for i in (0, 1)]
    file = write(tmp_path / "pairs.jsonl", pairs)
    held_out = write(tmp_path / "held.jsonl", [{"prompt": "What?", "chosen": "Yes.", "rejected": bad}])
    report = opened(DPOData(file, held_out, **OPTIONS))
    assert report["train"]["near_duplicates"]["rows"] == 1
    assert report["validation"]["text_in_training"]["first"] == [[f"{held_out}:1", f"{file}:1"]]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": good}, {"prompt": bad}, {"prompt": good + " Why?"}])
    other = write(tmp_path / "other.jsonl", [{"prompt": change_a_word(bad, random.Random(1))}])
    report = opened(RolloutData([prompts, other], prompts, **OPTIONS, reward=len))
    expected = [[f"{prompts}:3", f"{prompts}:1"], [f"{other}:1", f"{prompts}:2"]]
    assert report["train"]["near_duplicates"] == {"rows": 2, "first": expected}
    assert report["validation"]["text_in_training"]["rows"] == 3
    answers = [{"prompt": "Why?", "completion": text} for text in (good, bad, good + " Indeed.")]
    report = opened(DistillData(write(tmp_path / "answers.jsonl", answers), **OPTIONS))
    assert report["train"]["near_duplicates"]["rows"] == 1


def test_all_records_of_a_row_are_its_text(tmp_path):
    """Rows with the same prompt and chosen response: the first record of both is the same one."""
    chosen, first, second = "Because.", long_text(1), long_text(2)
    pairs = [{"prompt": "Why?", "chosen": chosen, "rejected": text} for text in (first, second, first, f"{first} Yes.")]
    file = write(tmp_path / "pairs.jsonl", pairs)
    held_out = write(tmp_path / "held.jsonl", [{"prompt": "What?", "chosen": "Yes.", "rejected": second}])
    report = opened(KTOData(file, held_out, **OPTIONS))
    assert report["train"]["near_duplicates"] == {"rows": 1, "first": [[f"{file}:4", f"{file}:1"]]}
    assert report["validation"]["text_in_training"]["first"] == [[f"{held_out}:1", f"{file}:2"]]


def test_prepared_documents_without_keys_are_refused(tmp_path):
    train = write(tmp_path / "train.jsonl", [{"text": long_text(i)} for i in range(3)])
    data = pretrain_data(train)
    opened(data)
    (shards,) = data.shards("train")
    manifest = json.loads((shards.directory / "manifest.json").read_text())
    del manifest["keys_crc32"], manifest["crc32"]
    (shards.directory / "manifest.json").write_text(json.dumps(manifest | {"crc32": checksums.of_json(manifest)}))
    with pytest.raises(UserError, match=r"data\.near_duplicates: .* prepared by an earlier version.* prepare it again"):
        opened(pretrain_data(str(shards.directory), near_duplicates=True))
    assert "near_duplicates" not in opened(pretrain_data(str(shards.directory)))["train"]


def test_each_split_of_prompts_is_counted_once(tmp_path, monkeypatch):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": long_text(i)} for i in range(3)])
    data = RolloutData(prompts, prompts, **OPTIONS, reward=len)
    counted, count = [], near_duplicates._counted
    monkeypatch.setattr(near_duplicates, "_counted", lambda *args: counted.append(args) or count(*args))
    assert opened(data) == data.report()
    assert len(counted) == 2


@pytest.mark.parametrize("kind", [SFTData, pretrain_data, RolloutData])
def test_texts_of_rows_can_be_read_again(tmp_path, monkeypatch, kind):
    row = {"text": "A document."} if kind is pretrain_data else {"messages": turns("Why?", "Because.")}
    options = {"near_duplicates": True} if kind is pretrain_data else OPTIONS
    read, count = [], near_duplicates._counted
    monkeypatch.setattr(near_duplicates, "_counted", lambda *args: read.append(args[0]) or count(*args))
    reward = {"reward": len} if kind is RolloutData else {}
    opened(kind(write(tmp_path / "rows.jsonl", [row]), **options, **reward))
    assert list(read[0][0].texts()) == list(read[0][0].texts())
    assert len(list(read[0][0].texts())) == 1


def test_documents_are_compared_cached_or_prepared(tmp_path):
    texts = [*({"text": long_text(i)} for i in range(3)), {"text": long_text(1) + " More."}, {"text": long_text(2)}]
    train = write(tmp_path / "train.jsonl", texts)
    held_out = write(tmp_path / "held.jsonl", [{"text": long_text(9)}, {"text": f"Then {long_text(0)[-200:]}"}])
    expected = {"rows": 1, "first": [[f"{train}:4", f"{train}:2"]]}
    data = pretrain_data(train, validation=held_out, near_duplicates=True)
    report = opened(data)
    assert report["train"]["near_duplicates"] == expected
    assert report["validation"]["text_in_training"] == {
        "rows": 1, "half": 1, "first": [[f"{held_out}:2", f"{train}:1"]]
    }  # fmt: skip
    (shards,) = data.shards("train")
    prepared = opened(pretrain_data(str(shards.directory), near_duplicates=True))
    assert prepared["train"]["near_duplicates"] == expected


@pytest.mark.parametrize("kind", [SFTData, pretrain_data])
def test_rows_that_are_streamed_cannot_be_compared(kind):
    with pytest.raises(UserError, match=r"data\.near_duplicates needs all .* leave out data\.streaming"):
        kind("x.jsonl", tokenizer=ByteTokenizer(), near_duplicates=True, streaming=True)


def test_the_text_of_a_row_is_all_but_the_system_turn():
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "über"}}}
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
    )
    conversation = Conversation(messages)
    assert conversation.full_text() == "What is it?\nHm.\n" + json.dumps([call], ensure_ascii=False)
    assert Feedback(conversation, True).full_text() == conversation.full_text()
    assert Preference(Text("a", "p "), Text("b", "p ")).full_text() == "p a\np b"
