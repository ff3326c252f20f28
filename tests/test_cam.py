"Invariants of equation (1): range, symmetry, scale, and what happens at the edges."
import pytest
import torch
from fastcore.test import test_close as close
from hypothesis import given, settings
from hypothesis import strategies as st

from diclip.cam import minmax, patch_text_cam, resize_maps

few = settings(deadline=None, max_examples=25)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 6), st.integers(2, 16))  # B, N, C, d
seeds = st.integers(0, 2**31 - 1)


def draw(size, seed):
    g = torch.Generator().manual_seed(seed)
    B, N, C, d = size
    return torch.randn(B, N, d, generator=g), torch.randn(C, d, generator=g), torch.rand(B, C, generator=g) > .4, g


@few
@given(sizes, seeds, st.booleans())
def test_range(size, seed, redundancy):
    F, T, y, _ = draw(size, seed)
    M = patch_text_cam(F, T, y, remove_redundancy=redundancy)
    assert M.shape == (size[0], size[2], size[1]) and M.min() >= 0 and M.max() <= 1
    for row in patch_text_cam(F, T, remove_redundancy=redundancy).flatten(0, 1): assert row.max() == 0 or (row.min() == 0 and row.max() == 1)


@few
@given(sizes, seeds, st.booleans())
def test_permutations(size, seed, redundancy):
    F, T, y, g = draw(size, seed)
    a, b, c = [torch.randperm(k, generator=g) for k in (size[1], size[2], size[0])]
    M = patch_text_cam(F.double(), T.double(), y, remove_redundancy=redundancy)
    shuffled = patch_text_cam(F[c][:, a].double(), T[b].double(), y[c][:, b], remove_redundancy=redundancy)
    if size[2] > 1 or not redundancy: close(shuffled, M[c][:, b][..., a], eps=1e-6)


@few
@given(sizes, seeds, st.floats(.01, 100), st.floats(.01, 100))
def test_scale_of_the_vectors(size, seed, a, b):
    F, T, y, _ = draw(size, seed)
    F, T = F.double(), T.double()
    close(patch_text_cam(a * F, b * T, y), patch_text_cam(F, T, y), eps=1e-6)


@few
@given(seeds, st.integers(2, 20), st.floats(.01, 100), st.floats(-10, 10))
def test_minmax_ignores_scale_and_offset(seed, n, scale, offset):
    M = torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    close(minmax(scale * M + offset), minmax(M), eps=1e-6)
    close(minmax(-M), 1 - minmax(M), eps=1e-6)
    close(minmax(minmax(M)), minmax(M), eps=1e-6)


@few
@given(st.floats(-100, 100), st.integers(1, 30))
def test_constant_map_is_zero(value, n):
    assert torch.equal(minmax(torch.full((2, n), value)), torch.zeros(2, n))


def test_constant_up_to_rounding():
    M = torch.full((50,), .3)
    M[::2] = torch.nextafter(M[0], torch.tensor(1.))
    assert minmax(M).max() == 0
    same = torch.randn(1, 1, 16).expand(1, 9, 16)                   # every patch alike
    assert patch_text_cam(same, torch.randn(4, 16)).max() == 0


@few
@given(sizes, seeds, st.integers(0, 4))
def test_redundancy_fast_equals_naive(size, seed, extra):
    F, T, _, g = draw(size, seed)
    B = torch.randn(extra, size[3], generator=g)
    unit = [torch.nn.functional.normalize(x.double(), dim=-1) for x in (F, T, B)]
    f, t, b = unit
    product = f[:, :, None, :] * torch.cat([t, b])[None, None]
    S = (product - product.mean(2, keepdim=True)).sum(-1)[..., :size[2]].transpose(1, 2)
    fast = patch_text_cam(F.double(), T.double(), remove_redundancy=True, background_text=B.double() if extra else None)
    clear = (S.amax(-1) - S.amin(-1)) > 1e-9
    close(fast[clear], minmax(S)[clear], eps=1e-5)


