"""The page of a run: what it says, that it is whole in itself, and that what files hold can't break it."""

import json
from html.parser import HTMLParser

import pytest

from oumi_pl.report import page
from oumi_pl.report.words import ago, clock, large, meaning, number
from oumi_pl.runs import folders
from tests.report.folders import run_folder, write_metrics

EVIL = "<script>alert(1)</script>&\"'</pre>"


class Elements(HTMLParser):
    """The elements of a page and their attributes; refuses those that are closed in another order."""

    EMPTY = ("meta", "link", "br", "path", "use", "rect", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(folder):
    built = page.make(folder)
    assert built == folder / "report.html"
    text = built.read_text(encoding="utf-8")
    return text, Elements(text)


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """A run all of whose files hold what would break a page."""
    folder = run_folder(tmp_path_factory.mktemp("a b"), recipe=EVIL, command=EVIL, status="failed", reason=EVIL)
    folders.write_state(folder, warnings=[EVIL], environment={"packages": {EVIL: EVIL}}, resumed=[20])
    samples = [
        {"step": step, "prompt": EVIL, "completion": f"{EVIL} at {step}", "reference": EVIL} for step in (0, 20, 40)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples) + '{"step": 41, "pro')
    (folder / folders.RECIPE).write_text(EVIL)
    (folder / folders.CONFIG).write_text(EVIL)
    (folder / "data.json").write_text(json.dumps({EVIL: {"rows": 3, "sources": [{"source": EVIL, EVIL: EVIL}]}}))
    write_metrics(
        folder, {"train/loss": {1: 2.0, 2: 1.0}, f"val/bits_per_byte/{EVIL}": {2: 1.0}, "val/bits_per_byte": {2: 1}}
    )
    return read(folder)


def test_the_content_of_files_is_escaped(evil):
    _, elements = evil
    assert not [tag for tag, _ in elements.found if tag == "script"]
    assert elements.text.count(EVIL) > 8


def test_the_page_needs_no_other_file_and_no_script(evil):
    _, elements = evil
    addresses = [
        value for _, attrs in elements.found for key, value in attrs.items() if key in ("src", "href", "xlink:href")
    ]
    assert addresses
    assert all(value.startswith(("#", "data:")) for value in addresses)
    assert "@import" not in elements.text


def test_samples_before_and_after_are_shown_with_the_reference(evil):
    _, elements = evil
    assert "Before the first update" in elements.text
    assert f"{EVIL} at 40" in elements.text
    assert f"{EVIL} at 20" not in elements.text
    assert "Reference" in elements.text


def test_the_page_of_a_finished_run(tmp_path):
    folder = run_folder(tmp_path)
    (folder / "checkpoints" / "step-00000040.ckpt").write_bytes(b"")
    (folder / "model").mkdir()
    _, elements = read(folder)
    text = elements.text
    for output in (
        "finished",
        "SFT of Llama (random weights; 5 parameters), loss L",
        "rows.jsonl (400 tokens in 10 rows)",
    ):
        assert output in text
    assert "0.7906" in text, "the last validation loss"
    assert "the best so far" in text
    assert "2 (empty)" in text, "why rows were dropped"
    assert "10 s" in text, "in total"
    assert "# mine" in text
    assert "torch" in text
    assert f"oumi_pl fit --resume {folder} --trainer.max_steps 80" in text
    assert f"oumi_pl export --checkpoint {folder} --output {folder}-model" in text
    assert f"oumi_pl generate --model {folder}/model --prompt" in text
    assert (folder / "curves.png").stat().st_size > 10_000


def test_paths_with_spaces_are_quoted(tmp_path):
    folder = run_folder(tmp_path / "my runs", status="stopped", reason="stopped by SIGTERM")
    _, elements = read(folder)
    assert f"fit --resume '{folder}'" in elements.text
    assert "stopped by SIGTERM" in elements.text


def test_a_folder_with_metrics_alone_is_reported(tmp_path):
    (tmp_path / "r").mkdir()
    assert page.make(tmp_path / "r") is None
    write_metrics(tmp_path / "r", {"train/loss": {1: 2.0}})
    for name in (folders.RUN, "data.json", folders.CONFIG, "samples.jsonl"):
        (tmp_path / "r" / name).write_text("{")
    _, elements = read(tmp_path / "r")
    assert "unknown" in elements.text


def test_numbers_are_formatted_for_people():
    assert [clock(s) for s in (0.04, 12, 59.7, 185, 3723, 200_000, None)] == [
        *("0.0 s", "12 s", "60 s", "3:05 min", "1:02:03 h", "2 d 07 h", "-")
    ]
    assert [ago(s) for s in (5, 600, 3 * 3600, 4 * 86400)] == ["now", "10 min ago", "3 h ago", "4 d ago"]
    assert [large(n) for n in (950, 12_400, 135e6, 1.24e9)] == ["950", "12.4k", "135M", "1.24B"]
    assert [number(v) for v in (0.123456, 1234567.0, 7, None, "x", float("nan"))] == [
        *("0.1235", "1,234,567", "7", "-", "x", "nan")
    ]


