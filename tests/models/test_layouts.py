"""A forest of segments in three layouts against each path run alone, with transformers' own model and full logits."""

import random
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oumi_pl.attention import NAME
from oumi_pl.data.collate import collate
from oumi_pl.data.tokenizers import ByteTokenizer
from oumi_pl.errors import UserError
from oumi_pl.losses import linear_head
from oumi_pl.losses.causal import CrossEntropy
from oumi_pl.models import lm
from oumi_pl.models.lm import LM, States, choose_layout, documents, forest, padded, positions
from oumi_pl.modules.dpo import DPO
from oumi_pl.modules.sft import SFT
from oumi_pl.types import Example, Segment
from tests.attention.test_documents import RECURRENT, VOCAB, assert_close, make, registered
from tests.tiny import LLAMA, dpo, dpo_data, fit, module, sgd
from tests.tiny import data as sft_data
from tests.trees import batch_of, naive_paths, random_example

__all__ = ["registered"]  # the fixture

LENGTHS = [(5, 4, 7), (1, 1, 3), (9, 6, 1), (1, 1, 1), (3, 2, 2)]  # prompt, chosen, rejected
LAYOUTS = {"forest": (forest, NAME), "documents": (documents, NAME), "padded": (padded, None)}
"""Name -> layout, and the attention that it needs."""
MODELS = {
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "mistral": {},  # a window of 4, less than most sequences
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
}


