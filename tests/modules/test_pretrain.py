"""Pretraining: perplexity and bits per byte against a count by hand, per source; how weights start; compiling once."""

import json
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from oumi_pl.callbacks.trigram import TrigramBytes
from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.shapes import shape_config
from oumi_pl.modules.pretrain import Pretrain
from tests.tiny import LLAMA, sgd, trainer

TEXTS = {"first": ["the cat sat on the mat", "a dog"], "second": ["zzzz yyyy xxxx", "one two three four five", "ok"]}


def write(path, name, texts):
    file = path / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def data(path, **kwargs):
    files = [write(path, name, texts) for name, texts in TEXTS.items()]
    settings = {"tokenizer": ByteTokenizer(chat_template=False), "max_length": 8, "batch_size": 2, "seed": 0}
    return PretrainData(files, files, **(settings | kwargs))


def nats(module, documents, tokenizer, window):
    """Negative log-likelihood of documents by hand: EOS at their ends, the last window moved back to be full."""
    total, targets = 0.0, 0
    for text in documents:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, window):
            end = min(len(ids), start + window + 1)
            first = max(0, end - 1 - window)
            piece = torch.tensor([ids[first:end]])
            with torch.no_grad():
                losses = F.cross_entropy(module.causal_lm.hf(piece[:, :-1]).logits[0], piece[0, 1:], reduction="none")
            total += float(losses[start - first :].sum())
            targets += end - 1 - start
    return total, targets


def test_perplexity_and_bits_per_byte_are_those_of_each_source_and_of_all(tmp_path):
    module, runner = Pretrain(config=LLAMA, optimizer=sgd), trainer(max_steps=3)
    corpus = data(tmp_path)
    runner.fit(module, corpus)
    metrics = runner.validate(module, corpus, verbose=False)[0]
    module.eval()
    sums = {name: nats(module, texts, corpus.tokenizer, 8) for name, texts in TEXTS.items()}
    # nothing predicts a document's first byte, so it counts on neither side
    sizes = {name: sum(len(text.encode()) - 1 for text in texts) for name, texts in TEXTS.items()}
    for name, (loss, targets) in sums.items():
        assert metrics[f"val/perplexity/{name}"] == pytest.approx(math.exp(loss / targets), rel=1e-4)
        assert metrics[f"val/bits_per_byte/{name}"] == pytest.approx(loss / math.log(2) / sizes[name], rel=1e-4)
    loss, targets = (sum(column) for column in zip(*sums.values(), strict=True))
    assert metrics["val/perplexity"] == pytest.approx(math.exp(loss / targets), rel=1e-4)


def test_random_weights_start_scaled_and_pretrained_ones_as_they_are(tmp_path):
    module = Pretrain(config=LLAMA | {"hidden_size": 128, "intermediate_size": 256}, optimizer=sgd)
    trainer(max_steps=1, limit_val_batches=0).fit(module, data(tmp_path))
    spread = {name: float(p.std()) for name, p in module.causal_lm.hf.named_parameters() if p.ndim == 2}
    residual = [s for name, s in spread.items() if "o_proj" in name or "down_proj" in name]
    others = [s for name, s in spread.items() if "q_proj" in name or "up_proj" in name]
    assert all(s == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.1) for s in residual)
    assert all(s == pytest.approx(0.02, rel=0.1) for s in others)


def test_shapes_have_about_the_parameters_they_are_named_for():
    from transformers import AutoConfig, AutoModelForCausalLM

    named = {"1m": 1e6, "10m": 1e7, "30m": 3e7, "135m": 1.35e8, "1b": 1.2e9, "8b": 8e9}
    vocabulary = {"135m": 49152, "1b": 128256, "8b": 128256}
    for shape, expected in named.items():
        config = AutoConfig.for_model(**shape_config(shape) | {"vocab_size": vocabulary.get(shape, 256)})  # type: ignore[arg-type]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(expected, rel=0.12)


def test_a_shape_is_for_random_weights():
    with pytest.raises(UserError, match=r"model\.shape starts from random weights"):
        Pretrain("somewhere", shape="1m")
    assert Pretrain(shape="1m", config={"num_hidden_layers": 2}).config["num_hidden_layers"] == 2


def test_fixed_shapes_compile_once(tmp_path, monkeypatch):
    """Rows of one length: after the first step, nothing is compiled again."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(compiled))
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: real(self, backend=backend, **kwargs))
    torch._dynamo.reset()
    steps = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_):
            steps.append(len(compiled))

    texts = [f"document number {i} has some words" for i in range(30)]
    corpus = PretrainData(
        write(tmp_path, "many", texts), tokenizer=ByteTokenizer(chat_template=False), max_length=16, batch_size=2
    )
    module = Pretrain(config=LLAMA, optimizer=sgd, compile=True)
    trainer(max_steps=5, callbacks=[Count()]).fit(module, corpus)
    assert steps[0] > 0
    assert steps == [steps[0]] * 5


def test_trigram_bytes_by_hand():
    model = TrigramBytes([b"abab"])
    p_b = (2 + 2 / 256) / (4 + 2)  # b: two of four bytes, two kinds seen, backing off to 1/256
    p_a = p_b
    p_b_after_a = (2 + 1 * p_b) / (2 + 1)  # ab twice, one kind after a
    p_a_after_ab = (1 + 1 * ((1 + 1 * p_a) / (1 + 1))) / (1 + 1)  # ba once after b, which a followed once
    expected = -sum(map(math.log2, (p_a, p_b_after_a, p_a_after_ab)))
    assert model.bits(b"aba") == pytest.approx(expected)
    assert model.bits(b"") == 0
    assert model.bits(b"\xff\xfe") > 15
