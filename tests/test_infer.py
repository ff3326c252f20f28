"Inference: several views, DenseCRF, label files, a thousand images."
import sys, tarfile
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from diclip.clip import load_clip
from diclip.config import profile
from diclip.crf import crf_all, dense_crf
from diclip.data import MiniWorld, palette
from diclip.head import ConvHead, TransformerHead, raw_tokens
from diclip.infer import head_logits, multi_scale_cams, segment_scores, views
from diclip.app.output import overlay_png, predict, replacing, save_label
from diclip.app.submit import FOLDER, submission

quick = settings(deadline=None, max_examples=15)
few = settings(deadline=None, max_examples=6)
seeds = st.integers(0, 2**16)
scale_lists = st.lists(st.sampled_from([.5, .7, 1., 1.2, 1.5]), min_size=1, max_size=3).map(tuple)
rand = lambda *shape, seed=0: torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
close = lambda a, b, atol=1e-4: torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def clip(): return load_clip(profile("mini"))


@pytest.fixture(scope="module")
def head(clip):
    torch.manual_seed(0)
    return TransformerHead(128, 6, 8, width=32)


def photo(seed, H=24, W=30):
    "Smooth colors with some noise, and probabilities of three classes."
    rng = np.random.default_rng(seed)
    image = (np.linspace(0, 200, W)[None, :, None] + rng.integers(0, 40, (H, W, 3))).astype(np.uint8)
    p = rng.random((3, H, W)) ** 2 + .01
    return image, (p / p.sum(0)).astype(np.float32)


# tokens and logits

def test_raw_tokens_have_no_class_token_and_may_be_learned_from(clip, head):
    x = rand(2, 3, 64, 80)
    t = raw_tokens(clip, x)
    assert t.shape == (2, 6, 80, 128) and t.dtype == torch.float32 and not t.requires_grad and not t.is_inference()
    close(t[:, -1], clip.dense(x, keep=("tokens",)).tokens[-1][:, 1:])
    head(t, (8, 10)).sum().backward()
    head.zero_grad()


@pytest.mark.parametrize("training", [True, False])
def test_head_logits_leave_the_head_as_it_was(clip, training):
    head = ConvHead(128, 6, 8, width=16, hidden=16, dilation=1).train(training)
    a, b = head_logits(clip, head, rand(1, 3, 64, 96)), head_logits(clip, head, rand(1, 3, 64, 96))
    assert head.training is training and torch.equal(a, b) and a.shape == (1, 9, 64, 96) and not a.requires_grad


def test_a_failing_head_keeps_its_mode(clip):
    class Bad(nn.Module):
        def forward(self, tokens, grid): raise RuntimeError("no")
    bad = Bad().train()
    with pytest.raises(RuntimeError): head_logits(clip, bad, rand(1, 3, 64, 64))
    assert bad.training


# views

@quick
@given(st.integers(8, 90), st.integers(8, 90), scale_lists, st.sampled_from([8, 16]), st.booleans())
def test_views_are_whole_patches_near_the_scale(H, W, scales, patch, flip):
    seen = views(rand(1, 3, H, W), patch, scales, flip)
    assert len(seen) == len(scales) * (1 + flip)
    for (x, mirrored), s in zip(seen, [s for s in scales for _ in range(1 + flip)]):
        for side, own in zip(x.shape[2:], (H, W)):
            assert side % patch == 0 and side >= patch and (side == patch or abs(side - own * s) <= patch / 2 + 1e-6)
        assert 0 <= x.min() and x.max() <= 1
    if flip: assert torch.equal(seen[0][0].flip(-1), seen[1][0]) and [m for _, m in seen[:2]] == [False, True]


def test_the_familys_scales_are_exact_on_vocs_crop():
    assert [x.shape[-1] for x, _ in views(rand(1, 3, 320, 320), 16, (.7, 1., 1.2, 1.5))] == [224, 320, 384, 480]


@few
@given(seeds, st.sampled_from(["probabilities", "logits"]))
def test_one_scale_without_mirror_is_the_single_pass(clip, head, seed, mean):
    x = rand(1, 3, 96, 96, seed=seed)
    close(segment_scores(clip, head, x, mean=mean), head_logits(clip, head, x).softmax(1), 1e-6)
    close(segment_scores(clip, head, x, size=96, scales=(1.,), mean=mean), head_logits(clip, head, x).softmax(1), 1e-6)