def pairs():
    """Ragged pairs. Some response tokens carry no loss, but the first of each response always does."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for lengths in LENGTHS:
        prompt, chosen, rejected = lengths
        ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
        mask = torch.rand(sum(lengths), generator=generator) < 0.7
        mask[:prompt] = False
        mask[[prompt, prompt + chosen]] = True
        segments = Segment(prompt + chosen), Segment(rejected, parent=0, shared=prompt)
        examples.append(Example(ids.numpy().astype(np.int32), mask.numpy(), segments))
    return examples


def random_forest(seed, depth, examples=3):
    """Random trees of up to `depth` segments below each other, at least one of them that deep, with some targets."""
    rng = random.Random(seed)
    depths = [depth, *(rng.randint(1, depth) for _ in range(examples - 1))]
    trees = [random_example(rng, deep, VOCAB, longest=8) for deep in depths]
    return trees if any(tree.target_tokens for tree in trees) else random_forest(seed + 1000, depth, examples)


def paths_alone(model, examples):
    """For each segment of each example: its path `[1, length]`, its positions in the example, last hidden states."""
    for example in examples:
        for segment, path in zip(example.segments, naive_paths(example.segments), strict=True):
            ids = torch.from_numpy(example.input_ids[path].astype(np.int64))[None]
            yield example, segment, path, model(ids, use_cache=False, output_hidden_states=True)


def one_by_one(model, examples):
    """Log-probabilities of all targets, each path run alone through the whole head."""
    logps = []
    for example, segment, path, output in paths_alone(model, examples):
        every = nn.functional.log_softmax(output.logits[0], -1)
        targets = [k for k in range(segment.shared, len(path)) if example.loss_mask[path[k]]]
        logps += [every[k - 1, int(example.input_ids[path[k]])] for k in targets]
    return torch.stack(logps)


def projected(logps):
    """A scalar that weighs every number differently, so that no error cancels."""
    return (logps * torch.linspace(-1, 2, len(logps))).sum()


def gradients(model, value):
    actual = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in actual]


def assert_equal_to_paths_alone(layout, attention, name, examples, dtype=torch.float32, **changes):
    model, reference = (make(name, implementation, **changes).to(dtype) for implementation in (attention, "eager"))
    ours, theirs = LM(model.train(), layout)(batch_of(*examples)), one_by_one(reference, examples)
    assert ours.dtype == dtype
    assert_close([ours], [theirs])
    assert_close(gradients(model, projected(ours)), gradients(reference, projected(theirs)))


# ---- the same numbers in every layout


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_equal_each_response_alone(layout, name):
    assert_equal_to_paths_alone(*LAYOUTS[layout], name, pairs(), **MODELS[name])


@pytest.mark.parametrize(
    ("name", "attention", "dtype"),
    [("mamba", None, torch.float64), ("qwen3_next", "eager", torch.float32)],  # Mamba adds up rounding errors
)
def test_padded_rows_are_exact_for_models_that_can_not_pack(name, attention, dtype):
    for seed in range(3):
        assert_equal_to_paths_alone(padded, attention, name, random_forest(seed, 2), dtype, **RECURRENT[name])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_forests_equal_each_path_alone(layout, depth):
    for seed in range(6):
        assert_equal_to_paths_alone(*LAYOUTS[layout], "llama", random_forest(seed, depth))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_end_of_each_segment_is_that_of_its_path_alone(layout):
    """What a reward head or a classifier reads."""
    arrange, attention = LAYOUTS[layout]
    for seed in range(5):
        examples = random_forest(seed, 4)
        ends = LM(make("llama", attention), arrange)(batch_of(*examples), lambda states: states.ends)
        alone = [output.hidden_states[-1][0, -1] for *_, output in paths_alone(make("llama", "eager"), examples)]
        assert_close(ends, alone)


# ---- few lengths, for half precision on a CPU


@pytest.mark.parametrize(
    ("layout", "name"), [*product(LAYOUTS, MODELS), ("padded", "mamba"), ("padded", "mamba2")], ids="-".join
)
def test_longer_rows_change_no_number(layout, name, monkeypatch):
    widths, pad = [], lm.padded_to_few_lengths

    def measured(inputs, *args):
        longer = pad(inputs, *args)
        widths.append((inputs["input_ids"].shape[1], longer["input_ids"].shape[1]))
        return longer

    monkeypatch.setattr(LM, "_has_kernel_per_shape", lambda self: True)
    monkeypatch.setattr(lm, "padded_to_few_lengths", measured)
    arrange, attention = LAYOUTS[layout]
    single = [Example(np.arange(3, 14, dtype=np.int32), np.arange(11) > 0)]
    for examples in (random_forest(0, 3), random_forest(1, 3), single):
        dtype = torch.float64 if name.startswith("mamba") else torch.float32  # Mamba adds up rounding errors
        assert_equal_to_paths_alone(arrange, attention, name, examples, dtype, **(MODELS | RECURRENT)[name])
    if name == "mixtral":  # its router loss is a mean over all positions
        assert not widths
    else:
        assert len(widths) == 3 and any(after > before for before, after in widths[:2])
        # without a mask or attention of ours, nothing would tell the row from its padding
        assert widths[-1] == ((11, 11) if layout == "padded" else (11, 16))


def test_there_are_few_lengths_and_none_is_much_longer():
    lengths = []
    for width in range(1, 5000):
        ids = torch.zeros(1, width, dtype=torch.long)
        inputs = lm.padded_to_few_lengths({"input_ids": ids, "position_ids": ids}, has_own_attention=True)
        lengths.append(inputs["input_ids"].shape[1])
        assert width <= lengths[-1] < max(width * 17 / 16, width + 8)
        assert lengths[-1] == inputs["position_ids"].shape[1]
        assert lengths[-1] == sum(segment.length for segment in inputs.get("segments", [Segment(width)]))
    assert len(set(lengths)) <= 32 + 5 * 16


def test_one_row_per_document_gets_no_longer_than_the_longest_of_the_data():
    """A model may have no more positions."""
    ids = torch.zeros(2, 98, dtype=torch.long)
    inputs = {"input_ids": ids, "position_ids": ids, "attention_mask": torch.ones_like(ids), "lengths": [98, 90]}
    for longest, width in [(None, 104), (100, 100), (98, 98), (500, 104)]:
        longer = lm.padded_to_few_lengths(inputs, False, longest)
        assert {longer[name].shape for name in ("input_ids", "position_ids", "attention_mask")} == {(2, width)}
        assert longer["attention_mask"].sum() == 2 * 98 and longer["lengths"] == [98, 90]


class Shapes(TorchDispatchMode):
    """Records the shapes of all matrix products in half precision."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            matrices = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.dim() == 2]
            if matrices[0].dtype == torch.bfloat16:
                self.seen.add(tuple(matrix.shape for matrix in matrices))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("is_mended", [True, False], ids=["few", "planted fault"])
