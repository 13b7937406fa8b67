"""What a model writes on the way: the same prompts each time, without touching what is trained."""

import json

import torch

from oumi_pl.callbacks.run_folder import RunFolder
from oumi_pl.callbacks.samples import Samples
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.generation import complete
from oumi_pl.modules.pretrain import Pretrain
from tests.tiny import LLAMA, sgd, trainer, weights

TEXTS = [f"document {i} says {i * i} times nothing" for i in range(30)]


def run(tmp_path, *callbacks):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = PretrainData(
        str(file), str(file), tokenizer=ByteTokenizer(chat_template=False), max_length=16, batch_size=2, seed=0
    )
    torch.manual_seed(0)
    module = Pretrain(config=LLAMA | {"attention_dropout": 0.2}, optimizer=sgd)
    folder = RunFolder(tmp_path, "run", "run", "{}")
    limits = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer(callbacks=[folder, *callbacks], **limits).fit(module, data)
    return module, data, folder.directory


def lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_the_same_prompts_are_completed_at_the_start_and_at_each_validation(tmp_path):
    module, data, folder = run(tmp_path, Samples(["first", "second"], max_new_tokens=8))
    found = lines(folder)
    assert [(line["step"], line["prompt"]) for line in found] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("first", "second")
    ]
    ids = [data.tokenizer.encode(prompt, add_special_tokens=False) for prompt in ("first", "second")]
    assert [line["completion"] for line in found[-2:]] == complete(
        module.causal_lm.hf, data.tokenizer, ids, max_new_tokens=8
    )


def test_left_out_prompts_are_the_beginnings_of_held_out_documents(tmp_path, capsys):
    _, _, folder = run(tmp_path, Samples(rows=2, max_new_tokens=4))
    prompts = [line["prompt"] for line in lines(folder) if line["step"] == 4]
    assert len(prompts) == 2
    assert all(text.startswith(prompt) and prompt for prompt, text in zip(prompts, TEXTS, strict=False))
    shown = capsys.readouterr().out
    assert all(f"{prompt}|" in shown for prompt in prompts)


def test_sampling_leaves_the_training_as_it_is(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with_samples, *_ = run(tmp_path / "a", Samples(["x"], max_new_tokens=4, temperature=1.0))
    without, *_ = run(tmp_path / "b")
    ours, theirs = weights(with_samples), weights(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
