"Visual correlation enhancement: what fusing may change, and what it may not."
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from diclip.config import profile
from diclip.vce import FUSIONS, diffusion_attention, enhanced_features, fuse_attention, refine

quick = settings(deadline=None, max_examples=25)
seeds, sizes, modes = st.integers(0, 10_000), st.integers(1, 9), st.sampled_from(sorted(FUSIONS))


def maps(seed, B=2, H=3, N=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, H, N + 1, N + 1, generator=g).softmax(-1), torch.randn(B, N, N, generator=g).softmax(-1)


@quick
@given(seeds, st.integers(1, 3), st.integers(1, 3), sizes, modes, st.floats(0, 4))
def test_shape_and_class_token_survive(seed, B, H, N, mode, alpha):
    A, S = maps(seed, B, H, N)
    before = A.clone()
    F = fuse_attention(A, S, alpha, mode)
    assert F.shape == A.shape and F.dtype == A.dtype and F.isfinite().all()
    assert torch.equal(F[:, :, 0], A[:, :, 0]) and torch.equal(F[..., 0], A[..., 0])
    assert torch.equal(A, before)


@quick
@given(seeds, sizes)
def test_alpha_zero_is_clip(seed, N):
    A, S = maps(seed, N=N)
    assert torch.equal(fuse_attention(A, S, alpha=0), A)
    assert torch.equal(fuse_attention(A, S, mode="clip"), A)


@quick
@given(seeds, sizes, st.floats(0, 4))
def test_additive_patch_rows_sum_to_one_plus_alpha(seed, N, alpha):
    A, S = maps(seed, N=N)
    torch.testing.assert_close(fuse_attention(A, S, alpha)[:, :, 1:].sum(-1), torch.full((2, 3, N), 1 + alpha))


@quick
@given(seeds, st.integers(1, 6), st.floats(.1, 4))
def test_additive_is_the_naive_loop(seed, N, alpha):
    A, S = maps(seed, 1, 2, N)
    naive = A.clone()
    for h in range(2):
        for i in range(N):
            for j in range(N): naive[0, h, i + 1, j + 1] += alpha * S[0, i, j]
    torch.testing.assert_close(fuse_attention(A, S, alpha), naive)


@quick
@given(seeds, st.integers(2, 9), modes)
def test_fusing_does_not_see_the_numbering_or_the_batch(seed, N, mode):
    A, S = maps(seed, N=N)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    with_cls = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    F = fuse_attention(A, S, mode=mode)
    moved = fuse_attention(A[:, :, with_cls][..., with_cls], S[:, order][:, :, order], mode=mode)
    torch.testing.assert_close(moved, F[:, :, with_cls][..., with_cls])
    torch.testing.assert_close(fuse_attention(A[1:], S[1:], mode=mode), F[1:])


def test_the_six_modes_by_hand():
    A, S = maps(0, 1, 1, 2)
    S[0] = torch.tensor([[.9, .1], [.3, .7]]) # mean 0.5
    a, s = A[0, 0, 1:, 1:], S[0]
    want = {"additive": a + s, "clip": a, "sd": s, "scaling": a * s, "normalization": (a + s).softmax(-1),
            "gating": torch.stack([torch.stack([s[0, 0], a[0, 1]]), torch.stack([a[1, 0], s[1, 1]])])}
    assert set(want) == set(FUSIONS)
    for mode, block in want.items(): torch.testing.assert_close(fuse_attention(A, S, mode=mode)[0, 0, 1:, 1:], block)


def test_half_precision_follows_clip():
    A, S = maps(0)
    assert fuse_attention(A.half(), S).dtype == torch.float16


def test_refusals():
    A, S = maps(0)
    for bad, message in [
        (lambda: fuse_attention(A, S * float("nan")), "SD's attention holds NaN"), (lambda: fuse_attention(A / 0, S), "CLIP's attention holds NaN"),
        (lambda: fuse_attention(A, S[:, :4, :4]), "CLIP's grid"), (lambda: fuse_attention(A, S[:1]), "same images"),
        (lambda: fuse_attention(A[:, 0], S), "keep heads"), (lambda: fuse_attention(A, S, mode="mean"), "unknown mode")]:
        with pytest.raises(ValueError, match=message): bad()


class Recorder:
    "A stand-in for DenseCLIP that shows what it was asked."
    def dense(self, images, edit=None, layers=0, readout="inplace"):
        self.layers, self.readout = layers, readout
        return SimpleNamespace(patches=edit(torch.full((len(images), 2, 5, 5), .2))[:, 0, 1:])


def test_enhanced_features_edit_the_last_layers():
    clip, (_, S) = Recorder(), maps(0, N=4)
    F = enhanced_features(clip, torch.rand(2, 3, 8, 8), S, layers=2, alpha=3., readout="surgery")
    assert (clip.layers, clip.readout) == (2, "surgery")
    torch.testing.assert_close(F[..., 1:], .2 + 3 * S)


@pytest.fixture(scope="module")
def tiny():
    "A CLIP of two small random layers."
    open_clip = pytest.importorskip("open_clip")
    from diclip.clip import DenseCLIP
    torch.manual_seed(0)
    model = open_clip.CLIP(16, dict(image_size=32, layers=3, width=32, head_width=16, patch_size=8), dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1))
    return DenseCLIP(model, tokenizer=None)


