"Invariants of the confusion matrix, agreement with scikit-learn and torchmetrics, and refusals."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from diclip.metrics import ConfusionMatrix, cam_confusion, class_scores, count_pairs, mean_score, protocol, threshold_matrices

quick = settings(deadline=None, max_examples=25)


def masks(seed, K=5, B=4, size=12, ignored=.1):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(K, (B, size, size), generator=g)
    pred = torch.where(torch.rand(target.shape, generator=g) < .6, target, torch.randint(K, target.shape, generator=g))
    return pred, target.masked_fill(torch.rand(target.shape, generator=g) < ignored, 255)


def cams(seed, B=3, C=4, size=10):
    g = torch.Generator().manual_seed(seed)
    maps = torch.rand(B, C, size, size, generator=g)
    return maps, torch.rand(B, C, generator=g) < .6, masks(seed, C + 1, B, size)[1]


@quick
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_agrees_with_sklearn(seed, K):
    from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, precision_score, recall_score
    pred, target = masks(seed, K)
    cm, seen = ConfusionMatrix(K).update(pred, target), target != 255
    p, t, labels = pred[seen].numpy(), target[seen].numpy(), range(K)
    assert (confusion_matrix(t, p, labels=labels) == cm.matrix.numpy()).all()
    for ours, theirs in ((cm.iou(), jaccard_score), (cm.precision(), precision_score), (cm.recall(), recall_score)):
        np.testing.assert_allclose(ours.numpy(), theirs(t, p, labels=labels, average=None), rtol=1e-9)
    assert cm.accuracy() == pytest.approx(accuracy_score(t, p))


@quick
@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(2, 7))
def test_agrees_with_torchmetrics(seed, K, present):
    from torchmetrics.functional import jaccard_index
    pred, target = masks(seed, min(K, present))          # the upper classes are empty
    cm = ConfusionMatrix(K).update(pred, target)
    assert cm.miou() == pytest.approx(jaccard_index(pred, target, task="multiclass", num_classes=K, ignore_index=255).item(), abs=1e-5)


@quick
@given(st.integers(0, 10**6), st.permutations(range(4)))
def test_streaming_merging_and_order(seed, order):
    pred, target = masks(seed)
    whole = ConfusionMatrix(5).update(pred, target)
    stream = ConfusionMatrix(5)
    for i in order: stream.update(pred[i], target[i])
    merged = sum(ConfusionMatrix(5).update(pred[i], target[i]) for i in order)
    for other in (stream, merged):
        assert (other.matrix == whole.matrix).all() and other.images == 4
        assert (other.subset([order.index(i) for i in range(4)]).matrix == whole.matrix).all()
    assert (merged.subset([0]).matrix == count_pairs(pred, target, 5)[order[0]]).all()


@quick
@given(st.integers(0, 10**6), st.permutations(range(5)))
def test_renaming_classes_permutes_scores(seed, order):
    pred, target = masks(seed)
    names = torch.tensor(order)
    renamed = ConfusionMatrix(5).update(names[pred], torch.where(target == 255, 255, names[target.clamp(max=4)]))
    for metric, value in class_scores(ConfusionMatrix(5).update(pred, target).matrix).items():
        torch.testing.assert_close(class_scores(renamed.matrix)[metric][names], value, equal_nan=True)


@quick
@given(st.integers(0, 10**6))
def test_identities(seed):
    pred, target = masks(seed)
    cm = ConfusionMatrix(5).update(pred, target)
    torch.testing.assert_close(cm.confusion_ratio(), 1/cm.precision() - 1)
    torch.testing.assert_close(1/cm.iou(), 1/cm.precision() + 1/cm.recall() - 1)
    perfect = ConfusionMatrix(5).update(target.clamp(max=4), target)
    assert perfect.miou() == perfect.accuracy() == perfect.precision(mean=True) == 1 and perfect.confusion_ratio(mean=True) == 0


def test_known_values():
    cm = ConfusionMatrix(3).update([[0, 0, 1, 1]], [[0, 1, 1, 255]])
    assert cm.matrix.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert cm.iou()[:2].tolist() == [.5, .5] and cm.iou()[2].isnan() and cm.miou() == .5 and cm.iou(mean=True) == .5
    assert cm.precision()[:2].tolist() == [.5, 1] and cm.recall()[:2].tolist() == [1, .5]
    assert cm.confusion_ratio()[:2].tolist() == [1, 0] and cm.accuracy() == pytest.approx(2/3)


