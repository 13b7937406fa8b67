"""Segments that share tokens, in one packed row, against each path run alone as a sequence of its own."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from oumi_pl.attention import (
    NAME,
    interface,
    packed,
    path_positions,
    position_ids,
    probe,
    segments,
    why_not_shared,
)
from oumi_pl.errors import UserError
from oumi_pl.types import Segment

from .test_documents import ARCHITECTURES, RECURRENT, VOCAB, assert_close, body, make, registered

__all__ = ["registered"]  # the fixture

EXACT = [name for name in ARCHITECTURES if name != "llama4_text"]
FULL, WINDOW = ["full_attention"] * 2, ["sliding_attention", "full_attention"]
WINDOWS = {  # how to turn off a window of 4 tokens, and how to turn it on
    "qwen2": ({"use_sliding_window": False}, {}),
    "qwen3": ({}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "mistral": ({"sliding_window": None}, {}),
    "gemma3_text": ({"layer_types": FULL}, {}),
    "phi3": ({"sliding_window": None}, {}),
    "smollm3": ({}, {"use_sliding_window": True, "sliding_window": 4, "layer_types": WINDOW}),
    "mixtral": ({}, {"sliding_window": 4}),
    "qwen3_moe": ({}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
}
CASES = [(name, changes) for name in EXACT for changes in WINDOWS.get(name, ({},))]
CASE_IDS = [f"{name}{'-window' * n}" for name in EXACT for n in range(len(WINDOWS.get(name, ({},))))]


# ---- forests, and the reference: one sequence per segment


def naive_path(forest, index):
    """The definition, word by word: positions in the row."""
    length, parent, shared = forest[index]
    start = sum(s.length for s in forest[:index])
    own = list(range(start, start + length))
    return own if parent < 0 else naive_path(forest, parent)[:shared] + own


def random_forest(seed, depth):
    """Two or three trees that take turns in the row, each `depth` segments deep and with branches of any width.

    From depth 3 on, each has a segment that shares tokens of its grandparent only.
    """
    rng = random.Random(seed)
    trees = [[] for _ in range(rng.randint(2, 3))]
    forest, depths = [], []
    for number in rng.sample([*range(len(trees))] * (2 * depth), 2 * depth * len(trees)):
        tree, last = trees[number], len(trees[number]) == 2 * depth - 1
        parents = [i for i in tree if depths[i] < depth]
        inner = [i for i in parents if depths[i] > 1]
        if len(tree) < depth:
            parents = tree[-1:]  # a chain first
        elif last and inner:
            parents = inner
        parent = rng.choice(parents) if parents else -1
        available = 0 if parent < 0 else len(naive_path(forest, parent))
        shared = rng.choice([available, rng.randint(min(1, available), available)])
        if last and inner:
            shared = rng.randint(1, max(1, forest[parent].shared - 1))
        tree.append(len(forest))
        depths.append(1 if parent < 0 else depths[parent] + 1)
        forest.append(Segment(rng.randint(1, 6), parent, shared))
    assert max(depths) == depth
    return forest


def row_of(forest, seed=1):
    """Random tokens for each position of a row."""
    return torch.randint(3, VOCAB, (sum(s.length for s in forest),), generator=torch.Generator().manual_seed(seed))


def weights_of(forest):
    return [torch.randn(s.length, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(forest)]


def together(model, forest, ids, shift=0):
    """Logits of each segment's tokens, and all gradients of the weighted losses, from one packed row."""
    paths = [naive_path(forest, i) for i in range(len(forest))]
    positions = [p + shift * (s.shared > 0) for s in forest for p in range(s.shared, s.shared + s.length)]
    with packed(forest):
        logits = model(input_ids=ids[None], position_ids=torch.tensor([positions]), use_cache=False).logits[0]
    loss = logits.new_zeros(())
    for path, segment, weights in zip(paths, forest, weights_of(forest), strict=True):
        loss = loss + weighted_loss(logits[path], ids[path], segment.shared, weights)
    return list(logits.split([s.length for s in forest])), gradients(model, loss)


