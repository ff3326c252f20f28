"Attention clustering refinement: invariants that hold for any attention."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from diclip.acr import (METRICS, PROPAGATIONS, affinity_label, cluster_attention, confident, distances, hand_attention, neighbor_attention, oracle_attention,
                        refine_attention, rgb_attention, row_normalize, threshold_label)

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 10_000)
sizes = st.integers(2, 12)
names = st.sampled_from(sorted(PROPAGATIONS))
metrics = st.sampled_from(METRICS)


def random_attention(seed, B, N, sharp=4., dtype=torch.float64):
    "Rows between nearly uniform and nearly one-hot."
    g = torch.Generator().manual_seed(seed)
    return (sharp * torch.randn(B, N, N, generator=g, dtype=dtype)).softmax(-1)


def blocks(labels, noise=.05, seed=0):
    "(B, N) labels -> attention that stays inside of blocks, plus noise."
    g = torch.Generator().manual_seed(seed)
    same = (labels[:, :, None] == labels[:, None]).double()
    return row_normalize(same + noise * torch.rand(same.shape, generator=g, dtype=same.dtype))


def shuffled(A, order): return A[:, order][:, :, order]


def same_partition(a, b): return bool((affinity_label(a) == affinity_label(b)).all())


def check_rows(A):
    assert A.isfinite().all() and (A >= 0).all()
    torch.testing.assert_close(A.sum(-1), torch.ones_like(A[..., 0]))


# row_normalize, confident

@quick
@given(seeds, sizes, st.floats(0, 1))
def test_rows_sum_to_one_even_with_empty_rows(seed, N, share):
    g = torch.Generator().manual_seed(seed)
    A = torch.rand(2, N, N, generator=g) * (torch.rand(2, N, 1, generator=g) > share)
    check_rows(row_normalize(A))


def test_empty_row_takes_fallback_or_itself():
    A = torch.tensor([[0., 0.], [1., 3.]])
    assert row_normalize(A).tolist() == [[1., 0.], [.25, .75]]
    assert row_normalize(A, fallback=torch.full((2, 2), .5)).tolist() == [[.5, .5], [.25, .75]]


@quick
@given(seeds, sizes, st.floats(0, 2))
def test_confident_keeps_rows_and_drops_small_entries(seed, N, tau):
    A = random_attention(seed, 2, N)
    sure = confident(A, tau)
    check_rows(sure)
    empty = (A > tau).sum(-1) == 0
    assert torch.equal(sure[empty], A[empty])
    assert (sure[~empty][(A <= tau)[~empty]] == 0).all()


def test_default_tau_is_the_papers_at_400_patches():
    A = torch.full((1, 400, 400), 1.)
    A[..., 0], A[..., 1] = 4e-4, 6e-4
    sure = confident(A)
    assert (sure[..., 0] == 0).all() and (sure[..., 1] > 0).all()


# clustering

@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_blocks_are_found(metric, seed):
    labels = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [0, 1, 2] * 4])
    for start in range(3): # any single start of k-means++ may be unlucky, none may crash
        groups = cluster_attention(blocks(labels, seed=start), 3, metric, seed=seed)
        assert groups.shape == (2, 12) and groups.dtype == torch.int64
    if seed is None: assert same_partition(groups, labels)


@quick
@given(seeds, sizes, metrics, st.data())
def test_groups_are_in_range_and_deterministic(seed, N, metric, data):
    k = data.draw(st.integers(1, N))
    A = random_attention(seed, 2, N)
    groups = cluster_attention(A, k, metric, seed=seed)
    assert ((groups >= 0) & (groups < k)).all()
    assert torch.equal(groups, cluster_attention(A, k, metric, seed=seed))


@quick
@given(seeds, sizes, metrics, st.sampled_from([None, 0, 7]), st.data())
def test_clustering_is_independent_of_the_batch(seed, N, metric, start, data):
    k, A = data.draw(st.integers(1, N)), random_attention(seed, 3, N)
    whole = cluster_attention(A, k, metric, seed=start)
    for b in range(3): assert torch.equal(whole[b:b+1], cluster_attention(A[b:b+1], k, metric, seed=start))


@quick
@given(seeds, st.integers(3, 12), metrics)
def test_farthest_start_does_not_see_the_numbering(seed, N, metric):
    A, order = random_attention(seed, 1, N), torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    groups = cluster_attention(A, 3, metric, seed=None)
    assert same_partition(groups[:, order], cluster_attention(shuffled(A, order), 3, metric, seed=None))