@pytest.mark.parametrize("precision", ["mixed", "true"])
@pytest.mark.parametrize("compute", [States.logps, lambda states: states.loss_sum(CrossEntropy()).loss_sum])
def test_half_precision_on_a_cpu_computes_products_of_few_shapes(compute, precision, is_mended, monkeypatch):
    """OneDNN compiles and keeps a kernel for each shape, 0.5 MB of memory."""
    if not is_mended:
        monkeypatch.setattr(lm, "padded_to_few_lengths", lambda inputs, *_: inputs)
        monkeypatch.setattr(linear_head, "pad_rows", lambda matrix, multiple: matrix)
    model = make("llama", NAME).train()
    model = LM(model if precision == "mixed" else model.bfloat16(), forest)
    lengths = range(512, 640, 4)
    with Shapes() as shapes, torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        for length in lengths:
            ids = np.arange(length, dtype=np.int32) % VOCAB
            examples = [Example(ids[:100], np.arange(100) > 40), Example(ids[100:], np.arange(length - 100) > 7)]
            model(batch_of(*examples), compute).sum().backward()
    of_rows = {shape for pair in shapes.seen for matrix in pair for shape in matrix if shape > VOCAB}
    assert len(shapes.seen) > 10
    assert len(of_rows) < 10 if is_mended else len(of_rows) >= len(lengths)


# ---- rectangles


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_of_equal_length_are_a_plain_rectangle(layout):
    arrange, attention = LAYOUTS[layout]
    examples = [Example(np.arange(i, i + 6, dtype=np.int32), np.arange(6) > 0) for i in range(3)]
    inputs, places = arrange(batch_of(*examples))
    assert places is None
    assert set(inputs) == {"input_ids", "position_ids"}
    assert inputs["input_ids"].tolist() == [[*range(i, i + 6)] for i in range(3)]
    assert inputs["position_ids"].tolist() == [[*range(6)]] * 3
    assert_equal_to_paths_alone(arrange, attention, "llama", examples)


def parents_end(segments, index):
    """As if a segment continued the end of its parent's path, not its first `shared` tokens."""
    path = naive_paths(segments)[index]
    _, parent, shared = segments[index]
    return np.array([*naive_paths(segments)[parent][-shared:], *path[shared:]] if shared else path)


def one_place_on(segments, starts):
    return own_places(segments, starts) + 1


own_places = lm._own_places
FAULTS = {"path_positions": parents_end, "_own_places": one_place_on}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", ["documents", "padded"])
def test_a_wrong_path_or_position_would_be_caught(layout, fault, monkeypatch):
    monkeypatch.setattr(lm, fault, FAULTS[fault])
    arrange, attention = LAYOUTS[layout]
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(6):
            assert_equal_to_paths_alone(arrange, attention, "llama", random_forest(seed, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_segment_that_shares_one_token_less_would_be_caught(layout):
    """The reference reads the example's own segments, the model those of the batch."""
    arrange, attention = LAYOUTS[layout]
    example = Example(np.arange(3, 15, dtype=np.int32), np.arange(12) > 0, (Segment(8), Segment(4, 0, 5)))
    reference, model = one_by_one(make("llama", "eager"), [example]), LM(make("llama", attention), arrange)
    batch = batch_of(example)
    assert_close([model(batch)], [reference])
    wrong = batch | {"segments": [Segment(8), Segment(4, 0, 4)]}
    with pytest.raises(AssertionError, match="off by"):
        assert_close([model(wrong)], [reference])


# ---- what is computed


def test_the_layouts_of_two_pairs_written_out():
    """Ids, positions, and where each token's hidden state is: a token that paths repeat has one place."""
    first = Example(np.arange(10, 15), mask(5, [2, 4]), (Segment(4), Segment(1, 0, 2)))
    second = Example(np.arange(20, 24), mask(4, [1, 2, 3]), (Segment(2), Segment(2, 0, 1)))
    batch = batch_of(first, second)
    inputs, places = forest(batch)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13, 14, 20, 21, 22, 23]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert inputs["segments"] == [(4, -1, 0), (1, 0, 2), (2, -1, 0), (2, 2, 1)]
    assert places is None
    assert batch["predictors"].tolist() == [1, 1, 5, 5, 7]
    inputs, places = documents(batch)
    assert inputs["input_ids"].tolist() == [[10, 11, 12, 13, 10, 11, 14, 20, 21, 20, 22, 23]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]]
    assert inputs["segments"] == [Segment(4), Segment(3), Segment(2), Segment(3)]
    assert places.tolist() == [0, 1, 2, 3, 6, 7, 8, 10, 11]
    assert places[batch["predictors"]].tolist() == [1, 1, 7, 7, 10]
    inputs, places = padded(batch)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert inputs["lengths"] == lengths
    real = [row[:length] for row, length in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
    assert real == [[10, 11, 12, 13], [10, 11, 14], [20, 21], [20, 22, 23]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3]] * 4
    assert places.tolist() == [0, 1, 2, 3, 6, 8, 9, 13, 14]
    assert places[batch["predictors"]].tolist() == [1, 1, 8, 8, 13]