def test_redundancy_is_off_by_default_and_removes_what_is_shared():
    torch.manual_seed(0)
    F, T = torch.randn(2, 9, 8), torch.randn(3, 8)
    assert torch.equal(patch_text_cam(F, T), patch_text_cam(F, T, background_text=torch.randn(2, 8)))
    assert not torch.allclose(patch_text_cam(F, T), patch_text_cam(F, T, remove_redundancy=True), atol=1e-2)
    T = torch.nn.functional.normalize(T, dim=-1)
    S = lambda words: torch.nn.functional.normalize(F, dim=-1) @ (words - words.mean(0)).T
    close(S(T), S(T + torch.randn(8)), eps=1e-5)


def test_labels_drop_absent_classes():
    torch.manual_seed(0)
    F, T = torch.randn(2, 9, 8), torch.randn(3, 8)
    y = torch.tensor([[1, 0, 1], [0, 0, 0]])
    M = patch_text_cam(F, T, y)
    assert M[0, 1].max() == 0 and M[1].max() == 0
    assert torch.equal(M[0, [0, 2]], patch_text_cam(F, T)[0, [0, 2]])


@few
@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_resize_stays_in_range_and_keeps_constants(h, w, seed):
    M = torch.rand(2, 3, h * w, generator=torch.Generator().manual_seed(seed))
    big = resize_maps(M, (h, w), (4 * h, 3 * w))
    assert big.shape == (2, 3, 4 * h, 3 * w) and big.min() >= M.min() - 1e-6 and big.max() <= M.max() + 1e-6
    close(resize_maps(torch.full_like(M, .5), (h, w), (7, 5)), torch.full((2, 3, 7, 5), .5), eps=1e-6)
    close(resize_maps(M, (h, w), (h, w)).flatten(2), M, eps=1e-6)


def test_resize_keeps_rows_and_columns():
    M = torch.zeros(1, 1, 12)
    M[..., 3] = 1                                                   # last column of the first row of a 3x4 grid
    big = resize_maps(M, (3, 4), (30, 40))[0, 0]
    assert big[:10, 30:].mean() > .5 and big[20:].max() == 0 and big[:, :20].max() == 0


NAN = torch.full((1, 4, 8), float("nan"))
@pytest.mark.parametrize("call, message", [
    (lambda F, T: patch_text_cam(NAN, T), "NaN"), (lambda F, T: patch_text_cam(F, T * float("nan")), "text holds NaN"),
    (lambda F, T: minmax(NAN), "NaN"), (lambda F, T: minmax(torch.tensor([1., float("inf")])), "NaN or infinity"),
    (lambda F, T: patch_text_cam(F[0], T), "give \\(B, N, d\\)"), (lambda F, T: patch_text_cam(F, T[:, :5]), "do not fit"),
    (lambda F, T: patch_text_cam(F, T[0]), "do not fit"),
    (lambda F, T: patch_text_cam(F, T, torch.tensor([0])), "one flag per image and class"),
    (lambda F, T: resize_maps(torch.rand(1, 3, 10), (3, 4), (9, 9)), "do not fit a 3x4 grid"),
    (lambda F, T: resize_maps(torch.rand(3, 12), (3, 4), (9, 9)), "do not fit"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message): call(torch.randn(1, 4, 8), torch.randn(3, 8))


@few
@given(sizes, seeds)
def test_the_median_norm_leaves_nothing_below_the_median(size, seed):
    F, T, y, _ = draw((size[0], 2 * size[1] + 1, size[2], size[3]), seed)
    low, high = patch_text_cam(F, T), patch_text_cam(F, T, norm="median")
    assert ((high == 0).sum(-1) >= size[1] + 1).all() and (high <= low + 1e-6).all()
    close(high.amax(-1), torch.ones(size[0], size[2]), eps=1e-6)
    assert (patch_text_cam(F, T, y, norm="median")[~y] == 0).all()


def test_an_unknown_norm_names_the_known_ones():
    with pytest.raises(ValueError, match="minmax, median"): minmax(torch.rand(2, 3), "mean")