@quick
@given(seeds, sizes, metrics, st.sampled_from([None, 0, 3]))
def test_one_group_and_as_many_groups_as_patches(seed, N, metric, start):
    A = random_attention(seed, 2, N)
    assert (cluster_attention(A, 1, metric, seed=start) == 0).all()
    for groups in cluster_attention(A, N, metric, seed=start): assert len(groups.unique()) == N


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", [None, 0])
def test_identical_rows_share_a_group(metric, seed):
    assert (cluster_attention(torch.full((2, 9, 9), 1/9), 4, metric, seed=seed) == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_empty_groups_are_reseeded(metric):
    "Eight equal rows and two others: however the start falls, three groups are found."
    A = torch.full((1, 10, 10), .1, dtype=torch.float64)
    A[0, 8], A[0, 9] = torch.eye(10, dtype=torch.float64)[8], torch.eye(10, dtype=torch.float64)[0]
    for seed in (None, *range(10)): assert len(cluster_attention(A, 3, metric, seed=seed).unique()) == 3


@quick
@given(seeds, sizes, st.data())
def test_distances_are_those_of_the_formulas(seed, N, data):
    A = random_attention(seed, 1, N)
    i, j = data.draw(st.integers(0, N - 1)), data.draw(st.integers(0, N - 1))
    p, c = A[0, i], A[0, j].clamp_min(1e-8)
    torch.testing.assert_close(distances(A, A, "kl")[0, i, j], (p * (p / c).log()).sum().clamp_min(0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(distances(A, A, "euclidean")[0, i, j], ((p - A[0, j])**2).sum(), atol=1e-6, rtol=1e-6)


def test_lloyd_never_raises_the_cost():
    "The mean row is the best center for both metrics."
    A = random_attention(3, 2, 30)
    for metric in METRICS:
        costs = []
        for iterations in range(6):
            groups = cluster_attention(A, 4, metric, iterations, seed=None)
            onehot = torch.nn.functional.one_hot(groups, 4).double()
            centers = onehot.mT @ A / onehot.sum(1).clamp_min(1)[..., None]
            costs.append(distances(A, centers, metric).gather(2, groups[..., None]).sum().item())
        assert all(b <= a + 1e-9 for a, b in zip(costs, costs[1:]))


# relations

@quick
@given(seeds, sizes, st.integers(1, 5))
def test_affinity_is_an_equivalence_and_equivariant(seed, N, k):
    g = torch.Generator().manual_seed(seed)
    groups, order = torch.randint(k, (2, N), generator=g), torch.randperm(N, generator=g)
    R = affinity_label(groups)
    onehot = torch.nn.functional.one_hot(groups, k).float()
    assert torch.equal(R, onehot @ onehot.mT)
    assert torch.equal(R, R.mT) and (R.diagonal(dim1=1, dim2=2) == 1).all()
    assert torch.equal((R @ R) > 0, R > 0)
    assert torch.equal(affinity_label(groups[:, order]), shuffled(R, order))


def test_threshold_label_is_above_the_mean():
    A = random_attention(0, 2, 6)
    assert torch.equal(threshold_label(A), (A > 1/6).to(A.dtype))


# refinement

@quick
@given(seeds, sizes, names, metrics, st.sampled_from(["cluster", "threshold"]), st.booleans(), st.floats(0, 1.5), st.data())
def test_refined_rows_sum_to_one(seed, N, name, metric, relation, regroup, tau_n, data):
    k, A = data.draw(st.integers(1, N)), random_attention(seed, 2, N)
    steps = refine_attention(A, k, 3, tau_n / N, name, regroup, metric, seed, history=True, relation=relation)
    assert len(steps) == 4
    for step in steps: assert step.shape == A.shape and step.dtype == A.dtype; check_rows(step)


@quick
@given(seeds, sizes, names, st.data())
def test_refinement_is_independent_of_the_batch(seed, N, name, data):
    k, A = data.draw(st.integers(1, N)), random_attention(seed, 3, N)
    whole = refine_attention(A, k, 2, propagation=name)
    torch.testing.assert_close(whole[1:2], refine_attention(A[1:2], k, 2, propagation=name))


@quick
@given(seeds, sizes, names, st.integers(1, 5))
def test_propagation_does_not_see_the_numbering(seed, N, name, k):
    g, A = torch.Generator().manual_seed(seed), random_attention(seed, 2, N)
    R, order = affinity_label(torch.randint(k, (2, N), generator=g)).double(), torch.randperm(N, generator=g)
    f = PROPAGATIONS[name]
    torch.testing.assert_close(f(shuffled(R, order), shuffled(A, order)), shuffled(f(R, A), order))


@pytest.mark.parametrize("name", PROPAGATIONS)
@pytest.mark.parametrize("k", [1, 4, 8])
def test_edges_of_k_and_flat_attention(name, k):
    flat = torch.full((1, 8, 8), 1/8)
    if k < 8: torch.testing.assert_close(refine_attention(flat, k, 3, propagation=name), flat)
    check_rows(refine_attention(random_attention(1, 2, 8), k, 3, propagation=name))


@pytest.mark.parametrize("name", PROPAGATIONS)
def test_a_threshold_above_everything_changes_the_rows_of_no_mask(name):
    A = random_attention(5, 1, 6)
    check_rows(refine_attention(A, 2, 3, tau=2., propagation=name))


@pytest.mark.parametrize("name", ["affinity", "average", "two_sided"])
def test_forms_without_memory_stand_still(name):
    A = random_attention(2, 1, 20, sharp=1.)
    steps = refine_attention(A, 4, 3, tau=0., propagation=name, regroup=False, history=True)
    assert (steps[1] - steps[0]).abs().max() > 1e-2
    torch.testing.assert_close(steps[1], steps[3])


@pytest.mark.parametrize("name", ["promote", "lazy_average", "lazy_square"])
def test_forms_with_memory_keep_moving_and_slow_down(name):
    A = random_attention(2, 1, 20, sharp=1.)
    steps = refine_attention(A, 4, 5, propagation=name, regroup=False, history=True)
    moved = [(a - b).abs().sum().item() for a, b in zip(steps, steps[1:])]
    assert all(m > 1e-3 for m in moved) and moved[4] < moved[0]


def test_refinement_cleans_noisy_blocks():
    labels = torch.tensor([[0] * 8 + [1] * 5 + [2] * 7])
    same, A = affinity_label(labels), blocks(labels, noise=.6).float()
    inside = lambda x: (x * same).sum(-1).mean()
    for name in ("mask", "mask_square", "promote", "lazy_square"): assert inside(refine_attention(A, 3, propagation=name, seed=None)) > inside(A)


def test_no_rounds_normalize_only_and_input_is_left_alone():
    A = random_attention(0, 2, 6) * 3
    copy = A.clone()
    torch.testing.assert_close(refine_attention(A, 2, rounds=0), A / 3)
    refine_attention(A, 2)
    assert torch.equal(A, copy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_in_half_precision_out(dtype):
    A = random_attention(0, 1, 16, sharp=1.).to(dtype)
    out = refine_attention(A, 4)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float().sum(-1), torch.ones(1, 16), atol=2e-2, rtol=0)


def test_refusals():
    A = torch.full((1, 9, 9), 1/9)
    for bad, message in [
        (lambda: cluster_attention(A[0]), "must be"), (lambda: cluster_attention(A[:, :5]), "must be"),
        (lambda: cluster_attention(A, 10), "k=10"), (lambda: cluster_attention(A, 0), "k=0"), (lambda: cluster_attention(A, 2, "cosine"), "unknown metric"),
        (lambda: refine_attention(A * float("nan")), "NaN"), (lambda: refine_attention(A / 0), "infinity"), (lambda: refine_attention(-A), "negative"),
        (lambda: refine_attention(A, rounds=-1), "rounds=-1"), (lambda: refine_attention(A, propagation="x"), "unknown propagation"),
        (lambda: refine_attention(A, relation="x"), "unknown relation"), (lambda: affinity_label(torch.rand(2, 3)), "integers"),
        (lambda: oracle_attention(torch.full((1, 4, 4), 3), 2, (2, 2)), "number of foreground classes")]:
        with pytest.raises(ValueError, match=message): bad()


# controls

def test_oracle_attends_to_its_class_and_ignores_unknown_pixels():
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[:, :, 4:] = 2
    A = oracle_attention(mask, 2, (4, 4))
    columns = torch.arange(16) % 4 >= 2
    torch.testing.assert_close(A[0], (columns[:, None] == columns).float() / 8)
    mask[:, :2, :2] = 255
    A = oracle_attention(mask, 2, (4, 4))
    check_rows(A)
    assert A[0, 0, 0] == 1 and (A[0, 1:, 0] == 0).all()


def test_rgb_attends_to_its_color():
    images = torch.zeros(1, 3, 8, 8)
    images[:, 0, :, 4:] = 1
    A = rgb_attention(images, (4, 4))
    check_rows(A)
    columns = torch.arange(16) % 4 >= 2
    assert (A[0] * (columns[:, None] == columns)).sum() > 15.99


def test_neighbors_attend_to_what_is_near_and_to_nothing_else():
    A = neighbor_attention(2, (3, 4), width=1.)
    check_rows(A)
    assert A.shape == (2, 12, 12) and torch.equal(A[0], A[1])
    torch.testing.assert_close(A[0], A[0].mT * (A[0].diagonal()[:, None] / A[0].diagonal()))     # a function of the distance, up to the row's sum
    assert A[0, 0].argmax() == 0 and A[0, 0, 1] > A[0, 0, 2] > A[0, 0, 3]


def test_the_hand_made_control_is_nearness_times_color():
    g = torch.Generator().manual_seed(0)
    images, grid = torch.rand(2, 3, 16, 24, generator=g), (2, 3)
    product = neighbor_attention(2, grid, 1.) * rgb_attention(images, grid, .1)
    torch.testing.assert_close(hand_attention(images, grid, 1., .1), product / product.sum(-1, keepdim=True))
    torch.testing.assert_close(hand_attention(images, grid, 2.), neighbor_attention(2, grid, 2.))
    flat = torch.full((1, 3, 16, 24), .5)
    torch.testing.assert_close(hand_attention(flat, grid, 1., .01), neighbor_attention(1, grid, 1.))
