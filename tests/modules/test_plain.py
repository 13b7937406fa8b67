"""Training of any `nn.Module`: updates equal a plain loop, modules are checked before training, and exported."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from oumi_pl.data.pretrain import PretrainData
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.models.generation import complete
from oumi_pl.models.lm import documents, padded
from oumi_pl.models.plain import load_module, load_weights
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.pretrain import Pretrain
from oumi_pl.modules.reward import Reward
from oumi_pl.modules.sft import SFT
from tests.tiny import data, distance, dpo_data, sgd, trainer

SIZE = 260


class Recurrent(nn.Module):
    """A GRU over embeddings; takes neither positions nor a mask."""

    def __init__(self, vocabulary=SIZE, width=16):
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids):
        return self.head(self.layer(self.embedding(input_ids))[0])


class Attending(nn.Module):
    """One attention layer with learned positions; takes positions and a mask, ties its head, returns an object."""

    def __init__(self, width=16):
        super().__init__()
        self.embedding, self.places = nn.Embedding(SIZE, width), nn.Embedding(300, width)
        self.qkv, self.lm_head = nn.Linear(width, 3 * width), nn.Linear(width, SIZE, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids, position_ids, attention_mask=None):
        hidden = self.embedding(input_ids) + self.places(position_ids)
        q, k, v = self.qkv(hidden).chunk(3, -1)
        n = input_ids.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()[None]
        if attention_mask is not None:
            mask = (mask & attention_mask[:, None].bool()) | torch.eye(n, dtype=torch.bool)
        hidden = hidden + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return SimpleNamespace(logits=self.lm_head(hidden))


class Isolating(Attending):
    """The same, but documents of a row don't see each other; a document begins where positions restart."""

    def forward(self, input_ids, position_ids, attention_mask=None):
        hidden = self.embedding(input_ids) + self.places(position_ids)
        q, k, v = self.qkv(hidden).chunk(3, -1)
        n, document = input_ids.shape[1], (position_ids == 0).cumsum(1)
        mask = torch.ones(n, n, dtype=torch.bool).tril() & (document[:, None] == document[:, :, None])
        return self.lm_head(hidden + F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Capped(Recurrent):
    """Logits that are not those of a linear layer."""

    def forward(self, input_ids):
        return 3 * torch.tanh(super().forward(input_ids) / 3)


class Blocks(nn.Sequential):
    """A `Sequential`: its submodules have no names, and it has no class of its own."""

    def __init__(self):
        super().__init__(nn.Embedding(SIZE, 16), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, SIZE))


def new(cls, **kwargs):
    torch.manual_seed(0)
    return cls(**kwargs)


def update_alone(net, optimizer, rows, targets_of):
    """An update of a plain loop: the loss summed over all targets / their number, one unpadded row at a time."""
    losses = []
    for ids, targets in rows:
        places = {"position_ids": torch.arange(len(ids))[None]} if isinstance(net, Attending) else {}
        out = net(ids[None], **places)
        logits = getattr(out, "logits", out)[0, :-1]
        losses.append(F.cross_entropy(logits[targets[1:]], ids[1:][targets[1:]], reduction="sum"))
    optimizer.zero_grad()
    (sum(losses) / targets_of).backward()
    optimizer.step()


def plain_loop(net, examples, updates):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for ids in updates:
        rows = [(torch.from_numpy(examples[i].input_ids).long(), torch.from_numpy(examples[i].loss_mask)) for i in ids]
        update_alone(net, optimizer, rows, sum(int(mask.sum()) for _, mask in rows))
    return dict(net.named_parameters())


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("cls", [Recurrent, Attending, Isolating, Capped, Blocks])
def test_sft_of_a_module_is_a_plain_loop(tmp_path, cls, packing):
    rows, net = data(tmp_path, n=24, packing=packing, batch_size=2 if packing else 6), new(cls)
    sft = SFT(net, optimizer=sgd)
    trainer(max_steps=3).fit(sft, rows)
    assert sft.causal_lm.layout is (documents if cls in (Isolating, Blocks) else padded)
    plan, size = rows.plan(0), rows.batch_size
    updates = [[i for row in range(u * size, (u + 1) * size) for i in plan.row(row)] for u in range(3)]
    assert all(map(len, updates))
    expected = plain_loop(new(cls), rows.examples("train"), updates)
    assert distance(dict(net.named_parameters()), expected) < 1e-6