def separate(model, forest, ids):
    """The same from one sequence per segment. A token's loss counts where the token is its segment's own."""
    logits, grads = [], None
    for i, (segment, weights) in enumerate(zip(forest, weights_of(forest), strict=True)):
        path = ids[naive_path(forest, i)]
        alone = model(path[None], use_cache=False).logits[0]
        new = gradients(model, weighted_loss(alone, path, segment.shared, weights))
        grads = new if grads is None else [a + b for a, b in zip(grads, new, strict=True)]
        logits.append(alone[segment.shared :].detach())
    return logits, grads


def weighted_loss(logits, path, shared, weights):
    """Weighted sum of the losses of a path's own tokens, each predicted by the token before it in the path."""
    first = max(shared, 1)  # nothing predicts a root's first token
    losses = F.cross_entropy(logits[first - 1 : -1], path[first:], reduction="none")
    return (losses * weights[first - shared :]).sum()


def gradients(model, value):
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def assert_equal_to_separate(model, reference, forest, shift=0):
    ids = row_of(forest)
    ours, theirs = together(model, forest, ids, shift), separate(reference, forest, ids)
    assert_close(ours[0], theirs[0])
    assert_close(ours[1], theirs[1])


# ---- the law


@pytest.mark.parametrize(("name", "changes"), CASES, ids=CASE_IDS)
def test_a_row_equals_separate_sequences(name, changes):
    model, reference = make(name, **changes), make(name, "eager", **changes)
    for depth in (1, 2, 3, 4):
        for seed in (depth, 10 + depth):
            assert_equal_to_separate(model, reference, random_forest(seed, depth))
    assert why_not_shared(body(model)) is None


@pytest.mark.parametrize("name", WINDOWS)
def test_the_windows_of_these_cases_change_the_logits(name):
    forest = random_forest(4, 4)
    off, on = (separate(make(name, "eager", **changes), forest, row_of(forest))[0] for changes in WINDOWS[name])
    assert (torch.cat(off) - torch.cat(on)).norm() > 1e-2 * torch.cat(on).norm()


@pytest.mark.parametrize("seed", range(20))
def test_paths_equal_a_recursive_enumeration(seed):
    forest = random_forest(seed, 1 + seed % 6)
    for i, segment in enumerate(forest):
        path = path_positions(forest, i)
        assert path.tolist() == naive_path(forest, i)
        assert len(path) == segment.shared + segment.length
    own = [p for s in forest for p in range(s.shared, s.shared + s.length)]
    assert position_ids(forest).tolist() == own


@pytest.mark.parametrize("depth", [3, 4])
def test_these_forests_have_every_kind_of_branch(depth):
    for forest in (random_forest(depth, depth), random_forest(10 + depth, depth), probe.FOREST):
        parents = [(s, forest[s.parent]) for s in forest if s.parent >= 0 and forest[s.parent].parent >= 0]
        assert any(0 < s.shared <= parent.shared for s, parent in parents)  # ends inside the grandparent
        assert any(s.shared > parent.shared for s, parent in parents)
        children = [s.parent for s in forest if s.parent >= 0]
        assert any(children.count(parent) > 1 for parent in children)


def test_a_segment_that_shares_nothing_is_a_root():
    forest = [Segment(4), Segment(3, 0, 0), Segment(5, 1, 2)]
    assert path_positions(forest, 2).tolist() == [4, 5, 7, 8, 9, 10, 11]
    assert_equal_to_separate(make("llama"), make("llama", "eager"), forest)
    assert segments.blocks_of(forest)[1] == segments.Block(4, 3)


