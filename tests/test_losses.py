"Losses (14), (15), the logs' affinity loss, and the schedule."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from diclip.losses import affinity_loss, cache_loss, learning_rate, seg_loss

quick = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**16)


def batch(seed, B=2, K=4, H=5, W=6):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, K, (B, H, W), generator=g)
    return torch.randn(B, K, H, W, generator=g), target.masked_fill(torch.rand(B, H, W, generator=g) < .2, 255)


@quick
@given(seeds)
def test_segmentation_loss_is_the_mean_of_two_cross_entropies(seed):
    logits, target = batch(seed)
    bg, fg = target.masked_fill(target != 0, 255), target.masked_fill(target == 0, 255)
    torch.testing.assert_close(seg_loss(logits, target), (F.cross_entropy(logits, bg, ignore_index=255) + F.cross_entropy(logits, fg, ignore_index=255)) / 2)
    torch.testing.assert_close(seg_loss(logits, target, foreground=.2), .8 * F.cross_entropy(logits, bg, ignore_index=255) + .2 * F.cross_entropy(logits, fg, ignore_index=255))


@quick
@given(seeds, st.integers(1, 3))
def test_processes_with_averaged_counts_are_one_process(seed, cut):
    logits, target = batch(seed, B=4)
    logits.requires_grad_()
    parts = [slice(0, cut), slice(cut, 4)]
    counts = torch.stack([torch.stack([target[p] == 0, (target[p] > 0) & (target[p] != 255)]).float().sum((1, 2, 3)) for p in parts]).mean(0)
    together = sum(seg_loss(logits[p], target[p], average=lambda c: counts) for p in parts) / 2
    torch.testing.assert_close(torch.autograd.grad(together, logits)[0], torch.autograd.grad(seg_loss(logits, target), logits)[0])


@pytest.mark.parametrize("label", [0, 2, 255])
def test_a_missing_part_is_no_nan(label):
    logits = torch.randn(1, 4, 3, 3, requires_grad=True)
    loss = seg_loss(logits, torch.full((1, 3, 3), label))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and (loss > 0) == (label != 255)


@quick
@given(seeds)
def test_cache_loss_puts_the_background_last(seed):
    g = torch.Generator().manual_seed(seed)
    votes, target = torch.randn(2, 7, 4, generator=g), torch.randint(0, 4, (2, 7), generator=g)
    first = torch.cat([votes[..., -1:], votes[..., :-1]], -1)
    torch.testing.assert_close(cache_loss(votes, target), F.cross_entropy(first.flatten(0, 1), target.flatten()))
    assert cache_loss(votes, torch.full_like(target, 255)) == 0


@quick
@given(seeds, st.integers(1, 8), st.integers(1, 3))
def test_affinity_loss_by_the_family_s_formula(seed, radius, B):
    "A matrix of pair labels (1 alike, 0 not, 255 out of the window, ignored, or a patch with itself), as ExCEL's training builds it."
    g = torch.Generator().manual_seed(seed)
    f, (_, y) = torch.randn(B, 6, 5, 6, generator=g).double() + .5, batch(seed, B=B)
    v = (f / f.norm(dim=1, keepdim=True)).reshape(B, 6, 30)
    cos = torch.einsum("bdi,bdj->bij", v, v)
    shares = 1 / (1 + torch.exp(-3 * (cos - cos.sum() / (B * 900))))
    pairs = torch.full((B, 30, 30), 255)
    for b in range(B):
        for i in range(30):
            r, c = divmod(i, 6)
            for r2 in range(max(0, r - radius), min(5, r + radius + 1)):
                for c2 in range(max(0, c - radius), min(6, c + radius + 1)):
                    j, a, z = r2 * 6 + c2, y[b, r, c], y[b, r2, c2]
                    if i != j and a != 255 and z != 255: pairs[b, i, j] = int(a == z)
    pos, neg = pairs == 1, pairs == 0
    expected = .5 * (1 - shares)[pos].sum() / (pos.sum() + 1) + .5 * shares[neg].sum() / (neg.sum() + 1)
    torch.testing.assert_close(affinity_loss(f, y, radius), expected, atol=1e-9, rtol=1e-7)


