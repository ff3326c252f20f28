"Visual correlation enhancement: what fusing may change, and what it may not."
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from diclip.vce import FUSIONS, enhanced_features, fuse_attention

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
    torch.testing.assert_close(plain, tiny.dense(images, layers=3, readout=readout).patches)
    assert not torch.allclose(plain, enhanced_features(tiny, images, S, alpha=2., readout=readout))


def test_alpha_zero_in_place_is_clip(tiny):
    images, S = torch.rand(2, 3, 32, 32), torch.rand(2, 16, 16).softmax(-1)
    assert torch.equal(enhanced_features(tiny, images, S, alpha=0., readout="inplace"), tiny.dense(images).patches)
