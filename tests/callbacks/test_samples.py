"""What a model writes on the way: the same prompts each time, without touching what is trained."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from oumi_pl.callbacks import samples as samples_module
from oumi_pl.callbacks.predictions import Predictions
from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.samples import SampleFile, Samples, shown
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.models.generation import complete
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.report.record import Record
from tests.command_line import CommandLine
from tests.tiny import LLAMA, module, sgd, trainer, weights, write_jsonl
from tests.tiny import data as sft_data

TEXTS = [f"document {i} says {i * i} times nothing" for i in range(30)]


def run(tmp_path, *callbacks, validation=True):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = PretrainData(
        str(file),
        str(file) if validation else None,
        tokenizer=ByteTokenizer(chat_template=False),
        max_length=16,
        batch_size=2,
        seed=0,
    )
    torch.manual_seed(0)
    module = Pretrain(config=LLAMA | {"attention_dropout": 0.2}, optimizer=sgd)
    folder = RunFolder(tmp_path, "run", "run", "{}")
    limits = {"max_steps": 4} | ({"val_check_interval": 2, "check_val_every_n_epoch": None} if validation else {})
    trainer(callbacks=[folder, *callbacks], **limits).fit(module, data)
    return module, data, folder.directory


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text("utf-8").split("\n") if line]


def test_the_same_prompts_are_completed_at_the_start_and_at_each_validation(tmp_path):
    module, data, folder = run(tmp_path, Samples(["first", "second"], max_new_tokens=8))
    actual = lines(folder)
    assert [(line["step"], line["prompt"]) for line in actual] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("first", "second")
    ]
    ids = [data.tokenizer.encode(prompt, add_special_tokens=False) for prompt in ("first", "second")]
    assert [line["completion"] for line in actual[-2:]] == complete(
        module.causal_lm.hf, data.tokenizer, ids, max_new_tokens=8
    )


def test_left_out_prompts_are_the_beginnings_of_held_out_documents(tmp_path, capsys):
    _, _, folder = run(tmp_path, Samples(rows=2, max_new_tokens=4))
    prompts = [line["prompt"] for line in lines(folder) if line["step"] == 4]
    assert len(prompts) == 2
    assert all(text.startswith(prompt) and prompt for prompt, text in zip(prompts, TEXTS, strict=False))
    output = capsys.readouterr().err
    assert [f"step {step}  samples" in output for step in (0, 2, 4)] == [True] * 3
    assert all(output.count(f"  {prompt.strip()} > ") == 3 for prompt in prompts)
    kept = [line for line in lines(folder) if line["step"] == 0]
    assert all(text.startswith(line["prompt"] + line["reference"]) for line, text in zip(kept, TEXTS, strict=False))


@pytest.fixture(scope="module")
def unvalidated(tmp_path_factory):
    """A run without held-out rows; `(module, folder)`."""
    path = tmp_path_factory.mktemp("unvalidated")
    built, _, folder = run(path, Samples(rows=2, max_new_tokens=4), validation=False)
    return built, folder


def test_without_held_out_rows_the_first_training_rows_are_taken_at_the_start_and_the_end(unvalidated):
    actual = lines(unvalidated[1])
    assert [line["step"] for line in actual] == [0, 0, 4, 4]
    assert all(text.startswith(line["prompt"]) for line, text in zip(actual[:2], TEXTS, strict=False))


def test_a_resume_keeps_the_lines_up_to_its_step_and_writes_none_twice(unvalidated, tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text((unvalidated[1] / "samples.jsonl").read_text() + '{"step": 6, "prom')
    folder = RunFolder(tmp_path, "run", "run", "{}")
    folder.directory = tmp_path
    writer = SampleFile()
    writer.open(SimpleNamespace(callbacks=[folder], global_step=4))
    writer.write(4, [{"prompt": "again", "completion": "", "reference": ""}])
    writer.write(6, [{"prompt": "further", "completion": "", "reference": ""}])
    assert [line["step"] for line in lines(tmp_path)] == [0, 0, 4, 4, 6]
    writer.open(SimpleNamespace(callbacks=[folder], global_step=3))
    assert [line["step"] for line in lines(tmp_path)] == [0, 0]


OTHER_LINE_ENDS = "one\u2028two\u2029three\u0085four\x0bfive\x0csix\x1cseven\r\neight"
"""Where `str.splitlines` cuts, and JSON need not escape."""


def test_whatever_line_ends_a_model_writes_a_sample_is_one_line(tmp_path):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    folder.directory = tmp_path
    trainer = SimpleNamespace(callbacks=[folder], global_step=4)
    sample = {"prompt": OTHER_LINE_ENDS, "completion": OTHER_LINE_ENDS, "reference": ""}
    writer = SampleFile()
    writer.open(trainer)
    writer.write(4, [sample])
    SampleFile().open(trainer)
    assert lines(tmp_path) == Record(tmp_path).samples == [{"step": 4, **sample}]


def test_whatever_line_ends_a_model_writes_a_prediction_is_one_line(tmp_path):
    folder = RunFolder(tmp_path, "run", "run", "{}")
    folder.directory = tmp_path
    strategy = SimpleNamespace(barrier=lambda _: None)
    trainer = SimpleNamespace(callbacks=[folder], global_rank=0, is_global_zero=True, strategy=strategy)
    rows = [{"row": row, "completion": OTHER_LINE_ENDS} for row in (1, 0)]
    writer = Predictions()
    writer.on_predict_start(trainer, SimpleNamespace())
    writer.on_predict_batch_end(trainer, None, rows)
    writer.on_predict_end(trainer, None)
    written = (tmp_path / "predictions.jsonl").read_text("utf-8").split("\n")
    assert [json.loads(line) for line in written if line] == rows[::-1]


def test_a_model_that_can_not_write_is_trained_all_the_same(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise RuntimeError("no\ncache")

    monkeypatch.setattr(samples_module, "complete", refuse)
    _, _, folder = run(tmp_path, Samples(rows=2, max_new_tokens=4))
    assert capsys.readouterr().err.count("no samples are written: no cache\n") == 1
    assert not (folder / "samples.jsonl").exists()


def test_sharded_weights_are_not_sampled_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samples_module, "sharded", lambda *_: True)
    run(tmp_path, Samples(rows=2, max_new_tokens=4))
    assert capsys.readouterr().err.count("no samples are written: the weights are sharded") == 1


def test_prompts_that_leave_no_room_in_the_positions_are_passed_over(tmp_path):
    sft, rows = module(), sft_data(tmp_path, validation=0.3)
    trainer(max_steps=1).fit(sft, rows)
    lengths = [len(ids) for ids, _ in rows.prompts("validation")]
    shortest = min(lengths)
    built = Samples(rows=3, max_new_tokens=sft.causal_lm.base.config.max_position_embeddings - shortest)
    chosen = built._choose(SimpleNamespace(datamodule=rows, strategy=None), sft)
    assert [len(ids) for ids, _ in chosen] == [shortest] * lengths.count(shortest)


def test_what_is_shown_fits_and_can_not_drive_the_terminal(monkeypatch):
    monkeypatch.setattr(samples_module, "terminal_width", lambda: 60)
    long = "word " * 200
    output = shown(
        3,
        [("short", "\033[2Jan\nanswer\r\a"), (f"begin {long}end", long), ("empty", ""), ("joined", "👩\u200d🚀\u202e")],
    )
    first, short, prompt, *completion, empty, joined = output.splitlines()
    assert first == "step 3  samples"
    assert short == "  short > ⟨ESC⟩[2Jan⏎answer⟨CR⟩⟨BEL⟩"
    assert prompt.startswith("  …")
    assert prompt.endswith("end")
    assert len(completion) == samples_module.LINES
    assert completion[-1].endswith(" …")
    assert empty == "  empty > (nothing)"
    assert joined == "  joined > 👩\u200d🚀⟨U+202E⟩"
    assert max(len(line) for line in output.splitlines()) < 60


def test_sampling_leaves_the_training_as_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with_samples, *_ = run(tmp_path / "a", Samples(rows=2, max_new_tokens=4, temperature=1.0))
    without, *_ = run(tmp_path / "b")
    ours, theirs = weights(with_samples), weights(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    return CommandLine(tmp_path, monkeypatch, capsys)


def test_each_run_writes_samples_unless_they_are_turned_off_or_it_has_answers(cli):
    held_out = {"data.init_args.validation": 0.5, "samples": {"max_new_tokens": 4}}
    cli.recipe(held_out)
    _, _, output = cli.run("fit", "--config", "r.yaml")
    actual = [json.loads(line) for line in (cli.directory / "runs/r/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in actual] == [0, 0, 0, 2, 2, 2]
    assert actual[0].keys() == {"step", "prompt", "completion", "reference"}
    assert output.count("samples\n") == 2
    assert "set data.validation" not in output
    answers = {"trainer.callbacks": [{"class_path": "Answers", "init_args": {"rows": 2, "max_new_tokens": 4}}]}
    cli.recipe(held_out | answers)
    _, _, output = cli.run("fit", "--config", "r.yaml", "--name", "answers")
    assert "samples\n" not in output
    _, _, output = cli.run("fit", "--config", "r.yaml", "--trainer.callbacks=[]", "--samples.rows=0", "--name", "none")
    assert "samples\n" not in output
    assert not (cli.directory / "runs/none/samples.jsonl").exists()


def chosen_of(data, rows):
    """The prompts that a run with these held-out rows samples, as text."""
    model = SimpleNamespace(causal_lm=SimpleNamespace(base=SimpleNamespace(config=LlamaConfig())))
    loop = SimpleNamespace(datamodule=data, strategy=None)
    samples = Samples(rows=rows, max_new_tokens=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_module, "sharded", lambda *_: False)
        return [data.tokenizer.decode(ids) for ids, _ in samples._choose(loop, model)]


@pytest.mark.parametrize(("rows", "count"), [(1, 3), (5, 5)])
def test_every_source_has_a_sample(tmp_path, rows, count):
    turns = {name: [{"prompt": f"{name}{i}", "completion": "A"} for i in range(9)] for name in "abc"}
    files = [write_jsonl(tmp_path / f"{name}.jsonl", lines) for name, lines in turns.items()]
    prompts = chosen_of(sft_data(tmp_path, validation=files), rows)
    assert [text[:2] for text in prompts] == ["a0", "b0", "c0", "a1", "b1"][:count]
    texts = [write_jsonl(tmp_path / f"{n}.txt.jsonl", [{"text": f"{n} says much"} for _ in range(3)]) for n in "xyz"]
    documents = PretrainData(texts[0], texts, tokenizer=ByteTokenizer(chat_template=False), max_length=16)
    assert [text[:1] for text in chosen_of(documents, rows)] == ["x", "y", "z", "x", "y"][:count]
