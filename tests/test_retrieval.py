"""Dense knowledge retrieval: properties of equations (2) and (11), and refusals."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st

from diclip.cache import Cache, cache_values
from diclip.retrieval import READINGS, Adapter, cache_cam, dynamic_cam, foreground_votes, retrieve, split_cache_output, static_cam, suppress_background

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**16)


def generator(seed): return torch.Generator().manual_seed(seed)
def unit(*shape, seed=0, dtype=torch.float32): return F.normalize(torch.randn(*shape, generator=generator(seed), dtype=dtype), dim=-1)


def setting(seed, B=2, N=9, d=6, n=7, K=4):
    return unit(B, N, d, seed=seed), unit(n, d, seed=seed + 1), torch.randn(n, K, generator=generator(seed + 2))


def a_cache(seed=0, C=3, background=2, d=6):
    keys, text = unit(2 * C + background, d, seed=seed), unit(C, d, seed=seed + 1).abs()
    return Cache(keys, cache_values(keys[:2 * C], text, torch.arange(C).repeat_interleave(2), background, text_weighted=False), tuple("abcdefgh"[:C]))


@quick
@given(seeds, st.floats(.1, 30))
def test_retrieval_is_the_double_loop(seed, sharpness):
    Q, K, V = setting(seed)
    naive = torch.stack([torch.stack([sum(torch.exp(-sharpness * (1 - q @ k)) * v for k, v in zip(K, V)) for q in image]) for image in Q])
    torch.testing.assert_close(retrieve(Q, K, V, sharpness), naive, atol=1e-4, rtol=1e-4)


@quick
@given(seeds)
def test_rows_of_the_cache_have_no_order(seed):
    Q, K, V = setting(seed)
    p = torch.randperm(len(K), generator=generator(seed))
    torch.testing.assert_close(retrieve(Q, K[p], V[p]), retrieve(Q, K, V), atol=1e-5, rtol=1e-4)


@quick
@given(seeds)
def test_patches_are_asked_one_by_one(seed):
    Q, K, V = setting(seed)
    p = torch.randperm(Q.shape[1], generator=generator(seed))
    torch.testing.assert_close(retrieve(Q[:, p], K, V), retrieve(Q, K, V)[:, p], atol=1e-5, rtol=1e-4)


@quick
@given(seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_the_values(seed, a, b):
    Q, K, V = setting(seed)
    W = torch.randn(V.shape, generator=generator(seed + 9))
    torch.testing.assert_close(retrieve(Q, K, a * V + b * W), a * retrieve(Q, K, V) + b * retrieve(Q, K, W), atol=1e-4, rtol=1e-4)


@quick
@given(seeds)
def test_very_sharp_retrieval_is_the_nearest_neighbor(seed):
    Q, K, V = (t.double() for t in setting(seed))
    two = (Q @ K.T).topk(2).values
    assume((two[..., 0] - two[..., 1]).min() > .02)
    share = retrieve(Q, K, torch.eye(len(K)).double(), 340.)
    share = share / share.sum(-1, keepdim=True)
    assert torch.equal(share.argmax(-1), (Q @ K.T).argmax(-1)) and share.amax(-1).min() > .99


@quick
@given(seeds)
def test_a_query_on_a_key_gets_its_whole_value(seed):
    K, V = unit(1, 6, seed=seed), torch.randn(1, 4, generator=generator(seed))
    torch.testing.assert_close(retrieve(K[None], K, V)[0], V, atol=1e-5, rtol=1e-4)


def test_half_precision_queries_keep_their_type():
    Q, K, V = setting(0)
    assert retrieve(Q.half(), K, V).dtype == torch.float16


def test_an_empty_cache_says_nothing():
    Q, K, V = setting(0)
    assert retrieve(Q, K[:0], V[:0]).abs().sum() == 0


@pytest.mark.parametrize("change, message", [
    (lambda Q, K, V: (Q[0], K, V), "must share d"), (lambda Q, K, V: (Q, K[:, 1:], V), "built with this CLIP"),
    (lambda Q, K, V: (Q, K, V[1:]), "as many rows"), (lambda Q, K, V: (Q * float("nan"), K, V), "NaN"),
    (lambda Q, K, V: (Q, K, V, 0.), "positive"), (lambda Q, K, V: (Q, K, V, float("nan")), "positive")])
def test_retrieval_refuses(change, message):
    with pytest.raises(ValueError, match=message): retrieve(*change(*setting(0)))


# ---- (11)

def test_split_and_suppress():
    out = torch.arange(24.).view(2, 3, 4)
    fg, bg = split_cache_output(out)
    assert fg.shape == (2, 3, 3) and torch.equal(bg, out[..., 3]) and torch.equal(fg[0, 1], out[0, :, 1])
    kept = suppress_background(torch.ones(1, 2, 3), torch.tensor([[0., 5, 10]]))
    torch.testing.assert_close(kept, torch.tensor([1, .5, 0]).expand(1, 2, 3), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="background's"): split_cache_output(out[..., :1])
    with pytest.raises(ValueError, match="split_cache_output"): suppress_background(fg, bg[:, 1:])


@quick
@given(seeds, st.booleans())
def test_cache_cam_is_normalized_class_by_class(seed, negative):
    M = cache_cam(unit(2, 9, 6, seed=seed), a_cache(seed), negative=negative)
    assert M.shape == (2, 3, 9) and M.isfinite().all()
    torch.testing.assert_close(M.amax(-1), torch.ones(2, 3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(M.amin(-1), torch.zeros(2, 3), atol=1e-4, rtol=1e-4)


@quick
@given(seeds)
def test_without_background_rows_the_negative_step_does_nothing(seed):
    x, cache = unit(2, 9, 6, seed=seed), a_cache(seed)
    positive = cache_cam(x, cache, negative=False)
    torch.testing.assert_close(cache_cam(x, cache.positive()), positive, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cache_cam(x, a_cache(seed, background=0)), cache_cam(x, a_cache(seed, background=0), negative=False), atol=1e-5, rtol=1e-4)


@quick
@given(seeds)
def test_rolling_the_labels_rolls_the_maps(seed):
    x, cache = unit(2, 9, 6, seed=seed), a_cache(seed)
    torch.testing.assert_close(cache_cam(x, cache.rolled()), cache_cam(x, cache).roll(1, 1), atol=1e-5, rtol=1e-4)


def test_a_patch_that_looks_like_background_is_suppressed():
    keys = torch.eye(3)
    cache = Cache(keys, torch.eye(3), ("a", "b"))
    x = F.normalize(torch.tensor([[[1., 0, 0], [1, 0, 1], [0, 1, 0], [0, 0, 1]]]), dim=-1)
    plain, clean = cache_cam(x, cache, negative=False)[0, 0], cache_cam(x, cache)[0, 0]
    assert clean[0] == 1 and clean[1] < plain[1] and clean[3] == 0


def test_a_class_without_rows_gives_zero_and_leaves_the_text_alone():
    cache = a_cache()
    values = cache.values.clone()
    keep = values[:, 1] == 0
    part = Cache(cache.keys[keep], values[keep], cache.classes)
    x, vce = unit(2, 9, 6), torch.linspace(0, 1, 9).expand(2, 3, 9)
    M = cache_cam(x, part)
    assert (M[:, 1] == 0).all()
    torch.testing.assert_close(static_cam(vce, M)[:, 1], vce[:, 1], atol=1e-5, rtol=1e-4)


@quick
@given(seeds, st.floats(0, 10))
def test_static_cam_is_normalized_and_ordered(seed, beta):
    vce, cache = torch.rand(2, 3, 9, generator=generator(seed)), torch.rand(2, 3, 9, generator=generator(seed + 1))
    M = static_cam(vce, cache, beta)
    torch.testing.assert_close(M.amax(-1), torch.ones(2, 3), atol=1e-4, rtol=1e-4)
    assert torch.equal(M.argmax(-1), (vce + beta * cache).argmax(-1)) and M.min() >= 0
    labels = torch.rand(2, 3, generator=generator(seed)) > .5
    assert (static_cam(vce, cache, beta, labels)[~labels] == 0).all()


def test_static_cam_at_the_ends():
    vce = torch.tensor([[[0., .2, 1]]])
    torch.testing.assert_close(static_cam(vce, vce.flip(-1), 0.), vce, atol=1e-5, rtol=1e-4)
    assert static_cam(torch.ones(1, 1, 3), torch.ones(1, 1, 3)).abs().sum() == 0     # constant maps: 0, not NaN


def test_static_cam_refuses():
    with pytest.raises(ValueError, match="same features"): static_cam(torch.ones(1, 2, 3), torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match="negative"): static_cam(torch.ones(1, 2, 3), torch.ones(1, 2, 3), -1.)


def test_a_cache_of_the_right_classes_beats_its_rolled_twin():
    from diclip.cache import cache_from_features
    C, N, d = 4, 36, 16
    looks, ground = unit(C, d, seed=1), unit(1, d, seed=2)
    def scenes(n, seed):
        y, inside = torch.arange(n) % C, (torch.rand(n, N, generator=generator(seed)) > .7).float()
        x = inside[..., None] * looks[y][:, None] + (1 - inside[..., None]) * ground + .15 * torch.randn(n, N, d, generator=generator(seed + 1))
        return F.normalize(x, dim=-1), inside, y
    x, inside, y = scenes(40, 3)
    cache = cache_from_features(x, inside, y, F.normalize(looks + ground, dim=-1), "abcd", centroids=3)
    x, inside, y = scenes(20, 5)
    def contrast(M):
        own = M[torch.arange(20), y]
        return ((own * inside).sum() / inside.sum() - (own * (1 - inside)).sum() / (1 - inside).sum()).item()
    real, twin = contrast(cache_cam(x, cache, negative=False)), contrast(cache_cam(x, cache.rolled(), negative=False))
    assert real > .5 and real > twin + .3
    assert contrast(cache_cam(x, cache)) > .5


@quick
@given(seeds, st.integers(0, 5), st.floats(0, 1), st.floats(.5, 20))
def test_adapter_starts_as_retrieval(seed, prompts, noise, sharpness):
    cache, Q = a_cache(seed), unit(2, 9, 6, seed=seed + 3)
    adapter = Adapter.from_cache(cache, prompts, noise, sharpness=sharpness, seed=seed)
    torch.testing.assert_close(adapter(Q), retrieve(Q, cache.keys, cache.values, sharpness), atol=1e-5, rtol=1e-4)
    assert len(adapter.keys) == len(adapter.values) == len(cache) + prompts
    assert adapter.keys.data_ptr() != cache.keys.data_ptr()         # training must not change the cache


@pytest.mark.parametrize("noise", [0., .1])
def test_zero_prompts_learn_alike_and_noisy_ones_do_not(noise):
    cache, Q = a_cache(), unit(2, 9, 6, seed=3)
    adapter = Adapter.from_cache(cache, 4, noise)
    F.cross_entropy(adapter(Q).flatten(0, 1), torch.arange(18) % 4).backward()
    grads = adapter.values.grad[len(cache):]
    assert grads.abs().sum() > 0 and (grads.std(0).max() < 1e-7) == (noise == 0)


def test_random_adapter_has_the_sizes_of_the_cache_and_not_its_votes():
    cache, Q = a_cache(), unit(2, 9, 6, seed=3)
    adapter = Adapter.from_cache(cache, 4, random=True)
    assert adapter.keys.shape == (len(cache) + 4, 6) and (adapter(Q) - retrieve(Q, cache.keys, cache.values)).abs().max() > .1
    torch.testing.assert_close(adapter.keys[:len(cache)].norm(dim=-1), torch.ones(len(cache)))


@quick
@given(seeds, st.floats(0, 4), st.sampled_from(READINGS))
def test_dynamic_cam_is_normalized_and_reads_votes_as_logits(seed, beta, how):
    vce, votes = torch.rand(2, 3, 9, generator=generator(seed)), torch.randn(2, 9, 4, generator=generator(seed + 1))
    M = dynamic_cam(vce, votes, beta, how=how)
    assert M.shape == vce.shape and M.min() >= 0 and M.max() <= 1 + 1e-5
    offset = torch.randn(2, 9, 1, generator=generator(seed + 2))
    if how != "raw": torch.testing.assert_close(foreground_votes(votes + offset, how=how), foreground_votes(votes, how=how), rtol=1e-4, atol=1e-5)
    votes[..., -1] += 7
    if how == "raw": torch.testing.assert_close(dynamic_cam(vce, votes, beta, how=how), M)
    else: assert (foreground_votes(votes, how=how) < foreground_votes(votes - 7 * F.one_hot(torch.tensor(3), 4), how=how)).all()


@quick
@given(seeds)
def test_softmax_of_the_votes_leaves_absent_classes_out(seed):
    votes, labels = torch.randn(2, 9, 4, generator=generator(seed)), torch.tensor([[True, False, True], [False, True, False]])
    P = foreground_votes(votes, labels)
    assert P[~labels].abs().sum() == 0 and (P.sum(1) < 1).all()
    torch.testing.assert_close(P[1, 1], votes[1][:, [1, 3]].softmax(-1)[:, 0])
    louder = votes + 5 * F.one_hot(torch.tensor(1), 4)                       # class 1 is absent from image 0
    torch.testing.assert_close(foreground_votes(louder, labels)[0], P[0])


def test_an_unknown_reading_is_refused():
    with pytest.raises(ValueError, match="choose one of softmax, margin, raw"): foreground_votes(torch.zeros(1, 4, 3), how="loud")


@pytest.mark.parametrize("how", [dict(prompts=-1), dict(noise=-.1)])
def test_adapter_refuses_negative_settings(how):
    with pytest.raises(ValueError, match="must not be negative"): Adapter.from_cache(a_cache(), **how)