@pytest.mark.parametrize("readout", ["inplace", "dual", "surgery", "last"])
def test_real_layers(tiny, readout):
    images, S = torch.rand(2, 3, 32, 32), torch.rand(2, 16, 16).softmax(-1)
    plain = enhanced_features(tiny, images, S, alpha=0., readout=readout)
    assert plain.shape == (2, 16, 16)
    torch.testing.assert_close(plain.norm(dim=-1), torch.ones(2, 16))
    torch.testing.assert_close(plain, tiny.dense(images, layers=3, readout=readout).patches, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, enhanced_features(tiny, images, S, alpha=2., readout=readout))


def test_alpha_zero_in_place_is_clip(tiny):
    images, S = torch.rand(2, 3, 32, 32), torch.rand(2, 16, 16).softmax(-1)
    torch.testing.assert_close(enhanced_features(tiny, images, S, alpha=0., readout="inplace"), tiny.dense(images).patches, atol=1e-5, rtol=1e-4)


class Watcher:
    """A stand-in for the diffusion model that shows what it was asked."""
    def __init__(self, factor=8): self.factor = factor
    def attention(self, images, grid, **how):
        self.images, self.how = images, how
        return torch.full((len(images), *[grid[0] * grid[1]] * 2), 1 / (grid[0] * grid[1]))


@pytest.mark.parametrize("crop, side, other, want", [(None, 160, 80, (160, 80)), (0, 160, 80, (160, 80)), (160, 160, 80, (160, 80)), (320, 160, 80, (320, 160)),
                                                     (96, 160, 240, (96, 144)), (240, 124, 112, (184, 168)), (8, 160, 8, (8, 8))])
def test_the_diffusion_model_has_its_own_size(crop, side, other, want):
    sd, p, x = Watcher(), profile("mini", sd_crop=crop), torch.rand(2, 3, side, other)
    A = diffusion_attention(sd, x, (4, 5), p)
    assert A.shape == (2, 20, 20) and sd.images.shape == (2, 3, *want) and 0 <= sd.images.min() and sd.images.max() <= 1 + 1e-6
    if want == (side, other): assert sd.images is x
    assert sd.how == dict(timestep=p.timestep, layers=p.sd_layers, draws=p.sd_draws)


def test_bytes_are_refused_before_they_are_resized():
    with pytest.raises(ValueError, match="images.float"): diffusion_attention(Watcher(), torch.zeros(1, 3, 160, 160, dtype=torch.uint8), (4, 4), profile("mini", sd_crop=320))
    with pytest.raises(ValueError, match="sd_crop"): profile("mini", sd_crop=-8)


@pytest.mark.parametrize("name, value, argument", [("group_metric", "euclidean", "metric"), ("regroup", False, "regroup"), ("relation", "threshold", "relation"), ("groups", 4, "k")])
def test_the_profile_speaks_to_acr(name, value, argument):
    from diclip.acr import refine_attention
    A = torch.rand(2, 30, 30, generator=torch.Generator().manual_seed(3)).softmax(-1)
    p = profile("mini", rounds=3)
    how = dict(k=p.groups, rounds=3, tau=p.tau_n / 30, propagation=p.propagation)
    assert torch.equal(refine(A, p), refine_attention(A, **how))
    changed = refine(A, profile("mini", rounds=3, **{name: value}))
    assert torch.equal(changed, refine_attention(A, **how | {argument: value})) and not torch.equal(changed, refine(A, p))


@pytest.mark.parametrize("readout", ["inplace", "progressive", "dual", "surgery", "last"])
@pytest.mark.parametrize("affinity", [False, True])
def test_the_frozen_models_run_clip_once(tiny, readout, affinity):
    from diclip.head import raw_tokens
    from diclip.supervision import Frozen
    p = profile("mini", crop=32, layers=2, readout=readout, affinity=affinity)
    tiny.text = lambda names, templates=None: torch.nn.functional.normalize(torch.ones(len(names), 16), dim=-1)
    x, labels, sd = torch.rand(2, 3, 32, 32), torch.ones(2, 8, dtype=torch.bool), Watcher()
    ran = []
    spy = tiny.blocks[0].mlp.register_forward_hook(lambda *a: ran.append(1))
    f = Frozen(tiny, sd, p)(x, labels)
    spy.remove()
    assert len(ran) == 1 and ("attention" in f) == affinity
    torch.testing.assert_close(f["tokens"], raw_tokens(tiny, x), atol=1e-5, rtol=1e-4)
    S = refine(torch.full((2, 16, 16), 1 / 16), p)
    torch.testing.assert_close(f["features"], enhanced_features(tiny, x, S, 2, p.alpha, readout=readout), atol=1e-5, rtol=1e-4)
    if affinity:
        maps = tiny.dense(x, keep=("attention",)).attention
        torch.testing.assert_close(f["attention"], torch.stack(maps).mean((0, 2))[:, 1:, 1:], atol=1e-5, rtol=1e-4)
