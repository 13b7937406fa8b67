"""Documents packed into one row against the same documents alone."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

from oumi_pl.attention import (
    NAME,
    interface,
    packed,
    refuse_unless_isolating,
    register,
    why_not_isolating,
    why_not_shared,
)
from oumi_pl.attention.segments import Blocks, blocks_of, current_blocks
from oumi_pl.errors import UserError
from oumi_pl.types import Segment

LENGTHS = [9, 1, 14, 6]
VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
    "gpt_neox": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 4},
    "smollm3": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": MOE,
    "llama4_text": {
        "attention_chunk_size": 4,
        "no_rope_layers": [1, 1],
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
    },
}


@pytest.fixture(autouse=True)
def registered():
    register()


def make(name, implementation=NAME, **changes):
    config = AutoConfig.for_model(name, **(SIZES | ARCHITECTURES.get(name, {}) | changes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():  # as they are initialised, tiny models hardly attend to anything
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (1, n), generator=generator) for n in LENGTHS]


def roots(lengths):
    return [Segment(n) for n in lengths]


def states(model, docs, **keywords):
    positions = torch.cat([torch.arange(d.shape[1]) for d in docs])[None]
    with packed(roots(d.shape[1] for d in docs)):
        base = body(model)
        return base(input_ids=torch.cat(docs, 1), position_ids=positions, use_cache=False, **keywords).last_hidden_state


def body(model):
    return model.model if hasattr(model, "model") else model.base_model


def gradients(model, value):
    grads = torch.autograd.grad(value, list(body(model).parameters()), allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in grads]


def project(hidden):
    """A scalar that weighs every number differently, so that no error cancels."""
    return (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).sum()


def assert_close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= tolerance * max(b.norm(), 1e-3), f"off by {(a - b).norm() / b.norm():.1e}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_alone(name):
    model, reference = make(name), make(name, "eager")
    ours = states(model, documents())
    theirs = torch.cat([body(reference)(d, use_cache=False).last_hidden_state for d in documents()], 1)
    assert_close([ours], [theirs])
    assert_close(gradients(model, project(ours)), gradients(reference, project(theirs)))
    refuse_unless_isolating(body(model))
    assert why_not_isolating(body(model)) is None


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3_text", "llama4_text"])
def test_neighbours_of_a_changed_document_stay_bit_identical(name):
    model = make(name).eval()
    docs = documents()
    before = states(model, docs).split(LENGTHS, 1)
    docs[2] = (docs[2] + 1) % VOCAB
    after = states(model, docs).split(LENGTHS, 1)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True]


def test_no_mask_is_built_and_no_product_is_larger_than_a_document(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **keywords):
        calls.append((query.shape[2], key.shape[2], attn_mask, keywords["is_causal"]))
        return real(query, key, value, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    states(make("llama"), documents())
    assert calls == [(n, n, None, n > 1) for n in LENGTHS] * 2


def test_a_window_masks_only_documents_that_are_longer(monkeypatch):
    masks = []
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        lambda module, q, k, v, mask, **s: masks.append(mask) or sdpa_attention_forward(module, q, k, v, mask, **s),
    )
    states(make("mistral", sliding_window=13, num_hidden_layers=1), documents())
    assert [m if m is None else m.shape for m in masks] == [None, None, (1, 1, 14, 14), None]
    i = torch.arange(14)
    assert torch.equal(masks[2][0, 0], (i[None] <= i[:, None]) & (i[None] > i[:, None] - 13))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3_text", "qwen3_moe"])
def test_checkpointing_recomputes_outside_of_packed(name):
    model = make(name).train()
    plain = states(model, documents())
    expected = gradients(model, project(plain))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = []
    model.base_model.register_forward_pre_hook(lambda *_: recomputed.clear())
    watched = next(m for m in model.modules() if m is not model and type(m).__name__.endswith("Attention"))
    watched.register_forward_hook(lambda *_: recomputed.append(current_blocks.get() is not None))
    hidden = states(model, documents())
    assert_close(gradients(model, project(hidden)), expected)
    assert recomputed == [True, False]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_padded_batches_equal_sdpa(name):
    ours, theirs = make(name), make(name, "sdpa")
    ids = torch.randint(3, VOCAB, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, :4] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with packed(None):
        hidden = ours.base_model(**arguments).last_hidden_state
    assert torch.equal(hidden, theirs.base_model(**arguments).last_hidden_state)
    assert_close(gradients(ours, project(hidden[0])), gradients(ours, project(ours.base_model(**arguments)[0][0])), 0)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_generation_equals_sdpa(name):
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(make(name).generate(**arguments), make(name, "sdpa").generate(**arguments))


def test_dropout_and_scaling_reach_each_document():
    torch.manual_seed(0)
    layer, dropout = nn.Identity(), 0.5
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    with packed(roots([3, 2])):
        mask = interface.make_mask(batch_size=1, q_length=5, kv_length=5, mask_function=None)
    got = interface.attend(layer, query, key, value, mask, scaling=0.3)[0]
    for rows in (slice(0, 3), slice(3, 5)):
        piece = [x[:, :, rows] for x in (query, key, value)]
        expected = nn.functional.scaled_dot_product_attention(*piece, scale=0.3, is_causal=True)
        assert torch.equal(got[:, rows], expected.transpose(1, 2))
    assert not torch.equal(interface.attend(layer, query, key, value, mask, scaling=0.3, dropout=dropout)[0], got)


def test_attention_in_bfloat16_is_that_of_float32_rounded():
    """On a CPU, where torch's attention takes longer in bfloat16."""
    layer = nn.Module()
    layer.is_causal = True
    states = torch.randn(3, 1, 2, sum(LENGTHS), 8, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    with packed([Segment(length) for length in LENGTHS]):
        size = sum(LENGTHS)
        mask = interface.make_mask(batch_size=1, q_length=size, kv_length=size, mask_function=causal_mask_function)
        result, _ = interface.attend(layer, *states, mask)
        expected, _ = interface.attend(layer, *states.float(), mask)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(interface.attend(layer, *states.float(), mask)[0], result)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected.bfloat16())
    assert not torch.equal(result, sdpa_attention_forward(layer, *states, None, is_causal=True)[0])