@pytest.mark.parametrize("cls", [Recurrent, Isolating])
def test_pretraining_of_a_module_is_a_plain_loop(tmp_path, cls):
    file = tmp_path / "corpus.txt"
    file.write_text("".join(chr(97 + i * i % 23) for i in range(400)))
    corpus = PretrainData(str(file), tokenizer=ByteTokenizer(chat_template=False), max_length=32, batch_size=2, seed=0)
    net, seen = new(cls), []

    class Recorded(Pretrain):
        def training_step(self, batch, batch_idx):
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    trainer(max_steps=3).fit(Recorded(net, optimizer=sgd), corpus)
    expected = new(cls)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for batch in seen:  # all tokens of 2 x 32 are targets; the last one of a row is the next row's first
        ids = batch["input_ids"].view(2, 32)
        places = {"position_ids": torch.arange(32).expand(2, 32)} if cls is Isolating else {}
        optimizer.zero_grad()
        F.cross_entropy(expected(ids, **places).flatten(0, 1)[batch["predictors"]], batch["targets"]).backward()
        optimizer.step()
        assert len(batch["targets"]) in (63, 64)
    assert len(seen) == 3
    assert distance(dict(net.named_parameters()), dict(expected.named_parameters())) < 1e-6


def test_the_head_is_identified_by_its_output():
    """A detected head runs only at targets, so the full logits are never in memory."""
    heads = {
        cls: SFT(new(cls)).build(ByteTokenizer().build()).hf.body.head_name for cls in (Recurrent, Attending, Blocks)
    }
    assert heads == {Recurrent: "head", Attending: "lm_head", Blocks: "3"}
    assert SFT(new(Capped)).build(ByteTokenizer().build()).hf.body.head_name is None


class Seeing(Recurrent):
    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        return self.head(hidden + hidden.mean(1, keepdim=True))


class LastOnly(Recurrent):
    def forward(self, input_ids):
        return super().forward(input_ids)[:, -1:]


class OneHot(nn.Linear):
    def forward(self, input_ids):
        return super().forward(F.one_hot(input_ids, SIZE).float())


class Text(Recurrent):
    def forward(self, input_ids):
        return "no logits"


