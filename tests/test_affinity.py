"Class-aware affinity: Sinkhorn, boxes, refinement."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from diclip.affinity import affinity_refine, confident_boxes, sinkhorn

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**16)
rand = lambda *shape, seed=0: torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@quick
@given(seeds, st.integers(2, 12))
def test_sinkhorn_is_symmetric_and_doubly_stochastic(seed, n):
    S = sinkhorn(rand(2, n, n, seed=seed) + .01, rounds=100)
    torch.testing.assert_close(S, S.mT)
    torch.testing.assert_close(S.sum(1), torch.ones(2, n), atol=1e-3, rtol=0)


def test_rows_without_mass_are_no_nan():
    A = torch.eye(4)[None].clone(); A[0, 2] = 0
    assert sinkhorn(A).isfinite().all()


@quick
@given(seeds)
def test_patches_have_no_order_without_boxes(seed):
    M, A, p = rand(2, 3, 12, seed=seed).double(), rand(2, 12, 12, seed=seed + 1).double(), torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = affinity_refine(M[..., p], A[:, p][..., p], (1, 12), threshold=0.)
    torch.testing.assert_close(shuffled, affinity_refine(M, A, (1, 12), threshold=0.)[..., p], atol=1e-9, rtol=1e-7)


@quick
@given(seeds, st.floats(0, .95))
def test_boxes_hold_what_is_confident_and_shrink_with_the_threshold(seed, threshold):
    M = rand(2, 3, 20, seed=seed)
    boxes = confident_boxes(M, (4, 5), threshold)
    assert ((boxes == 0) | (boxes == 1)).all() and (boxes >= (M > threshold * M.amax(2, keepdim=True))).all()
    assert (confident_boxes(M, (4, 5), .99 * threshold) >= boxes).all()


def test_a_walk_stays_in_its_box_and_absent_classes_stay_absent():
    M = torch.zeros(1, 2, 16); M[0, 0, [0, 5]] = 1           # touching at a corner: one box of four patches
    out = affinity_refine(M, rand(1, 16, 16), (4, 4))
    assert set(out[0, 0].nonzero().flatten().tolist()) <= {0, 1, 4, 5} and out[0, 1].sum() == 0


@pytest.mark.parametrize("call, message", [
    (lambda: sinkhorn(torch.rand(4, 4)), "drop the class token"),
    (lambda: sinkhorn(-torch.ones(1, 4, 4)), "negative values"),
    (lambda: sinkhorn(torch.full((1, 4, 4), float("nan"))), "NaN or infinity"),
    (lambda: confident_boxes(torch.rand(1, 2, 9), (3, 4)), "do not fit the grid"),
    (lambda: confident_boxes(torch.rand(1, 2, 9), (3, 3), 1.), "outside")])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message): call()