def test_meanings_come_from_the_table_of_metrics():
    assert meaning("train/rewards/rejected") == meaning("val/rewards/chosen") != ""
    assert meaning("val/loss") == "the training loss on held-out tokens or pairs"
    assert meaning("val/perplexity/web") == meaning("val/perplexity") == "exp of val/nll"
    assert meaning("val/something") == meaning("val") == ""
    assert meaning("val/pass@8") == meaning("val/pass@1") != ""
    assert meaning("val/reward/easy") == meaning("val/reward") != ""
    assert meaning("val/rewards/gsm8k") == meaning("train/rewards/gsm8k_std") != meaning("train/rewards/chosen_std")


# ---- online training


def completion(update, prompt, text, total, **changes):
    rewards = {"right": total, "short": 0.0}
    line = {"update": update, "origin": f"rows.jsonl:{prompt}", "prompt": f"{EVIL} prompt {prompt}", "completion": text}
    return line | {"rewards": rewards, "total": total, "advantage": 0.0, "length": 3, "finished": True} | changes


@pytest.fixture
def online(tmp_path):
    folder = run_folder(tmp_path, steps=0)
    columns = {f"train/{name}": {1: 0.5, 2: 0.6} for name in ("reward", "rewards/right", "rewards/right_std", "loss")}
    columns |= {f"train/{name}": {1: 0.5, 2: 0.6} for name in ("rewards/short", "length", "entropy", "kl", "truncated")}
    columns |= {f"train/reward/{name}": {1: 0.5, 2: 0.6} for name in ("easy", "hard")}
    columns |= {f"train/seconds/{name}": {1: 0.5, 2: 0.6} for name in ("generating", "rewarding", "training")}
    write_metrics(folder, columns | {f"val/{name}": {2: 0.25} for name in ("loss", "reward", "pass@1", "pass@4")})
    lines = [
        *(completion(1, 7, text, total) for text, total in (("bad", 0.0), ("good", 1.0), ("middling", 0.5))),
        *(completion(2, 7, f"{EVIL} same", 1.0, finished=False) for _ in range(2)),
        *(completion(1, 8, text, total) for text, total in (("only once", 0.0), ("at the start", 1.0))),
        {"update": 3, "stopped": "full"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"update": 4, "comp'
    (folder / "rollouts.jsonl").write_text(text)
    return read(folder)


def test_groups_show_the_best_and_the_worst_completion_of_a_prompt_over_time(online):
    _, elements = online
    text = elements.text.split("The best and the worst completion of a prompt")[1]
    assert text.index("prompt 7") < text.index("prompt 8"), "sampled most often"
    first, second = text.split("Update 2")
    for shown in ("Update 1", "3 completions, mean reward 0.5", "Best: 1 (right 1, short 0, 3 tokens)", "good"):
        assert shown in first
    assert "Worst: 0 (right 0, short 0, 3 tokens)" in first
    assert "bad" in first
    assert "middling" not in text
    assert "The first; all have the same reward: 1 (right 1, short 0, 3 tokens, cut)" in second
    assert f"{EVIL} same" in second
    assert "Up to update 2, where rollouts.jsonl reached its largest size" in text
    assert not [tag for tag, _ in elements.found if tag == "script"]


def test_online_training_is_summarised_by_rewards_instead_of_its_loss(online):
    _, elements = online
    for shown in (
        "Training reward",
        "Validation reward",
        "pass@4",
        "Reward by component",
        "Reward by source",
        "Completion length",
    ):
        assert shown in elements.text
    for shown in ("Reward by source", "Entropy of the policy", "KL divergence", "Seconds per update", "Policy loss"):
        assert shown in elements.text
    for hidden in ("Training loss", "Validation loss", "nats per target token"):
        assert hidden not in elements.text


def test_repeated_rows_are_shown_with_the_first_of_them(tmp_path):
    folder = run_folder(tmp_path)
    data = json.loads((folder / "data.json").read_text())
    data["train"]["duplicates"] = {"rows": 2, "first": [["a.jsonl:5", "a.jsonl:1"]]}
    data["validation"] = data["train"] | {
        "prompts_in_training": {"rows": 3, "identical": 1, "first": [["b.jsonl:1", "a.jsonl:9"]]},
        "text_in_training": {"rows": 4, "half": 2, "first": [["b.jsonl:2", "a.jsonl:8"]]},
        "near_duplicates": {"rows": 0, "first": []},
        "sources": [{"source": "b.jsonl", "rows": 8, "prompts_in_training": 3, "text_in_training": 4}],
    }
    (folder / "data.json").write_text(json.dumps(data))
    _, elements = read(folder)
    assert "2: a.jsonl:5 = a.jsonl:1" in elements.text
    assert "3: b.jsonl:1 = a.jsonl:9" in elements.text
    assert "prompts in training" in elements.text
    assert "4: b.jsonl:2 ~ a.jsonl:8" in elements.text
    assert "text in training" in elements.text