def test_empty_classes_are_nan_and_named():
    pred, target = torch.tensor([[0, 2, 1, 1]]), torch.tensor([[0, 0, 3, 1]])
    cm = ConfusionMatrix(5).update(pred, target)      # 2: only predicted, 3: only there, 4: neither
    assert cm.iou().isnan().tolist() == [False, False, True, False, True]
    assert cm.iou()[3] == 0 and cm.undefined(metric="iou") == [2, 4]
    assert cm.undefined(list("abcd")) == ["b", "c", "d"] and cm.undefined() == [2, 3, 4]
    assert cm.undefined(list("zabcd"), "precision") == ["c", "d"] and cm.undefined(metric="recall") == [2, 4]
    assert ConfusionMatrix(3).undefined(["x", "y"]) == ["background", "x", "y"]
    assert np.isnan(ConfusionMatrix(3).miou()) and "nan" in repr(ConfusionMatrix(3))


def test_the_mean_is_over_the_classes_that_are_in_the_truth():
    "The family's mean: two of six classes are there; four more are claimed with a pixel each, which are misses of the two."
    target = torch.zeros(1, 10, 10, dtype=torch.long)
    target[:, 5:] = 1
    pred = target.clone()
    pred[0, 0, :2], pred[0, 9, :2] = torch.tensor([2, 3]), torch.tensor([4, 5])
    cm = ConfusionMatrix(6).update(pred, target)
    hist = np.zeros((6, 6))
    np.add.at(hist, (target.flatten().numpy(), pred.flatten().numpy()), 1)
    union, there = hist.sum(0) + hist.sum(1) - np.diag(hist), hist.sum(1) > 0
    assert cm.miou() == pytest.approx((np.diag(hist)[there] / union[there]).mean()) == pytest.approx(.96)
    assert np.mean(np.diag(hist) / union) == pytest.approx(.32), "what counting the four as 0 would give"
    assert cm.undefined(list("abcdef"), "iou") == list("cdef") and cm.iou()[2:].isnan().all()
    more = dict(split="val", labels=False, scales=(1,), flip=False, crf=False, threshold=None)
    assert protocol(**more, absent=cm.undefined(list("bcdef"), "iou")).endswith("mean without c and d and e and f, of which the truth has none")
    assert protocol(**more, absent=[]) == protocol(**more)
    stack = mean_score(torch.stack([cm.matrix, torch.eye(6).long()]))
    assert stack.tolist() == pytest.approx([.96, 1.])


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int64, torch.uint8, torch.int32, list])
def test_input_kinds(kind):
    pred, target = masks(0)
    cast = (lambda m: m.tolist()) if kind is list else (lambda m: m.to(kind)) if isinstance(kind, torch.dtype) else (lambda m: m.numpy().astype(kind))
    assert (ConfusionMatrix(5).update(cast(pred), cast(target)).matrix == ConfusionMatrix(5).update(pred, target).matrix).all()


def test_read_only_arrays_and_ignored_pixels():
    pred, target = (m.numpy().copy() for m in masks(1))
    pred[target == 255] = 200                          # what was predicted there does not matter
    pred.flags.writeable = False
    assert ConfusionMatrix(5).update(pred, target).matrix.sum() == (target != 255).sum()
    assert ConfusionMatrix(5, ignore_index=-1).update(pred.clip(0, 4), np.where(target == 255, -1, target)).images == 4


@pytest.mark.parametrize("pred, target, words", [
    (torch.zeros(4, 4), torch.zeros(4, 4).long(), "argmax"),
    (torch.full((4, 4), torch.nan), torch.zeros(4, 4).long(), "pred holds NaN"),
    (torch.zeros(4, 4).long(), torch.full((4, 4), torch.nan), "target holds NaN"),
    (torch.zeros(4).long(), torch.zeros(4).long(), r"\(H, W\) or \(B, H, W\)"),
    (torch.zeros(1, 2, 4, 4).long(), torch.zeros(4, 4).long(), r"\(H, W\) or \(B, H, W\)"),
    (torch.zeros(4, 4).long(), torch.zeros(4, 5).long(), "resize"),
    (torch.full((4, 4), 3), torch.zeros(4, 4).long(), "pred holds values from 3 to 3"),
    (torch.zeros(4, 4).long(), torch.full((4, 4), -1), "target holds values from -1"),
    (torch.full((4, 4), 255), torch.zeros(4, 4).long(), "only a target may hold 255"),
])
def test_update_refuses(pred, target, words):
    cm = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=words): cm.update(pred, target)
    assert cm.images == 0 and not cm.matrix.any()