def test_affinity_loss_sees_known_pairs_in_its_window_only_and_teaches():
    y = torch.zeros(1, 6, 6, dtype=torch.long); y[..., 3:] = 1
    f = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert affinity_loss(f, torch.full_like(y, 255)) == 0
    far = torch.full_like(y, 255); far[0, 0, 0] = 0; far[0, 2, 5] = 1
    assert affinity_loss(f, far, 4) == 0 and affinity_loss(f, far, 5) > 0          # a square window: five columns apart
    optimizer, first = torch.optim.SGD([f], 20.), affinity_loss(f, y)
    for _ in range(100):
        optimizer.zero_grad(); affinity_loss(f, y).backward(); optimizer.step()
    assert affinity_loss(f, y) < .5 * first


def test_the_total_loss_gives_the_affinity_loss_the_fused_features():
    from diclip.config import profile
    from diclip.train import total_loss
    p = profile("mini", affinity_weight=.1, affinity_radius=3)
    fused, target = torch.randn(2, 7, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9).repeat(15)[:128].view(2, 8, 8)
    loss, parts = total_loss(torch.zeros(2, 9, 4, 4), None, fused, target, None, p)
    assert parts["affinity"] == pytest.approx(affinity_loss(fused, target[:, ::2, ::2], 3).item()) and loss.item() == pytest.approx(parts["seg"] + .1 * parts["affinity"], rel=1e-5)


@quick
@given(st.integers(1, 5000), st.integers(0, 300), st.floats(.5, 2))
def test_schedule_stays_between_zero_and_its_base(steps, warmup, power):
    rates = [learning_rate(t, steps, 1e-3, warmup, power) for t in range(0, steps + 1, max(1, steps // 50))]
    assert all(0 <= r <= 1e-3 for r in rates)
    after = [r for t, r in zip(range(0, steps + 1, max(1, steps // 50)), rates) if t >= warmup]
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize("call, message", [
    (lambda: seg_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 2)), "resize the logits"),
    (lambda: seg_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4), foreground=1.5), "from 0 to 1"),
    (lambda: seg_loss(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 3)), "3 outputs"),
    (lambda: seg_loss(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), -1)), "3 outputs"),
    (lambda: cache_loss(torch.zeros(1, 9, 3), torch.zeros(1, 8)), "do not fit"),
    (lambda: affinity_loss(torch.zeros(1, 3, 4, 4), torch.zeros(1, 8, 8)), "labels of patches"),
    (lambda: learning_rate(11, 10, 1.), "ends there")])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_the_total_loss_by_value():
    "Equation (15): networks that know nothing lose ln 9 on pixels and ln 9 on patches, whatever the labels."
    from diclip.config import profile
    from diclip.train import total_loss
    p = profile("mini", cache_weight=.3, foreground_weight=.7)
    target, patches = torch.randint(0, 9, (2, 8, 8)), torch.randint(0, 9, (2, 4))
    loss, parts = total_loss(torch.zeros(2, 9, 4, 4), torch.zeros(2, 4, 9), None, target, patches, p)
    assert loss.item() == pytest.approx(1.3 * math.log(9), rel=1e-5) and set(parts) == {"seg", "cache"}
    assert total_loss(torch.zeros(2, 9, 4, 4), None, None, target, None, p)[0].item() == pytest.approx(math.log(9), rel=1e-5)
    sure = torch.nn.functional.one_hot(target[:, ::2, ::2].contiguous(), 9).permute(0, 3, 1, 2) * 50.
    right = sure.argmax(1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    votes = torch.nn.functional.one_hot((patches - 1) % 9, 9) * 50.
    small = total_loss(sure.repeat_interleave(2, 2).repeat_interleave(2, 3), votes, None, right, patches, p)[0]
    assert small.item() < 1e-6
