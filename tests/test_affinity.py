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


@pytest.mark.parametrize("threshold", [.4, .75, .79, .88])
def test_the_box_masks_the_source_of_the_walk(threshold):
    "CLIP-ES and ExCEL, an image and a class at a time: a row mask over the columns of the squared transition matrix, then the map as a column."
    M, A = rand(2, 3, 30, seed=1) ** 2, rand(2, 30, 30, seed=2) ** 3
    boxes = confident_boxes(M, (5, 6), threshold)
    for b in range(2):
        T = A[b]
        for _ in range(3):
            T = T / T.sum(0, keepdim=True)
            T = T / T.sum(1, keepdim=True)
        T = (T + T.T) / 2
        T = torch.matmul(T, T)
        for c in range(3):
            walked = torch.matmul(T * boxes[b, c].view(1, 30), M[b, c].view(30, 1)).flatten()
            expected = (walked - walked.min()) / (walked - walked.min()).max()
            torch.testing.assert_close(affinity_refine(M, A, (5, 6), threshold)[b, c], expected, atol=1e-5, rtol=0)


def test_a_walk_starts_in_its_box_may_leave_it_and_absent_classes_stay_absent():
    M = torch.zeros(1, 2, 16); M[0, 0, [0, 5]] = 1           # touching at a corner: one box of four patches
    far = torch.eye(16)[None] + 1e-9
    far[0, 15, 0] = far[0, 0, 15] = 1                        # the other corner looks at the first patch
    out = affinity_refine(M, far, (4, 4))
    assert out[0, 0, 15] > .3 and out[0, 0, [1, 4, 10]].max() < 1e-3 and out[0, 1].sum() == 0
    M[0, 0, 9] = .5                                          # below the threshold, outside of the box: no source
    torch.testing.assert_close(affinity_refine(M, far, (4, 4)), out)
    assert affinity_refine(M, far, (4, 4), threshold=.4)[0, 0, 9] > .3


def test_thresholds_of_the_profiles():
    from diclip.config import profile
    of = lambda p: (p.affinity_layers, p.affinity_threshold, p.affinity_score_threshold)
    assert of(profile("voc")) == (6, .79, .75) and of(profile("coco")) == (6, .88, .75)


@pytest.mark.parametrize("call, message", [
    (lambda: sinkhorn(torch.rand(4, 4)), "drop the class token"),
    (lambda: sinkhorn(-torch.ones(1, 4, 4)), "negative values"),
    (lambda: sinkhorn(torch.full((1, 4, 4), float("nan"))), "NaN or infinity"),
    (lambda: confident_boxes(torch.rand(1, 2, 9), (3, 4)), "do not fit the grid"),
    (lambda: confident_boxes(torch.rand(1, 2, 9), (3, 3), 1.), "outside")])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message): call()