REFUSED = {
    "later tokens": (lambda: SFT(new(Seeing)), "the logits of Seeing depend on later tokens"),
    "the last token alone": (lambda: SFT(new(LastOnly)), r"LastOnly returns logits \[1, 1, 260\] for token ids"),
    "no embedding": (lambda: SFT(OneHot(SIZE, SIZE)), "OneHot calls no nn.Embedding on the token ids"),
    "no logits": (lambda: SFT(new(Text)), "forward returns str"),
    "another kind of input": (lambda: SFT(nn.Linear(2, 2)), r"Linear can't be called on token ids"),
    "no parameters": (lambda: SFT(nn.Identity()), "Identity has no parameters"),
    "a small vocabulary": (
        lambda: SFT(new(Recurrent, vocabulary=9)).build(ByteTokenizer().build()),
        "the tokenizer has 260 tokens, the model's vocabulary 9",
    ),
    "a config": (lambda: SFT(new(Recurrent), {"hidden_size": 8}), "model.config: Recurrent was passed as an object"),
    "recomputation": (
        lambda: SFT(new(Recurrent), gradient_checkpointing=True).build(None),
        "model.gradient_checkpointing: Recurrent does not support it",
    ),
    "attention": (lambda: SFT(new(Recurrent), attn="sdpa").build(None), "model.attn: Recurrent has none"),
    "scores": (lambda: Reward(new(Recurrent)), "Reward gives scores; pass the name or folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_modules_are_refused_in_one_line(case):
    make, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_table_of_positions_that_is_too_short_is_named(tmp_path):
    class Short(Attending):
        def __init__(self):
            super().__init__()
            self.places = nn.Embedding(20, 16)

    with pytest.raises(UserError, match=r"Short fails on a row of \d+ tokens .*set data.max_length"):
        trainer(max_steps=1).fit(SFT(new(Short), optimizer=sgd), data(tmp_path, n=8))


def test_added_tokens_need_rows_of_the_module():
    tokenizer = ByteTokenizer().build()
    added = [tokenizer.add_tokens("<new>") and len(tokenizer) - 1]
    with pytest.raises(UserError, match="the tokenizer has 261 tokens with those that were added, and Recurrent has"):
        SFT(new(Recurrent)).build(tokenizer, added)
    net = new(Recurrent, vocabulary=261)
    SFT(net).build(tokenizer, added)
    assert torch.allclose(net.head.weight[260], net.head.weight[:260].mean(0), atol=1e-6)
    with torch.no_grad():
        net.head.weight[260] = 1.0
    SFT(net).build(tokenizer, added)
    assert float(net.head.weight[260].min()) == 1.0, "trained meanwhile"


def test_freeze_and_groups_use_the_modules_own_names(tmp_path):
    net = new(Recurrent)
    before = {name: p.clone() for name, p in net.named_parameters()}
    sft = SFT(net, freeze=["layer"], groups={"head": {"lr": 0.0}}, optimizer=sgd)
    trainer(max_steps=1).fit(sft, data(tmp_path, n=8))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"embedding.weight"}
    with pytest.raises(UserError, match="the model has no module 'layr'; did you mean 'layer'"):
        SFT(net, freeze=["layr"]).build(None)


def test_a_preference_starts_at_ln_2_and_adapters_train(tmp_path):
    net = new(Attending)
    dpo, loop = DPO(net, optimizer=sgd, lora={"r": 2, "target_modules": ["qkv"]}), trainer(max_steps=1)
    loop.fit(dpo, dpo_data(tmp_path, n=4))
    assert float(loop.callback_metrics["train/loss"]) == pytest.approx(0.6931472, abs=1e-6)
    assert any("lora_B" in n and float(p.abs().max()) > 0 for n, p in dpo.named_parameters())
    dpo.save(tmp_path / "merged", merge=True)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == {
        *("embedding.weight", "places.weight", "qkv.weight", "qkv.bias")
    }


@pytest.mark.parametrize("cls", [Recurrent, Attending])
def test_a_completion_does_not_depend_on_the_others_of_its_batch(cls):
    """Prompts are padded on the left, which a module without a mask would read as tokens."""
    model = SFT(new(cls)).build(ByteTokenizer().build())
    with torch.no_grad():
        for p in model.parameters():  # sharper, so that argmax differs between prompts
            p.mul_(4)
    prompts = [[5, 6, 7, 8, 9, 10], [60, 61], [100]]
    together = complete(model.hf, ByteTokenizer().build(), prompts, max_new_tokens=6)
    alone = [complete(model.hf, ByteTokenizer().build(), [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone
    assert len(set(alone)) > 1


def test_an_export_can_be_built_from_its_folder(tmp_path):
    net = new(Recurrent, width=12)
    sft = SFT(net, optimizer=sgd)
    trainer(max_steps=1).fit(sft, data(tmp_path, n=8))
    sft.save(tmp_path / "model", tokenizer=ByteTokenizer().build(), card="A module.")
    description = json.loads((tmp_path / "model" / "module_config.json").read_text())
    assert description == {
        "class_path": "tests.modules.test_plain.Recurrent",
        "init_args": {"vocabulary": SIZE, "width": 12},
    }
    again = load_module(tmp_path / "model")
    assert distance(again.state_dict(), net.state_dict()) == 0
    assert distance(dict(SFT(again).build(None).hf.plain.named_parameters()), dict(net.named_parameters())) == 0


def test_an_export_that_can_not_be_built_says_how_to_load_it(tmp_path):
    class Local(Attending):
        pass

    net = new(Local)
    sft = SFT(net)
    sft.assemble(ByteTokenizer().build())
    sft.save(tmp_path / "model")
    description = json.loads((tmp_path / "model" / "module_config.json").read_text())
    assert description["init_args"] is None
    assert description["how_to_load"].endswith("then oumi_pl.models.plain.load_weights(module, folder)")
    with pytest.raises(UserError, match=r"the arguments of .*Local are not known: build .*load_weights"):
        load_module(tmp_path / "model")
    other = Local()
    load_weights(other, tmp_path / "model")
    assert distance(other.state_dict(), net.state_dict()) == 0
    with pytest.raises(UserError, match=r"in the file and missing in Recurrent"):
        load_weights(new(Recurrent), tmp_path / "model")


@pytest.mark.slow
def test_a_module_trains_compiled(tmp_path):
    nets = [new(Attending), new(Attending)]
    for net, compile in zip(nets, (False, True), strict=True):
        trainer(max_steps=2).fit(SFT(net, optimizer=sgd, compile=compile), data(tmp_path, n=8))
    assert distance(*(dict(net.named_parameters()) for net in nets)) < 1e-6