@pytest.mark.parametrize(
    ("forest", "index"),
    [
        ([Segment(3), Segment(2, 1, 1)], 1),
        ([Segment(3), Segment(2, 2, 1), Segment(3)], 1),
        ([Segment(3), Segment(2, 0, 4)], 1),
        ([Segment(3), Segment(2, 0, 2), Segment(1, 1, 5)], 2),
        ([Segment(3, -1, 1)], 0),
        ([Segment(3), Segment(-1)], 1),
        ([Segment(3), Segment(0, 0, 1)], 1),
        ([Segment(3), Segment(1, -2)], 1),
        ([Segment(3), Segment(1, 0, -1)], 1),
    ],
)
def test_impossible_segments_are_refused(forest, index):
    with pytest.raises(ValueError, match=f"segment {index} of"), packed(forest):
        pass
    assert segments.current_blocks.get() is None


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_a_segment_that_is_not_on_a_path_does_not_change_it(name):
    model = make(name).eval()
    forest = random_forest(4, 4)
    ids = row_of(forest)
    paths = [set(naive_path(forest, i)) for i in range(len(forest))]
    before = together(model, forest, ids)[0]
    for changed in range(len(forest)):
        other = ids.clone()
        own = naive_path(forest, changed)[forest[changed].shared :]
        other[own] = (other[own] + 1) % VOCAB
        for path, a, b in zip(paths, before, together(model, forest, other)[0], strict=True):
            if not path & set(own):
                assert torch.equal(a, b)
            elif name != "mistral":  # whose window may not reach that far
                assert not torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_checkpointing_recomputes_outside_of_packed(name):
    model, forest = make(name).train(), random_forest(4, 4)
    expected = together(model, forest, row_of(forest))[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(together(model, forest, row_of(forest))[1], expected)


def test_the_work_is_that_of_the_paths(monkeypatch):
    calls = []
    real = F.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **keywords):
        calls.append((query.shape[2], key.shape[2], attn_mask is not None, keywords["is_causal"]))
        return real(query, key, value, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    forest = random_forest(4, 4)
    together(make("llama", num_hidden_layers=1, num_key_value_heads=4), forest, row_of(forest))
    assert calls == [(n, shared + n, shared > 0, shared == 0 and n > 1) for n, _, shared in forest]


def test_blocks_cover_the_row_and_name_what_they_see():
    forest = [Segment(9), Segment(7, 0, 5), Segment(4), Segment(3, 1, 8), Segment(2, 3, 4), Segment(1, 3, 10)]
    row = segments.blocks_of(forest)
    assert [(b.start, b.length, b.keys) for b in row] == [
        (0, 9, 9),
        (9, 7, 12),
        (16, 4, 4),
        (20, 3, 11),
        (23, 2, 6),
        (25, 1, 11),
    ]
    assert [b.earlier for b in row] == [
        (),
        ((0, 5),),
        (),
        ((0, 5), (1, 3)),
        ((0, 4),),
        ((0, 5), (1, 3), (3, 2)),
    ]
    seen = segments.Blocks(row, True, None, lambda _: None, "cpu")
    assert seen.key_positions.tolist() == [p for i in range(len(forest)) for p in naive_path(forest, i)]
    assert seen.cumulative[0].tolist() == [0, 9, 16, 20, 23, 25, 26]
    assert seen.cumulative[1].tolist() == [0, 9, 21, 25, 36, 42, 53]
    assert segments.Blocks(row[:1], True, None, lambda _: None, "cpu").key_positions is None


# ---- the variable-length kernel, which CPUs don't have


def varlen_kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """What PyTorch documents of `varlen_attn`: per sequence, the last query stands at the last key."""
    outputs = []
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    assert window_size[1] == 0
    for i in range(len(cu_seq_q) - 1):
        queries = q[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)
        keys, values = (x[cu_seq_k[i] : cu_seq_k[i + 1]].transpose(0, 1) for x in (k, v))
        places = torch.arange(keys.shape[1])
        back = places[-queries.shape[1] :, None] - places
        seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
        heads = F.scaled_dot_product_attention(queries, keys, values, seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(heads.transpose(0, 1))
    return torch.cat(outputs)


def older_kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """PyTorch's before it knew of fewer key heads than query heads."""
    assert q.shape[1] == k.shape[1]
    return varlen_kernel(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.fixture(params=[varlen_kernel, older_kernel])
def varlen_calls(request, monkeypatch):
    """Rows go through the variable-length kernel's code, with a stand-in for the kernel; returns its calls."""
    calls = []
    real = interface.attend_varlen

    def fits(query, value, row, settings):
        return row.causal or (row.window is not None and row.window == settings.get("sliding_window"))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", request.param)
    monkeypatch.setattr(interface, "varlen_fits", fits)
    monkeypatch.setattr(interface, "attend_varlen", lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3_text"])
def test_gathered_keys_equal_separate_sequences(name, varlen_calls):
    model, reference = make(name), make(name, "eager")
    for depth in (1, 2, 3, 4):
        assert_equal_to_separate(model, reference, random_forest(depth, depth))
    assert len(varlen_calls) == 4 * 2  # rows x layers
    assert why_not_shared(model) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_variable_length_kernel(name, monkeypatch):
    model = make(name).cuda().to(torch.bfloat16)
    forest = random_forest(4, 4)
    ids, positions = row_of(forest).cuda()[None], torch.from_numpy(position_ids(forest)).cuda()[None]
    calls = []
    real = interface.attend_varlen
    monkeypatch.setattr(interface, "attend_varlen", lambda *a: calls.append(1) or real(*a))

    def run():
        with packed(forest):
            return body(model)(ids, position_ids=positions, use_cache=False).last_hidden_state

    fast = run()
    assert calls
    monkeypatch.setattr(interface, "varlen_fits", lambda *_: False)
    slow = run()
    weights = torch.randn(fast.shape, generator=torch.Generator().manual_seed(2)).cuda()
    assert (fast - slow).float().norm() <= 2e-2 * slow.float().norm()
    ours, theirs = (gradients(body(model), (hidden * weights).sum()) for hidden in (fast, slow))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).float().norm() <= 5e-2 * b.float().norm() + 1e-3


# ---- planted faults: the comparison, and the check before training, notice each


def with_pieces(pieces):
    """A fault in which tokens of earlier segments a path is made of."""
    original = segments.blocks_of

    def faulty(forest):
        return tuple(replace(block, earlier=pieces(forest, i)) for i, block in enumerate(original(forest)))

    return lambda patch: patch.setattr(segments, "blocks_of", faulty)


def sharing(forest, index, shared):
    """The right pieces, for another number of shared tokens."""
    changed = [*forest[:index], forest[index]._replace(shared=shared)]
    return segments.earlier_pieces(changed, index)


def whole_parent(forest, index):
    parent = forest[index].parent
    return () if parent < 0 else sharing(forest, index, forest[parent].shared + forest[parent].length)


def one_more(forest, index):
    _, parent, shared = forest[index]
    return () if not shared else sharing(forest, index, min(shared + 1, forest[parent].shared + forest[parent].length))


def one_less(forest, index):
    return sharing(forest, index, max(forest[index].shared - 1, 0))


def parent_only(forest, index):
    return segments.earlier_pieces(forest, index)[-1:]


def cut_in_the_parent(forest, index):
    """`shared` counted among the parent's own tokens, not from the path's root."""
    _, parent, shared = forest[index]
    if parent < 0:
        return ()
    return *segments.earlier_pieces(forest, parent), (parent, min(shared, forest[parent].length))


def previous_segment(forest, index):
    shared = forest[index].shared
    return ((index - 1, min(shared, forest[index - 1].length)),) if shared else ()


def nearest_first(forest, index):
    return segments.earlier_pieces(forest, index)[::-1]


def with_mask(change):
    """A fault in the mask of segments that continue others."""
    return lambda patch: patch.setattr(interface, "_continued", change)


def mask(block, window, queries):
    keys = torch.arange(block.keys)
    seen = keys <= queries[:, None]
    return (seen if window is None else seen & (keys > queries[:, None] - window))[None, None]


def mask_from_zero(block, window, device):
    return mask(block, window, torch.arange(block.length))


def mask_without_window(block, window, device):
    return mask(block, None, block.prefix + torch.arange(block.length))


def window_by_row(block, window, device):
    """A window that goes by positions in the row: what is shared lies further back there."""
    right = mask(block, None, block.prefix + torch.arange(block.length))
    return right if window is None else right & mask(block, window, block.start + torch.arange(block.length))


def wider_window(block, window, device):
    return mask(block, window and window + 1, block.prefix + torch.arange(block.length))


FAULTS = {
    "sees no shared tokens": ("llama", with_pieces(lambda forest, index: ())),
    "sees the parent's whole path": ("llama", with_pieces(whole_parent)),
    "sees one token too many": ("llama", with_pieces(one_more)),
    "sees one token too few": ("llama", with_pieces(one_less)),
    "sees the last piece only": ("llama", with_pieces(parent_only)),
    "counts shared tokens in the parent": ("llama", with_pieces(cut_in_the_parent)),
    "continues the segment before": ("llama", with_pieces(previous_segment)),
    "takes pieces in the wrong order": ("mistral", with_pieces(nearest_first)),
    "aligns first query and first key": ("llama", with_mask(mask_from_zero)),
    "has no window": ("mistral", with_mask(mask_without_window)),
    "has a window by positions in the row": ("mistral", with_mask(window_by_row)),
    "has a window that is one too wide": ("mistral", with_mask(wider_window)),
}


@pytest.mark.parametrize(("name", "plant"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_noticed(name, plant, monkeypatch):
    model, reference = make(name), make(name, "eager")
    plant(monkeypatch)
    for seed in (4, 14, 24):
        with pytest.raises(AssertionError, match="off by"):
            assert_equal_to_separate(model, reference, random_forest(seed, 4))
    assert "mixes responses" in why_not_shared(model)


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_that_are_off_by_one_are_noticed(name, shift, monkeypatch):
    model, reference = make(name), make(name, "eager")
    for seed in (4, 14, 24):
        with pytest.raises(AssertionError, match="off by"):
            assert_equal_to_separate(model, reference, random_forest(seed, 4), shift)
    continued = [s.shared > 0 for s in probe.FOREST for _ in range(s.length)]
    real = position_ids
    monkeypatch.setattr(
        probe, "position_ids", lambda row: real(row) + (shift * torch.tensor(continued).numpy() if len(row) > 1 else 0)
    )
    assert "mixes responses" in why_not_shared(model)


def test_shared_keys_without_gradient_are_noticed(monkeypatch):
    model, reference, forest = make("llama"), make("llama", "eager"), random_forest(4, 4)
    real = interface._along_path

    def detached(own, index, block):
        return real([x if i == index else x.detach() for i, x in enumerate(own)], index, block)

    monkeypatch.setattr(interface, "_along_path", detached)
    ids = row_of(forest)
    ours, theirs = together(model, forest, ids), separate(reference, forest, ids)
    assert_close(ours[0], theirs[0])
    with pytest.raises(AssertionError, match="off by"):
        assert_close(ours[1], theirs[1])


# ---- models that can't share


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_own_attention_loses_the_shared_tokens(implementation):
    """Without our attention, positions that don't rise by one are taken for a new document."""
    model, forest = make("llama", implementation), random_forest(2, 2)
    with pytest.raises(AssertionError, match="off by"):
        assert_equal_to_separate(model, model, forest)
    assert "mixes responses" in why_not_shared(model)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_architectures_cannot_share(name):
    model = make(name, None if name.startswith("mamba") else NAME, **RECURRENT[name])
    assert why_not_shared(model)


OTHERS = {  # what each has that our attention does not: see the architecture's code
    "bloom": {"n_layer": 2, "n_head": 4},  # a position bias, added to the mask
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},  # likewise
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # attention written out in the model
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # convolutions
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},  # asks for a mask's size
}


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_with_terms_of_their_own_cannot_share(name):
    assert why_not_shared(make(name, **OTHERS[name]))


def test_chunks_cannot_be_shared():
    model = make("llama4_text")
    with pytest.raises(UserError, match="shared prompts"), packed([Segment(4), Segment(2, 0, 2)]):
        model.model(torch.arange(6)[None], position_ids=torch.tensor([[0, 1, 2, 3, 2, 3]]), use_cache=False)
    assert "shared prompts" in why_not_shared(model)