def mask(length, targets):
    built = np.zeros(length, dtype=bool)
    built[targets] = True
    return built


def padding_changed(batch):
    """The padded layout with other tokens in the padding."""
    inputs, places = padded(batch)
    ids = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], inputs["input_ids"] + 1)
    return lm.Arranged(inputs | {"input_ids": ids % VOCAB}, places)


def test_nothing_depends_on_what_the_padding_holds():
    model, batch = make("llama", None), batch_of(*random_forest(1, 3))
    assert not torch.equal(padding_changed(batch).inputs["input_ids"], padded(batch).inputs["input_ids"])
    assert torch.equal(LM(model, padding_changed)(batch), LM(model, padded)(batch))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_counts_what_a_layout_computes(layout):
    arrange, attention = LAYOUTS[layout]
    model = LM(make("llama", attention), arrange)
    computed = []
    model.hf.model.embed_tokens.register_forward_hook(lambda _, args, out: computed.append(out.shape[:2].numel()))
    equal = [Example(np.arange(6, dtype=np.int32), np.arange(6) > 0)] * 3
    batches = [batch_of(*random_forest(seed, depth)) for depth in (1, 2, 3, 4) for seed in range(10)]
    for batch in [*batches, batch_of(*pairs()), batch_of(*equal), collate([], pad_id=0)]:
        computed.clear()
        model(batch)
        assert [positions(batch, arrange)] == [model.positions(batch)] == computed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_router_loss_is_that_of_the_tokens_that_were_run(layout):
    """Where the prompt is shared its tokens are routed once, else twice; padding is not counted."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    arrange, attention = LAYOUTS[layout]
    model, reference = (make("mixtral", attn, **MODELS["mixtral"]) for attn in (attention, "eager"))
    routed = []
    for example in pairs():
        for segment, path in zip(example.segments, naive_paths(example.segments), strict=True):
            ids = torch.from_numpy(example.input_ids[path].astype(np.int64))[None]
            logits = reference(ids, use_cache=False, output_router_logits=True).router_logits
            skipped = segment.shared if arrange is forest else 0
            routed.append([layer[skipped:] for layer in logits])
    layers = tuple(torch.cat(layer) for layer in zip(*routed, strict=True))
    expected = 0.5 * load_balancing_loss_func(layers, 4, reference.config.num_experts_per_tok)
    policy, batch = LM(model.train(), arrange), batch_of(*pairs())
    actual = policy(batch, lambda states: states.router_loss)
    assert_close([actual], [expected])
    names = [name for name, _ in model.named_parameters()]
    routers = [i for i, name in enumerate(names) if "gate.weight" in name]
    ours, theirs = gradients(model, actual), gradients(reference, expected)
    assert_close([ours[i] for i in routers], [theirs[i] for i in routers])
    assert policy.eval()(batch, lambda states: states.router_loss) is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_rows_gives_every_parameter_a_gradient_of_zero(layout, name):
    arrange, attention = LAYOUTS[layout]
    model = make(name, attention, **MODELS[name])
    logps, router_loss = LM(model.train(), arrange)(collate([], pad_id=0), lambda s: (s.logps(), s.router_loss))
    assert logps.shape == (0,)
    (logps.sum() + 0 * (0 if router_loss is None else router_loss)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()] == []


# ---- which layout


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer().build()


def test_prompts_are_shared_where_the_model_can(tokenizer):
    policy = dpo().build(tokenizer, branching=True)
    assert (policy.layout, policy.layout_reason) == (forest, "")
    assert policy.base.config._attn_implementation == NAME


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_documents_where_the_attention_is_not_ours(tokenizer, attn):
    policy = dpo(attn=attn).build(tokenizer, branching=True)
    assert policy.layout is documents
    assert "mixes responses" in policy.layout_reason
    assert policy.base.config._attn_implementation == attn


def test_documents_where_sharing_is_off(tmp_path, tokenizer):
    model = dpo(share_prompt=False)
    assert model.build(tokenizer, branching=True).layout is documents
    fit(model, dpo_data(tmp_path, 4), max_steps=1)
    assert model.causal_lm.layout is documents
    assert model.notes[1] == "prompts are computed for each response: share_prompt is off"


UNABLE = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2} | RECURRENT["mamba"],
    "qwen3_next": {**LLAMA, "head_dim": 8} | RECURRENT["qwen3_next"],
    "gemma2": {**LLAMA, "head_dim": 8},  # a soft cap on attention logits
}


@pytest.mark.parametrize("name", UNABLE)
def test_pairs_are_padded_where_nothing_else_is_exact_and_the_model_trains(tmp_path, name):
    model = DPO(config=UNABLE[name] | {"model_type": name}, optimizer=sgd)
    fit(model, dpo_data(tmp_path, 4, batch_size=2), max_steps=2)
    policy = model.causal_lm
    assert policy.layout is padded
    assert policy.layout_reason
    assert policy.base.config._attn_implementation != NAME
    assert f"computed for each response: {policy.layout_reason}" in model.notes[1]


@pytest.mark.parametrize("name", ["mamba", "gemma2"])
def test_packed_documents_are_padded_where_nothing_else_is_exact_and_the_model_trains(tmp_path, name):
    """Packed or not, the model gets the same weights."""
    model, apart = (SFT(config=UNABLE[name] | {"model_type": name}, optimizer=sgd) for _ in range(2))
    packed = fit(model, sft_data(tmp_path, 4, packing=True, max_length=512, batch_size=9), max_steps=1)
    unpacked = fit(apart, sft_data(tmp_path, 4, max_length=512, batch_size=9), max_steps=1)
    assert model.causal_lm.layout is padded
    (note,) = model.notes
    assert note == f"packed documents are computed in rows of their own, padded: {model.causal_lm.layout_reason}"
    assert note.count("see each other") + note.count("can't keep packed documents apart") + note.count("soft cap") > 0
    assert apart.notes == []
    for parameter, value in packed.items():
        torch.testing.assert_close(value, unpacked[parameter], rtol=1e-5, atol=1e-6, msg=parameter)


def test_a_model_that_packs_has_no_note(tmp_path):
    model = module()
    fit(model, sft_data(tmp_path, 4, packing=True), max_steps=1)
    assert model.causal_lm.layout is not padded
    assert model.notes == []


def test_choosing_tries_what_it_chooses():
    assert choose_layout(make("llama", NAME)) == (forest, "")
    assert choose_layout(make("llama", NAME), share=False) == (documents, "")
    assert choose_layout(make("llama", "sdpa"))[0] is documents
    layout, why = choose_layout(make("mamba", None, **RECURRENT["mamba"]))
    assert layout is padded
    assert "Mamba" in why


def test_shared_prompts_can_be_required(tokenizer):
    assert dpo(share_prompt=True).build(tokenizer, branching=True).layout is forest
    with pytest.raises(UserError, match=r"model\.share_prompt: .*mixes responses"):
        dpo(share_prompt=True, attn="eager").build(tokenizer, branching=True)
    with pytest.raises(UserError, match=r"model\.share_prompt: Mamba"):
        DPO(share_prompt=True, config=UNABLE["mamba"] | {"model_type": "mamba"}).build(tokenizer, branching=True)


# ---- dropout

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
DROPPING = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_off_in_training(tokenizer, name, monkeypatch):
    config = SMALL | DROPPING[name] | {"model_type": name}

    def differs():
        model = DPO(config=config, lora={"r": 2, "lora_dropout": 0.5, "init_lora_weights": False})
        policy = model.build(tokenizer, branching=True)
        assert policy.training
        one, other = (policy(batch_of(*pairs())) for _ in range(2))
        return not torch.equal(one, other)

    assert not differs()
    monkeypatch.setattr("oumi_pl.modules.base.disable_dropout", lambda model: None)
    assert differs()


def test_dropout_stays_off_after_evaluation_and_checkpointing_stays_on(tokenizer):
    policy = dpo(config={"attention_dropout": 0.5}, gradient_checkpointing=True).build(tokenizer, branching=True)
    policy.eval().train()
    one, other = (policy(batch_of(*pairs())) for _ in range(2))
    assert torch.equal(one, other)
    assert policy.base.is_gradient_checkpointing
    plain = dpo().build(tokenizer, branching=True)
    plain.load_state_dict(policy.state_dict())
    expected = gradients(plain, projected(plain(batch_of(*pairs()))))
    assert_close(gradients(policy, projected(one)), expected)