@few
@given(seeds, scale_lists, st.sampled_from(["probabilities", "logits"]))
def test_the_mirror_of_the_input_is_the_mirror_of_the_output(clip, head, seed, scales, mean):
    x = rand(1, 3, 64, 80, seed=seed)
    run = lambda x: segment_scores(clip, head, x, scales=scales, flip=True, mean=mean)
    a, b = run(x), run(x.flip(3)).flip(3)
    close(a, b)
    close(a.sum(1), torch.ones(1, 64, 80))


def test_images_of_a_batch_do_not_meet(clip, head):
    x = rand(3, 3, 96, 96)
    run = lambda x: segment_scores(clip, head, x, scales=(.7, 1.), flip=True)
    close(run(x), torch.cat([run(i[None]) for i in x]))


def test_size_and_out(clip, head):
    x = rand(1, 3, 50, 75)
    assert segment_scores(clip, head, x, size=96).shape == (1, 9, 50, 75)
    close(segment_scores(clip, head, rand(1, 3, 96, 96), out=(96, 96)), segment_scores(clip, head, rand(1, 3, 96, 96)))
    assert segment_scores(clip, head, x, size=96, out=(10, 11)).shape == (1, 9, 10, 11)


def test_the_two_means_differ_and_agree_where_all_views_do(clip, head):
    x = rand(1, 3, 96, 96)
    both = [segment_scores(clip, head, x, scales=(1., 1.5), mean=m) for m in ("probabilities", "logits")]
    assert not torch.equal(*both)
    close(*[segment_scores(clip, head, x, scales=(1., 1.), mean=m) for m in ("probabilities", "logits")])