def test_other_refusals():
    pred, target = masks(0)
    cm = ConfusionMatrix(5).update(pred, target)
    for make in (lambda: ConfusionMatrix(1), lambda: ConfusionMatrix(256), lambda: cm + ConfusionMatrix(6), lambda: cm + ConfusionMatrix(5, 254),
                 lambda: cm.subset([4]), lambda: cm.subset([-1]), lambda: cm.bootstrap(level=0), lambda: cm.bootstrap("dice"),
                 lambda: cm.subset([0]).bootstrap(), lambda: ConfusionMatrix(5).bootstrap(), lambda: cm.undefined(["a"]),
                 lambda: ConfusionMatrix(5, per_image=False).update(pred, target).bootstrap()):
        with pytest.raises(ValueError): make()
    with pytest.raises(TypeError): cm + 3


@pytest.mark.parametrize("metric", ["miou", "precision", "recall", "accuracy", "confusion_ratio"])
def test_bootstrap(metric):
    pred, target = masks(3, B=30)
    cm = ConfusionMatrix(5).update(pred, target)
    lo, hi = cm.bootstrap(metric, draws=200)
    assert lo < mean_score(cm.matrix, metric) < hi
    assert (lo, hi) == cm.bootstrap(metric, draws=200) != cm.bootstrap(metric, draws=200, seed=1)
    narrow = cm.bootstrap(metric, draws=200, level=.5)
    assert lo < narrow[0] < narrow[1] < hi


def test_bootstrap_equals_counting_again():
    pred, target = masks(4, B=6)
    g, slow = torch.Generator().manual_seed(7), []
    for _ in range(10):
        i = torch.randint(6, (6,), generator=g)
        slow.append(ConfusionMatrix(5).update(pred[i], target[i]).miou())
    torch.testing.assert_close(ConfusionMatrix(5).update(pred, target).resampled(draws=10, seed=7), torch.tensor(slow, dtype=torch.double))


def test_bootstrap_of_equal_images_is_a_point():
    pred, target = masks(5, B=1)
    cm = ConfusionMatrix(5).update(pred.expand(8, -1, -1), target.expand(8, -1, -1))
    np.testing.assert_allclose(cm.bootstrap(draws=20), cm.miou(), rtol=1e-12)


@quick
@given(st.integers(0, 10**6))
def test_thresholds_in_one_pass(seed):
    maps, labels, target = cams(seed)
    thresholds = torch.tensor([0, .2, maps.flatten()[7].item(), .7, 1.]).unique()      # one of them meets a value exactly
    tables = threshold_matrices(maps, labels, target, thresholds)
    loop = [cam_confusion(maps, labels, target, t.item()) for t in thresholds]
    assert (tables == torch.stack([cm.matrix for cm in loop])).all()
    torch.testing.assert_close(mean_score(tables), torch.tensor([cm.miou() for cm in loop], dtype=torch.double))
    halves = threshold_matrices(maps[:1], labels[:1], target[:1], thresholds) + threshold_matrices(maps[1:], labels[1:], target[1:], thresholds)
    assert (halves == tables).all()


def test_cam_confusion_by_hand():
    maps, labels, target = cams(0)
    cm = cam_confusion(maps, labels, target, .5)
    strongest = (maps * labels[:, :, None, None]).max(1)
    pred = torch.where(strongest.values > .5, strongest.indices + 1, 0)
    assert (cm.matrix == ConfusionMatrix(5).update(pred, target).matrix).all() and cm.images == 3
    assert cam_confusion(maps, labels, target, 1.).matrix[:, 1:].sum() == 0
    assert cam_confusion(maps, torch.zeros_like(labels), target, 0).matrix[:, 1:].sum() == 0
    assert (cam_confusion(maps, labels.long().numpy(), target.numpy(), .5).matrix == cm.matrix).all()


def test_cam_refusals():
    maps, labels, target = cams(0)
    for call in (lambda m, l, t: cam_confusion(m, l, t, .5), lambda m, l, t: threshold_matrices(m, l, t, [.2, .5])):
        with pytest.raises(ValueError, match="NaN"): call(maps / 0 * 0, labels, target)
        with pytest.raises(ValueError, match="one flag a class"): call(maps, labels[:, :2], target)
        with pytest.raises(ValueError, match="one flag a class"): call(maps[0], labels, target)
        with pytest.raises(ValueError, match="resize"): call(maps, labels, target[:, 1:])
        with pytest.raises(ValueError, match="target holds values"): call(maps, labels, target.where(target < 255, 9))
    for bad in ([.5, .2], [.2, .2], [[.1, .2]]):
        with pytest.raises(ValueError, match="increasing"): threshold_matrices(maps, labels, target, bad)


def test_protocol():
    facts = dict(split="val", labels=True, scales=(1., .5), flip=True, crf=False, threshold=.45)
    assert protocol(**facts, n=400) == "val, labels given, scales 1/0.5, flip, no CRF, threshold 0.45, n 400"
    for name in facts:
        with pytest.raises(TypeError, match=name): protocol(**{k: v for k, v in facts.items() if k != name})