@pytest.mark.parametrize("is_autocast", [True, False])
def test_one_document_is_computed_in_the_precision_of_several(is_autocast):
    layer = nn.Module()
    layer.is_causal = True
    states = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    expected, _ = interface.attend(layer, *states.float(), None, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        result, _ = interface.attend(layer, *(states.float() if is_autocast else states), None, is_causal=True)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected.bfloat16())
    assert not torch.equal(result, sdpa_attention_forward(layer, *states, None, is_causal=True)[0])


def test_queries_that_rotary_positions_left_in_float32_reach_the_varlen_kernel_in_the_dtype_of_autocast(monkeypatch):
    """On a fake GPU. Autocast casts what sdpa is called with, but not the input of this kernel."""
    dtypes = []

    def kernel(query, key, value, *_):
        dtypes.extend(x.dtype for x in (query, key, value))
        return query.transpose(1, 2)

    monkeypatch.setattr(interface, "attend_varlen", kernel)
    monkeypatch.setattr(interface, "_parameters", lambda: {"window_size", "scale"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    blocks = Blocks(blocks_of(roots([5, 4])), True, None, lambda block: None, "cuda")
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)  # the context manager does nothing without a GPU
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        with FakeTensorMode():
            query, key = (torch.empty(1, 2, 9, 8, device="cuda") for _ in range(2))
            value = torch.empty(1, 2, 9, 8, device="cuda", dtype=torch.bfloat16)
            interface.attend(nn.Identity(), query, key, value, blocks)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    assert dtypes == [torch.bfloat16] * 3


def faulty(module, query, key, value, mask, **settings):
    """Plain causal attention over the whole row."""
    return sdpa_attention_forward(module, query, key, value, None, **settings)


@pytest.fixture
def fault():
    transformers.AttentionInterface.register("faulty", faulty)
    transformers.AttentionMaskInterface.register("faulty", lambda **_: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_attention_that_mixes_documents_is_refused(name, dtype, fault):
    model = make(name, "faulty").to(dtype)
    with pytest.raises(UserError, match=r"'faulty' lets packed documents .* 'documents' or 'flash_attention_2'"):
        refuse_unless_isolating(model)
    assert "lets packed documents see each other" in why_not_isolating(model)
    for implementation in (NAME, "sdpa", "eager"):
        refuse_unless_isolating(make(name, implementation).to(dtype))


def test_untouched_weights_show_a_mixture_too(fault):
    """The check has to work on models as they are initialised, when they hardly attend to anything."""
    config = AutoConfig.for_model("llama", **SIZES)
    with pytest.raises(UserError):
        refuse_unless_isolating(AutoModelForCausalLM.from_config(config, attn_implementation="faulty"))


RECURRENT = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "qwen3_next": MOE
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_architectures_are_refused(name):
    model = make(name, None if name.startswith("mamba") else NAME, **RECURRENT[name])
    with pytest.raises(UserError, match=r"data\.packing to false"):
        refuse_unless_isolating(model)


@pytest.mark.parametrize(
    ("error", "is_refused"),
    [
        (TypeError("no position_ids"), True),
        (RuntimeError("The size of tensor a (8) must match the size of tensor b (64)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate tensors of a size"), False),
        (MemoryError(), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ZeroDivisionError("a bug"), False),
    ],
)
def test_only_errors_of_the_attention_are_refusals(error, is_refused):
    def trip(*_):
        raise error

    model = make("llama")
    model.model.layers[0].register_forward_pre_hook(trip)
    kind = UserError if is_refused else type(error)
    with pytest.raises(
        kind, match=rf"apart \({type(error).__name__}: {str(error)[:8]}" if is_refused else None
    ) as raised:
        refuse_unless_isolating(model)
    assert (raised.value.__cause__ if is_refused else raised.value) is error
    for why in (why_not_isolating, why_not_shared):
        if is_refused:
            assert f"({type(error).__name__}: {error}" in why(model)
        else:
            with pytest.raises(type(error)):
                why(model)


def test_the_check_leaves_no_trace():
    def draw(*_):
        torch.rand(1)

    model = make("llama", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.model.layers[0].register_forward_pre_hook(draw)
    modes, before = [m.training for m in model.modules()], torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    refuse_unless_isolating(model)
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert current_blocks.get() is None


def test_the_check_sees_through_peft(fault):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    refuse_unless_isolating(peft.get_peft_model(make("llama"), config))
    with pytest.raises(UserError, match="LlamaModel"):
        refuse_unless_isolating(peft.get_peft_model(make("llama", "faulty"), config))


def test_terms_that_it_cannot_compute_are_refused():
    gemma2 = make("gemma2", sliding_window=4, attn_logit_softcapping=20.0)
    for call in (lambda: states(gemma2, documents()), lambda: gemma2(documents()[0])):
        with pytest.raises(UserError, match="soft cap"):
            call()
    refuse_unless_isolating(make("gemma2", sliding_window=4, attn_logit_softcapping=None))
    sinks = make("gpt_oss", num_local_experts=2, sliding_window=4)
    with pytest.raises(UserError, match="sinks"):
        states(sinks, documents())
    layer = nn.Identity()
    x = torch.randn(1, 2, 5, 4)
    with packed(roots([3, 2])):
        mask = interface.make_mask(batch_size=1, q_length=5, kv_length=5, mask_function=None)
    for argument in ("position_bias", "head_mask"):
        with pytest.raises(UserError, match=argument.replace("_", " ")):
            interface.attend(layer, x, x, x, mask, **{argument: torch.zeros(1)})
    with pytest.raises(UserError, match="not causal"):
        interface.attend(layer, x, x, x, mask, is_causal=False)


def test_what_is_no_packed_row_is_refused():
    wrapper = nn.Module()
    wrapper.base_model = make("llama")
    with pytest.raises(UserError, match="no hidden states"):
        refuse_unless_isolating(wrapper)
    refuse_unless_isolating(make("llama4_text"))  # its prefix names a part that it does not have
    model = make("llama")
    ids = torch.cat(documents(), 1)
    calls = {
        "two rows": {"input_ids": ids.expand(2, -1)},
        "a mask of ones": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "too short": {"input_ids": ids[:, 1:]},
    }
    for arguments in calls.values():
        with packed(roots(LENGTHS)), pytest.raises(ValueError, match="a single row"):
            model.model(**arguments, use_cache=False)
    x = torch.randn(1, 2, 5, 4)
    with packed(roots([3, 2])), pytest.raises(UserError, match="ignores"):
        interface.attend(nn.Identity(), x, x, x, None)


def test_a_cache_does_not_mix_documents():
    model = make("llama")
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with packed(roots(LENGTHS)):
        cached = model.model(torch.cat(documents(), 1), position_ids=positions, use_cache=True).last_hidden_state
    assert torch.equal(cached, states(model, documents()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_variable_length_kernel(name, monkeypatch):
    model = make(name).cuda().to(torch.bfloat16)
    docs = [d.cuda() for d in documents()]
    calls = []
    real = interface.attend_varlen
    monkeypatch.setattr(interface, "attend_varlen", lambda *a: calls.append(1) or real(*a))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()

    def run():
        with packed(roots(LENGTHS)):
            return model.base_model(torch.cat(docs, 1), position_ids=positions, use_cache=False).last_hidden_state

    fast = run()
    assert calls
    monkeypatch.setattr(interface, "varlen_fits", lambda *_: False)
    slow = run()
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(2)).cuda()
    assert (fast - slow).float().norm() <= 2e-2 * slow.float().norm()
    for a, b in zip(gradients(model, (fast * weights).sum()), gradients(model, (slow * weights).sum()), strict=True):
        assert (a - b).float().norm() <= 5e-2 * b.float().norm() + 1e-3