def family_mean(clip, head, image, crop, scales, mirror, mean):
    """The family's average restated: each scale is a square of the ORIGINAL image, sides in whole patches; the grid's logits go to the
    image's own size in one step; mirrored ones are mirrored back; the mean is of logits, or of probabilities."""
    total, count = 0, 0
    for s in scales:
        side = clip.patch * max(1, int(crop * s / clip.patch + .5))
        square = image[None] if tuple(image.shape[1:]) == (side, side) else F.interpolate(image[None], (side, side), mode="bilinear", antialias=True).clamp(0, 1)
        for turned in (False, True)[:1 + mirror]:
            with torch.no_grad():
                x = torch.flip(square, (3,)) if turned else square
                z = head(torch.stack([t[:, 1:] for t in clip.dense(x, keep=("tokens",)).tokens], 1), (side // clip.patch,) * 2)
                z = F.interpolate(z, image.shape[1:], mode="bilinear")[0]
            if turned: z = torch.flip(z, (2,))
            total, count = total + (z if mean == "logits" else torch.softmax(z, 0)), count + 1
    return torch.softmax(total / count, 0) if mean == "logits" else total / count


@pytest.mark.parametrize("mean", ["logits", "probabilities"])
@pytest.mark.parametrize("scales, mirror", [((.7, 1., 1.2, 1.5), True), ((1.,), False)])
def test_views_of_two_sizes_are_the_familys_average(clip, head, mean, scales, mirror):
    head.eval()
    photos = [rand(3, 75, 50, seed=1), rand(3, 96, 131, seed=2), rand(3, 64, 64, seed=3)]
    found = segment_scores(clip, head, photos, 64, scales, mirror, mean=mean)
    assert [q.shape for q in found] == [(9, *x.shape[1:]) for x in photos]
    for q, x in zip(found, photos): assert (q - family_mean(clip, head, x, 64, scales, mirror, mean)).abs().max() < 1e-5


def test_a_view_is_made_of_the_original():
    "Stripes of two pixels in a photograph of twice the crop's size: they survive a view at 2, and no squash to the crop."
    stripes = (torch.arange(128) // 2 % 2).float().expand(3, 128, 128)
    ((x, _),) = views([stripes], 8, (2.,), size=64)
    assert torch.equal(x[0], stripes)
    ((x, _),) = views([stripes], 8, (1.5,), size=64)
    assert x.std() > 2 * F.interpolate(F.interpolate(stripes[None], (64, 64), mode="bilinear", antialias=True), (96, 96), mode="bilinear").std()


def test_mixed_sizes_need_a_square_and_do_not_meet():
    photos = [rand(3, 40, 60), rand(3, 56, 24)]
    for x, mirrored in views(photos, 8, (1., 1.5), True, size=32):
        for i, photo in enumerate(photos): close(x[i], dict((m, v) for v, m in views([photo], 8, (x.shape[-1] / 32,), True, size=32))[mirrored][0])
    with pytest.raises(ValueError, match="pass size"): views(photos, 8)
    with pytest.raises(ValueError, match="at least one"): views([], 8, size=32)


# maps

def pooled(x): return F.avg_pool2d(x, 8)[:, :2]


@quick
@given(seeds, scale_lists, st.booleans())
def test_maps_fill_their_range_and_absent_classes_stay_absent(seed, scales, flip):
    x = rand(2, 3, 48, 48, seed=seed)
    fn = lambda v: pooled(v) * torch.tensor([1., 0.])[:, None, None]
    M = multi_scale_cams(fn, x, 48, 8, scales, flip)
    assert M.shape == (2, 2, 48, 48) and (M[:, 1] == 0).all()
    close(M[:, 0].amax((1, 2)), torch.ones(2)); close(M[:, 0].amin((1, 2)), torch.zeros(2))


@quick
@given(seeds, scale_lists)
def test_mirrored_images_have_mirrored_maps(seed, scales):
    x = rand(1, 3, 48, 48, seed=seed)
    run = lambda x: multi_scale_cams(lambda v: pooled(v) + v.new_tensor(range(v.shape[3] // 8)), x, 48, 8, scales, True)
    close(run(x.flip(3)).flip(3), run(x))


def test_one_view_of_maps_is_norm_of_the_enlarged_map():
    x = rand(1, 3, 48, 48)
    big = F.interpolate(pooled(x), (48, 48), mode="bilinear", align_corners=False)
    low, high = big.amin((2, 3), keepdim=True), big.amax((2, 3), keepdim=True)
    close(multi_scale_cams(pooled, x, 48, 8, (1.,), False), (big - low) / (high - low))


@pytest.mark.parametrize("norm", ["minmax", None])
def test_maps_of_two_sizes_come_back_once_and_to_their_own(norm):
    photos, scales = [rand(3, 50, 70, seed=1), rand(3, 33, 20, seed=2)], (.5, 1., 1.5)
    found = multi_scale_cams(pooled, photos, 48, 8, scales, True, norm, keep=[[1], [1, 0]])
    for x, M, keep in zip(photos, found, [[1], [1, 0]]):
        total = 0
        for s in scales:
            side = 8 * int(48 * s / 8 + .5)
            square = F.interpolate(x[None], (side, side), mode="bilinear", antialias=True).clamp(0, 1)
            for turned in (False, True):
                m = F.interpolate(pooled(square.flip(3) if turned else square), x.shape[1:], mode="bilinear")
                total = total + (m.flip(3) if turned else m)
        mean = (total / 6)[0, keep]
        low, high = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
        close(M, mean if norm is None else (mean - low) / (high - low), 1e-5)


def test_values_that_a_model_spoils_are_noticed_behind_the_door(clip):
    class Spoiled(nn.Module):
        def forward(self, tokens, grid): return torch.full((len(tokens), 9, *grid), torch.nan)
    with pytest.raises(ValueError, match="logits hold NaN"): segment_scores(clip, Spoiled(), rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="maps hold NaN"): multi_scale_cams(lambda x: pooled(x) / 0 * 0, rand(1, 3, 48, 48), 48, 8)


# CRF

@quick
@given(seeds, st.integers(0, 10), st.sampled_from([1, 3]), st.sampled_from([3, 13, 67]), st.sampled_from([3, 10]))
def test_crf_keeps_probabilities(seed, rounds, weight, xy, rgb):
    image, p = photo(seed)
    q = dense_crf(image, p, rounds, (1, weight), (xy, rgb, 4))
    assert q.shape == p.shape and q.dtype == np.float32 and (q >= 0).all()
    np.testing.assert_allclose(q.sum(0), 1, atol=1e-4)


@quick
@given(seeds)
def test_crf_without_rounds_or_weights_changes_nothing(seed):
    image, p = photo(seed)
    np.testing.assert_allclose(dense_crf(image, p, rounds=0), p, atol=1e-4)
    np.testing.assert_allclose(dense_crf(image, p, position=(1, 0), bilateral=(67, 3, 0)), p, atol=1e-4)


@quick
@given(seeds)
def test_crf_does_not_order_classes(seed):
    image, p = photo(seed)
    np.testing.assert_allclose(dense_crf(image, p[[2, 0, 1]])[[1, 2, 0]], dense_crf(image, p), atol=1e-3)


def test_crf_equals_mean_field_over_all_pairs():
    image, p = photo(3, 16, 18)
    y, x = np.mgrid[:16, :18]
    def kernel(*f):
        f = np.stack([g.ravel() for g in f], 1)
        k = np.exp(-((f[:, None] - f[None])**2).sum(-1) / 2)
        return k / np.sqrt(np.outer(k.sum(0), k.sum(0)))
    A = 3 * kernel(x, y) + 4 * kernel(x / 67, y / 67, *np.moveaxis(image / 20, 2, 0))
    U, Q = np.log(p).reshape(3, -1), p.reshape(3, -1)
    for _ in range(2):
        Q = np.exp(U + Q @ A); Q /= Q.sum(0)
    fast = dense_crf(image, p, 2, (1, 3), (67, 20, 4))
    assert abs(fast - Q.reshape(p.shape)).mean() < .03 and (fast.argmax(0) == Q.reshape(p.shape).argmax(0)).mean() > .95


def test_crf_snaps_a_soft_edge_to_the_image():
    image = np.zeros((32, 32, 3), np.uint8); image[:, 16:] = 200
    p = np.tile(np.linspace(.05, .95, 32), (32, 1)); p = np.roll(p, 3, 1); p[:, :3] = .05
    q = dense_crf(image, np.stack([1 - p, p]), bilateral=(13, 3, 4))
    assert ((q.argmax(0) == 1) == (image[..., 0] > 0)).mean() > .99 > ((p > .5) == (image[..., 0] > 0)).mean()


def test_crf_leaves_its_inputs_alone_and_takes_read_only_ones_and_tensors():
    image, p = photo(0)
    before = image.copy(), p.copy()
    expected = dense_crf(image, p)
    assert (image == before[0]).all() and (p == before[1]).all()
    image.flags.writeable = p.flags.writeable = False
    assert (dense_crf(image, p) == expected).all()
    assert (dense_crf(np.asfortranarray(image), torch.tensor(before[1], requires_grad=True)) == expected).all()
    np.testing.assert_allclose(dense_crf(image[:, ::-1][:, ::-1], p.astype(np.float64)), expected, atol=1e-2)    # another rounding


@pytest.mark.parametrize("jobs", [2, 3])
def test_jobs_do_not_matter(jobs):
    images, ps = zip(*[photo(i) for i in range(14)])
    one, many = list(crf_all(images, ps, rounds=3)), list(crf_all(iter(images), (torch.from_numpy(p) for p in ps), jobs=jobs, rounds=3))
    assert len(one) == 14 and all((a == b).all() for a, b in zip(one, many, strict=True))
    assert all((a == dense_crf(i, p, 3)).all() for a, i, p in zip(one, images, ps))


def test_processes_take_arrays_that_joblib_maps_into_memory():
    image, p = photo(0, 600, 600)                                     # above the megabyte where it does so, read-only
    assert (next(crf_all([image], [p], jobs=2, rounds=1)) == dense_crf(image, p, 1)).all()


def test_many_images_are_read_as_they_are_needed():
    read = []
    def source():
        for i in range(100): read.append(i); yield photo(i % 5)[0]
    next(crf_all(source(), (photo(i % 5)[1] for i in range(100)), rounds=0))
    assert len(read) < 20


def test_without_the_package_there_is_one_clear_error():
    with patch.dict(sys.modules, {"pydensecrf.densecrf": None}), pytest.raises(ImportError, match="pip install pydensecrf2"): dense_crf(*photo(0))


def crf_with(**changes):
    image, p = photo(0)
    return dense_crf(changes.pop("image", image), changes.pop("p", p), **changes)


@pytest.mark.parametrize("call, message", [
    (lambda: crf_with(image=photo(0)[0] / 255.), "uint8"),
    (lambda: crf_with(image=photo(0)[0][..., 0]), "uint8"),
    (lambda: crf_with(p=photo(0)[1][:, 1:]), "resized to the image"),
    (lambda: crf_with(p=photo(0)[1][0]), "K, H, W"),
    (lambda: crf_with(p=np.log(photo(0)[1])), "softmax"),
    (lambda: crf_with(p=photo(0)[1] * np.nan), "NaN"),
    (lambda: crf_with(rounds=-1), "rounds"),
    (lambda: crf_with(rounds=2.5), "rounds"),
    (lambda: crf_with(position=(0, 3)), "widths"),
    (lambda: crf_with(bilateral=(67, 3, -4)), "weights"),
    (lambda: crf_all([], [], jobs=0), "processes"),
    (lambda: list(crf_all([photo(0)[0]], [])), "shorter"),
    (lambda: list(crf_all([photo(0)[0]], [photo(0)[1] * 2], jobs=2)), "softmax"),
    (lambda: views(rand(1, 3, 8, 8), 8, (0,)), "above 0"),
    (lambda: views(rand(1, 3, 8, 8), 8, (float("nan"),)), "above 0"),
    (lambda: views(rand(1, 3, 8, 8) * 255, 8), "0, 1"),
    (lambda: views([1], 8), "RGB tensor"),
    (lambda: multi_scale_cams(lambda x: x[0], rand(2, 3, 8, 8), 8, 8), "unflatten"),
    (lambda: segment_scores(SimpleNamespace(patch=8), None, rand(1, 3, 8, 8), mean="max"), "choose")])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message): call()


# files

@quick
@given(st.integers(1, 40), st.integers(1, 40), seeds, st.sampled_from([np.uint8, np.int64, "tensor"]))
def test_labels_come_back(tmp_path_factory, H, W, seed, kind):
    mask = np.random.default_rng(seed).integers(0, 256, (H, W))
    path = tmp_path_factory.mktemp("labels") / "new" / "a.png"
    save_label(torch.from_numpy(mask) if kind == "tensor" else mask.astype(kind), path)
    with Image.open(path) as im:
        assert im.mode == "P" and (np.asarray(im) == mask).all()
        assert (np.asarray(im.convert("RGB")) == palette()[mask]).all()
    assert [f.name for f in path.parent.iterdir()] == ["a.png"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    save_label(np.zeros((4, 4), int), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with patch("PIL.Image.Image.save", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt): save_label(np.ones((4, 4), int), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError), replacing(tmp_path / "b") as part: part.write_text("x"); raise OSError
    assert len(list(tmp_path.iterdir())) == 1


def test_overlay_colors_objects_only(tmp_path):
    image, mask = np.full((6, 6, 3), 100, np.uint8), np.zeros((6, 6), int)
    mask[2:4] = 1; mask[5] = 255
    seen = np.asarray(Image.open(overlay_png(image, mask, tmp_path / "o.png", alpha=1.)))
    assert (seen[:2] == 100).all() and (seen[2:4] == palette()[1]).all() and (seen[5] == palette()[255]).all()


MASK = np.array([[0, 20], [3, 0]], np.uint8)


def test_submission_has_the_servers_layout_and_is_reproducible(tmp_path):
    masks = {f"2008_00000{i}": MASK for i in range(3)}
    a = submission(masks.items(), tmp_path / "a.tar.gz", {k: (2, 2) for k in masks})
    b = submission(((k, torch.from_numpy(v)) for k, v in masks.items()), tmp_path / "other.tgz")
    assert a.read_bytes() == b.read_bytes() and a.read_bytes()[:2] == b"\x1f\x8b"
    with tarfile.open(a, "r:gz") as archive:
        assert archive.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/{k}.png" for k in masks]
        with Image.open(archive.extractfile(f"{FOLDER}/2008_000001.png")) as im: assert im.mode == "P" and (np.asarray(im) == MASK).all()


@pytest.mark.parametrize("masks, sizes, message", [
    ([("a", MASK / 2)], None, "integer"),
    ([("a", np.stack([MASK] * 3, 2))], None, "shape"),
    ([("a", np.where(MASK, MASK, 255))], None, "255 is for ground truth"),
    ([("a", MASK + 1)], None, "holds 21"),
    ([("a", MASK.astype(int) - 1)], None, "from -1"),
    ([("a", MASK)], {"a": (2, 3)}, "resize the scores"),
    ([("a", MASK)], {"a": (2, 2), "b": (2, 2)}, "1 of 2 masks are missing"),
    ([("b", MASK)], {"a": (2, 2)}, "no image of the list"),
    ([("a", MASK), ("a", MASK)], None, "twice"),
    ([("../a", MASK)], None, "no file name"),
    ([], None, "missing")])
def test_what_the_server_would_refuse_is_refused_and_leaves_nothing(tmp_path, masks, sizes, message):
    with pytest.raises(ValueError, match=message): submission(masks, tmp_path / "s.tar.gz", sizes)
    assert not list(tmp_path.iterdir())


def test_other_file_types_are_refused(tmp_path):
    for call in (lambda: save_label(MASK, tmp_path / "a.jpg"), lambda: overlay_png(np.zeros((2, 2, 3), np.uint8), MASK, tmp_path / "a.gif"), lambda: submission([("a", MASK)], tmp_path / "a.tar")):
        with pytest.raises(ValueError): call()
    with pytest.raises(ValueError, match="resize"): overlay_png(np.zeros((3, 2, 3), np.uint8), MASK, tmp_path / "a.png")


# a thousand images

@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    root = tmp_path_factory.mktemp("thousand")
    for i in range(1000): Image.fromarray(np.full((6, 6, 3), i % 256, np.uint8)).save(root / f"i{i:04d}.jpg")
    bad = root / "i0500.jpg"
    bad.write_bytes(bad.read_bytes()[:-200])
    (root / "notes.txt").write_text("no image")
    return root


def test_one_damaged_image_in_a_thousand_is_skipped_and_named(thousand):
    run = predict(thousand, lambda s: s.image.shape, on_error="skip")
    found = dict(run)
    assert len(run) == 1000 and len(found) == 999 and "i0500" not in found and list(found) == sorted(found)
    assert [n for n, _ in run.skipped] == ["i0500"] and "i0500.jpg" in run.skipped[0][1]
    assert run.report() == "999 of 1,000 images; skipped i0500"
    assert len(dict(run)) == 999 and len(run.skipped) == 1           # a second loop starts anew


def test_or_it_stops_the_run_by_its_name(thousand):
    seen = []
    with pytest.raises(ValueError, match="i0500"):
        for name, _ in predict(thousand, lambda s: 0): seen.append(name)
    assert len(seen) == 500


class Listed(list):
    "A data set that knows its names and cannot read one of its images."
    ids = ["a", "b", "c"]
    def __getitem__(self, i):
        if i == 1: raise ValueError("unreadable")
        return MiniWorld("val", 3)[i]


def test_data_sets_name_what_they_cannot_read():
    run = predict(Listed([0, 0, 0]), lambda s: s.labels, on_error="skip")
    assert [n for n, _ in run] == ["a", "c"] and run.skipped == [("b", "unreadable")]


def test_mistakes_of_the_program_are_not_skipped():
    with pytest.raises(KeyError): list(predict(MiniWorld("val", 3)[:], lambda s: {}[1], on_error="skip"))
    with pytest.raises(ValueError, match="all 3 images failed"): list(predict(Listed([0, 0, 0]), lambda s: dense_crf(s.image, s.mask), on_error="skip"))
    with pytest.raises(ValueError, match="stop or skip"): predict([], print, on_error="go")
    assert list(predict([], print)) == []


def test_folders_without_images_are_refused(tmp_path):
    for where in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="no images"): predict(where, print)


def test_from_a_folder_to_an_archive(clip, head, thousand, tmp_path):
    from diclip.data import batch_images
    samples = MiniWorld("val", 2)[:]
    def segment(s): return segment_scores(clip, head, batch_images([s], 96), scales=(1., 1.5), flip=True, out=s.image.shape[:2])[0].argmax(0)
    path = submission(predict(samples, segment), tmp_path / "r.tar.gz", {s.id: s.mask.shape for s in samples}, classes=8)
    with tarfile.open(path) as archive: assert len(archive.getnames()) == 2
