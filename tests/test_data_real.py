"Folders in the true formats of VOC, SBD and COCO, broken copies of them, the label index, the augmentation, the download, and the archive for VOC's server."
import hashlib, io, json, os, re, tarfile, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diclip.app import submit
from diclip.app.output import overlay_png, save_label
from diclip.datasets import download
from diclip.datasets.augment import FILL, View, augment, draw_view, apply_view, apply_view_to_mask
from diclip.datasets.coco import COCO, open_dataset, paint_instances, unpacked_runs
from diclip.config import COCO_CLASSES, VOC_CLASSES, profile
from diclip.data import VOC, MiniWorld, palette
from diclip.datasets.download import ARCHIVES, Archive, check_archive, fetch, get_data, missing_files, unpack, verify_data
from diclip.datasets.index import index_places, labels_of, cached_values, write_atomic
from diclip.datasets.sbd import read_sbd, sbd_to_voc, train_aug_ids


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def picture(seed, h=40, w=60): return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def save_mask(path, mask):
    im = Image.fromarray(mask, "P")
    im.putpalette(palette().flatten().tolist())
    im.save(path)


# ---- VOC and SBD -------------------------------------------------------------------------------------------------------------------------

TRAIN, VAL, MORE = ["2007_000032", "2007_000039"], ["2007_000033"], ["2008_000002", "2008_000003"]


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    for f in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"): (root / f).mkdir(parents=True)
    for k, name in enumerate(TRAIN + VAL + MORE):
        Image.fromarray(picture(k)).save(root / f"JPEGImages/{name}.jpg")
        mask = np.zeros((40, 60), np.uint8)
        mask[5:20, 5:20], mask[4, 4:21] = k + 1, 255
        if name not in MORE: save_mask(root / f"SegmentationClass/{name}.png", mask)
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(TRAIN) + "\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(VAL) + "\n")
    (root / "ImageSets/Segmentation/test.txt").write_text("\n".join(MORE) + "\n")
    return root


@pytest.fixture
def sbd(tmp_path):
    from scipy.io import savemat
    root = tmp_path / "benchmark_RELEASE/dataset"
    (root / "cls").mkdir(parents=True)
    for name in TRAIN[1:] + VAL + MORE:
        mask = np.zeros((40, 60), np.uint8)
        mask[10:30, 10:30] = 20
        boundaries = np.empty((20, 1), object)
        for i in range(20): boundaries[i, 0] = np.zeros((2, 2))
        savemat(root / f"cls/{name}.mat", {"GTcls": {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": np.array([20])}}, do_compression=True)
    (root / "train.txt").write_text("\n".join(TRAIN[1:] + VAL + MORE[:1]) + "\n")
    (root / "val.txt").write_text(MORE[1])
    return root


def test_voc_without_masks(voc):
    test = VOC(voc, "test", masks=None)
    assert [(s.mask, s.labels, s.image.shape) for s in test] == [(None, (), (40, 60, 3))] * 2
    with pytest.raises(ValueError, match="has no mask in SegmentationClass"): VOC(voc, "test")[0]
    with pytest.raises(ValueError, match="read without masks"): labels_of(test)
    assert open_dataset(profile("voc"), "test", voc, masks=False)[0].mask is None
    assert [s.labels for s in open_dataset(profile("voc"), "train", voc)] == [(0,), (1,)]


def test_sbd_becomes_train_aug(voc, sbd, tmp_path):
    assert read_sbd(sbd / f"cls/{MORE[0]}.mat")[15, 15] == 20
    path = sbd_to_voc(tmp_path, voc, progress=False)
    assert path.read_text().split() == train_aug_ids(sbd, voc) == sorted(TRAIN + MORE)
    aug = open_dataset(profile("voc"), "train_aug", voc)
    assert [s.labels for s in aug] == labels_of(aug, progress=False) == [(0,), (1,), (19,), (19,)]
    assert (aug[1].mask[4, 4:21] == 255).all(), "VOC's own mask wins"
    assert len(VOC(voc, "val", masks="SegmentationClassAug")) == 1 and VOC(voc, "val", masks="SegmentationClassAug")[0].labels == (2,)
    written = {p: p.stat().st_mtime_ns for p in (voc / "SegmentationClassAug").iterdir()}
    gone = voc / f"SegmentationClassAug/{MORE[0]}.png"
    gone.unlink()
    sbd_to_voc(sbd, voc, progress=False)
    assert {p: p.stat().st_mtime_ns for p in written if p != gone} == {p: t for p, t in written.items() if p != gone} and gone.exists()


def test_broken_sbd_is_refused(voc, sbd, tmp_path):
    mat = sbd / f"cls/{MORE[0]}.mat"
    good = mat.read_bytes()
    mat.write_bytes(good[:len(good) // 2])
    with pytest.raises(ValueError, match="2008_000002.mat.*damaged or incomplete"): sbd_to_voc(sbd, voc, progress=False)
    assert not (voc / "ImageSets/Segmentation/train_aug.txt").exists() and not list((voc / "SegmentationClassAug").glob("*.tmp"))
    mat.write_bytes(b"not matlab")
    with pytest.raises(ValueError, match="damaged or incomplete"): read_sbd(mat)
    mat.unlink()
    with pytest.raises(ValueError, match="no file 2008_000002.mat in cls.*diclip_data sbd"): read_sbd(mat)
    mat.write_bytes(good)
    with pytest.raises(ValueError, match="but there are 8 classes"): sbd_to_voc(sbd, voc, progress=False, num_classes=8)
    Image.fromarray(picture(0, 41, 60)).save(voc / f"JPEGImages/{MORE[0]}.jpg")
    with pytest.raises(ValueError, match="different data sets"): sbd_to_voc(sbd, voc, progress=False)
    (sbd / "val.txt").unlink()
    with pytest.raises(ValueError, match="no list val.txt in dataset"): train_aug_ids(sbd, voc)
    with pytest.raises(ValueError, match="no folder cls"): train_aug_ids(voc, voc)


# ---- the index ---------------------------------------------------------------------------------------------------------------------------

def counted(monkeypatch):
    "A list of the masks that are read from now on."
    read, mask = [], VOC.mask
    monkeypatch.setattr(VOC, "mask", lambda self, name: (read.append(name), mask(self, name))[1])
    return read


def test_index_follows_the_folder(voc, monkeypatch):
    read, data = counted(monkeypatch), VOC(voc, "train")
    assert labels_of(data, progress=False) == [(0,), (1,)] and read == TRAIN
    assert labels_of(data) == labels_of(VOC(voc, "train")) == [(0,), (1,)] and read == TRAIN
    save_mask(voc / f"SegmentationClass/{TRAIN[0]}.png", np.full((40, 60), 9, np.uint8))
    assert labels_of(data) == [(8,), (1,)] and read == TRAIN + TRAIN[:1], "one mask changed, one mask is read"
    lists = voc / "ImageSets/Segmentation/train.txt"
    lists.write_text("\n".join(TRAIN[::-1] + VAL))
    assert labels_of(VOC(voc, "train")) == [(1,), (8,), (2,)] and read[3:] == VAL, "a longer list reads what is new"
    with pytest.raises(ValueError, match="there are 2 classes"): labels_of(VOC(voc, "train", classes=VOC_CLASSES[:2]))
    (voc / f"SegmentationClass/{VAL[0]}.png").unlink()
    with pytest.raises(ValueError, match="has no mask"): labels_of(VOC(voc, "train"))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"2007_000032": 3}', '{"2007_000032": ["1:2:20", [19]]}', "\x00\xff"])
def test_damaged_index_is_made_again(voc, damage):
    data = VOC(voc, "train")
    labels_of(data, progress=False)
    index_places(voc, "SegmentationClass")[0].write_text(damage, encoding="latin-1")
    assert labels_of(data) == [(0,), (1,)]


def test_index_of_read_only_data_goes_to_the_user(voc, tmp_path, monkeypatch):
    (voc / "diclip_index").write_text("a file in the place of the folder: nothing can be written there")
    data, read = VOC(voc, "train"), counted(monkeypatch)
    assert labels_of(data) == labels_of(data) == [(0,), (1,)] and read == TRAIN
    assert len(list((tmp_path / "user/diclip").rglob("*.json"))) == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert labels_of(data) == [(0,), (1,)] and len(read) == 4, "nowhere to write: worked out on every run"


def test_interrupted_index_keeps_what_it_has(tmp_path):
    done = []
    def make(k):
        if k == "c" and len(done) == 2: raise KeyboardInterrupt
        done.append(k)
        return k.upper()
    stamps = dict.fromkeys("abcd", "1")
    with pytest.raises(KeyboardInterrupt): cached_values(tmp_path, "x", stamps, make, progress=False)
    assert "".join(cached_values(tmp_path, "x", stamps, lambda k: (done.append(k), k.upper())[1], progress=False).values()) == "ABCD" and done == list("abcd")
    with pytest.raises(ZeroDivisionError): write_atomic(tmp_path / "y", lambda p: (p.write_text("half"), 1 / 0))
    assert not (tmp_path / "y").exists() and not list(tmp_path.glob("*.tmp"))


def test_labels_of_everything(voc):
    world = MiniWorld("val", 6)
    assert labels_of(world, progress=False) == labels_of(world) == labels_of(world[:]) == [s.labels for s in world]
    assert labels_of(MiniWorld("val", 3)) == labels_of(world)[:3]


# ---- COCO --------------------------------------------------------------------------------------------------------------------------------

COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]     # the gaps of the real file
H, W = 40, 60
rectangle = lambda x0, y0, x1, y1: [x0, y0, x1, y0, x1, y1, x0, y1]


def crowd(compressed):
    "Run lengths of the right half."
    from pycocotools import mask as rle
    region = np.zeros((H, W), np.uint8, order="F")
    region[:, 30:] = 1
    if not compressed: return dict(size=[H, W], counts=[H * 30, H * 30])
    code = rle.encode(region)
    return dict(size=[H, W], counts=code["counts"].decode())


def instances(compressed=False):
    return [dict(id=10, image_id=57, category_id=67, iscrowd=0, area=1, bbox=[], segmentation=[rectangle(0, 20, 30, 40)]),                  # dining table
            dict(id=11, image_id=57, category_id=47, iscrowd=0, area=900, bbox=[], segmentation=[rectangle(10, 15, 16, 30)]),             # cup on it
            dict(id=12, image_id=57, category_id=1, iscrowd=1, area=1, bbox=[], segmentation=crowd(compressed)),                           # people
            dict(id=13, image_id=57, category_id=1, iscrowd=0, area=1, bbox=[], segmentation=[rectangle(40, 5, 45, 30)]),                  # one of them
            dict(id=14, image_id=9, category_id=90, iscrowd=0, area=1, bbox=[], segmentation=[rectangle(5, 5, 9, 9), rectangle(15, 5, 19, 9)])]


def write_coco(root, split, annotations=None, names=COCO_CLASSES):
    images = [dict(id=k, file_name=f"COCO_{split}2014_{k:012d}.jpg", height=H, width=W) for k in (57, 9, 25)]
    (root / "annotations").mkdir(parents=True, exist_ok=True); (root / f"{split}2014").mkdir(exist_ok=True)
    for im in images: Image.fromarray(picture(im["id"], H, W)).save(root / f"{split}2014" / im["file_name"])
    cats = [dict(id=i, name=n, supercategory="x") for i, n in zip(COCO_IDS, names)]
    path = root / f"annotations/instances_{split}2014.json"
    path.write_text(json.dumps(dict(info={}, licenses=[], images=images, annotations=instances() if annotations is None else annotations, categories=cats[::-1])))
    return path


@pytest.fixture
def coco(tmp_path):
    for split in ("train", "val"): write_coco(tmp_path / "coco", split)
    return tmp_path / "coco"


@pytest.mark.parametrize("compressed", [False, True])
def test_coco_masks_and_labels(coco, compressed):
    write_coco(coco, "val", instances(compressed))
    data = COCO(coco, "val")
    table, cup, person, brush = (COCO_CLASSES.index(n) for n in ("dining table", "cup", "person", "toothbrush"))
    assert data.ids == [f"COCO_val2014_{k:012d}" for k in (9, 25, 57)]
    assert labels_of(data) == [s.labels for s in data] == [(brush,), (), (person, cup, table)]
    m = data[2].mask
    assert m.dtype == np.uint8 and m.shape == (H, W)
    assert (m[35, 5], m[25, 12], m[5, 50], m[20, 42], m[5, 5]) == (table + 1, cup + 1, 255, person + 1, 0), "the cup on the table, the person in the crowd"
    assert (data[0].mask > 0).sum() == 32 and data[0].mask.max() == 80 and not data[1].mask.any()


def test_coco_splits(coco):
    assert len(COCO(coco, "train")) == 2 and len(COCO(coco, "val")) == 3, "train has only images with a label"
    assert len(COCO(coco, "val", labelled=True)) == 2 and len(COCO(coco, "train", labelled=False)) == 3
    data = open_dataset(profile("coco"), "train", coco, n=1, masks=False)
    assert isinstance(data, COCO) and len(data) == 1 and data[0].mask is None and data[0].labels == (79,) and "api" not in vars(data)
    assert data[0:2][0].image.shape == (H, W, 3)
    for message, split in (("not public", "test"), ("no split", "minival")):
        with pytest.raises(ValueError, match=message): COCO(coco, split)


def test_coco_index_spares_the_annotation_file(coco, monkeypatch):
    first = labels_of(COCO(coco, "train"))
    monkeypatch.setattr("diclip.datasets.coco.read_annotations", lambda path: 1 / 0)
    assert labels_of(COCO(coco, "train", masks=False)) == first
    monkeypatch.undo()
    write_coco(coco, "train", instances()[4:])
    assert labels_of(COCO(coco, "train")) == [(79,)], "another annotation file, other labels"


def test_broken_coco_is_refused(coco, tmp_path):
    path = coco / "annotations/instances_val2014.json"
    text = path.read_text()
    path.write_text(text[:len(text) // 2])
    with pytest.raises(ValueError, match="instances_val2014.json.*damaged or incomplete"): COCO(coco, "val")
    path.write_text("[]")
    with pytest.raises(ValueError, match="damaged or incomplete"): COCO(coco, "val")
    path.write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(ValueError, match="lists no images"): COCO(coco, "val")
    write_coco(coco, "val", [dict(instances()[0], category_id=12)])
    with pytest.raises(ValueError, match="annotation 10 has category 12, which the file does not define"): COCO(coco, "val")
    write_coco(coco, "val", names=COCO_CLASSES[:4] + ("aeroplane",) + COCO_CLASSES[5:])
    with pytest.raises(ValueError, match="category 4 of instances_val2014.json is 'aeroplane' and class 4 is 'airplane'"): COCO(coco, "val")
    write_coco(coco, "val", names=COCO_CLASSES[:79])
    with pytest.raises(ValueError, match="category 90"): COCO(coco, "val")
    write_coco(coco, "val", [dict(instances()[2], segmentation=dict(size=[H, W + 1], counts=[H * (W + 1)]))])
    with pytest.raises(ValueError, match="different data sets"): COCO(coco, "val")[2]
    write_coco(coco, "val", [dict(instances()[0], segmentation=[])])
    with pytest.raises(ValueError, match="annotation 10 cannot be decoded"): COCO(coco, "val")[2]
    path.unlink()
    with pytest.raises(ValueError, match="no annotation file instances_val2014.json.*diclip_data coco"): COCO(coco, "val")
    with pytest.raises(ValueError, match="no folder annotations.*diclip_data coco"): COCO(tmp_path / "elsewhere", "val")


@pytest.mark.parametrize("change", [lambda t: "", lambda t: t[:-1], lambda t: t + t[-1], lambda t: t + "~", lambda t: t[1:], lambda t: "zzz" + t])
def test_compressed_run_lengths_that_do_not_fill_the_image_are_refused(coco, change):
    region = crowd(True)
    write_coco(coco, "val", [dict(instances()[2], segmentation=dict(region, counts=change(region["counts"])))])
    with pytest.raises(ValueError, match="annotation 12 cannot be decoded"): COCO(coco, "val")[2]


@pytest.mark.parametrize("seed", range(20))
def test_compressed_run_lengths_are_those_of_the_mask(seed):
    from pycocotools import mask as rle
    rng = np.random.default_rng(seed)
    region = np.repeat(rng.random((rng.integers(1, 60), 1)) > rng.random(), rng.integers(1, 80), 1) ^ (rng.random() > .5) if seed % 2 else rng.random((37, 23)) > rng.random()
    flat = region.T.ravel()
    runs = np.diff(np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1], [True]]))).tolist()
    assert unpacked_runs(rle.encode(np.asfortranarray(region.astype(np.uint8)))["counts"]) == [0] * bool(flat[0]) + runs


def test_broken_coco_images_are_refused(coco):
    data = COCO(coco, "val")
    path = coco / f"val2014/{data.ids[0]}.jpg"
    Image.fromarray(picture(0, H, W - 1)).save(path)
    with pytest.raises(ValueError, match="different data sets"): data[0]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=f"cannot read {path.name}"): data[0]
    path.unlink()
    with pytest.raises(ValueError, match="no image file"): data[0]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.booleans()), max_size=6), st.randoms())
def test_the_order_of_instances_does_not_matter(boxes, random):
    regions, values = [], []
    for x, y, w, h, c, many in boxes:
        region = np.zeros((40, 40), bool)
        region[y:y+h, x:x+w] = True
        if region.sum() not in [r.sum() for r in regions]: regions.append(region); values.append(255 if many else c)
    mask, order = paint_instances(regions, values, (40, 40)), list(range(len(regions)))
    random.shuffle(order)
    assert (paint_instances([regions[i] for i in order], [values[i] for i in order], (40, 40)) == mask).all()
    covered = np.any(regions, 0) if regions else np.zeros((40, 40), bool)
    assert ((mask > 0) == covered).all()
    if any(v != 255 for v in values):
        smallest = min((i for i in range(len(regions)) if values[i] != 255), key=lambda i: regions[i].sum())
        assert (mask[regions[smallest]] == values[smallest]).all(), "nothing hides the smallest"


# ---- augmentation ------------------------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 70), st.integers(1, 70))


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 2**32), st.integers(1, 48), st.sampled_from([None, (16, 64), (30, 30)]), st.sampled_from([None, (.5, 2.)]))
def test_augmentation(shape, seed, crop, long_side, rescale):
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    mask = np.random.default_rng(seed + 1).integers(0, 21, shape, dtype=np.uint8)
    run = lambda **kw: augment(image, np.random.default_rng(seed), crop, long_side, rescale, **kw)
    x, real, seen = run(mask=mask)
    assert x.shape == (3, crop, crop) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
    assert real.shape == seen.shape == (crop, crop) and real.dtype == torch.bool and seen.dtype == torch.uint8
    assert real.any() and (seen[~real] == 255).all() and (seen[real] < 255).all(), "padding is ignored, and only padding"
    assert torch.allclose(x[:, ~real], torch.tensor(FILL)[:, None], atol=1e-6)
    rows, cols = real.any(1).nonzero(), real.any(0).nonzero()
    assert real.sum() == len(rows) * len(cols) == (rows[-1] - rows[0] + 1) * (cols[-1] - cols[0] + 1), "the real part is one rectangle"
    again, without = run(mask=mask), run()
    assert all(torch.equal(a, b) for a, b in zip((x, real, seen), again)) and torch.equal(without[0], x) and without[2] is None, "the generator decides everything"


def test_no_profile_resizes_the_long_side():
    "The family's loaders take the range and never apply it; a profile may set it."
    assert [profile(n).long_side for n in ("mini", "voc", "coco")] == [None] * 3 and profile("voc").rescale == profile("coco").rescale == (.5, 2.)
    assert profile("voc", long_side=(512, 2048)).long_side == (512, 2048)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 2**32), st.integers(8, 48))
def test_mask_follows_the_image(shape, seed, crop):
    "A picture of constant color on each half of the frame: wherever a view is clearly of one color, its mask says so."
    mask = np.zeros(shape, np.uint8)
    mask[:, shape[1] // 2:] = 1
    image = np.where(mask[..., None] == 1, np.uint8([255, 0, 0]), np.uint8([0, 0, 255])).astype(np.uint8)
    x, real, seen = augment(image, np.random.default_rng(seed), crop, (16, 128), (.5, 2.), mask=mask)
    red, blue = real & (x[0] > .9) & (x[2] < .1), real & (x[2] > .9) & (x[0] < .1)
    assert (seen[red] == 1).all() and (seen[blue] == 0).all()


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 2**32), st.integers(1, 48))
def test_without_scales_pixels_stay_what_they_are(shape, seed, crop):
    image = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    view = draw_view(shape, np.random.default_rng(seed), crop, None, None)
    assert view.size == shape
    x, real = apply_view(image, view, crop)
    whole = np.full((crop, crop, 3), -1.)
    for y in range(crop):
        for u in range(crop):
            if 0 <= y + view.top < shape[0] and 0 <= u + view.left < shape[1]: whole[y, u] = image[y + view.top, u + view.left] / 255
    if view.mirror: whole = whole[:, ::-1]
    assert (real == (whole[..., 0] >= 0)).all() and np.allclose(x[real], whole[real], atol=1e-6)


def test_flip_alone_and_refusals():
    image, mask = picture(1, 32, 32), picture(2, 32, 32)[..., 0]
    views = {draw_view((32, 32), np.random.default_rng(i), 32, None, None) for i in range(40)}
    assert views == {View((32, 32), 0, 0, False), View((32, 32), 0, 0, True)}
    assert (apply_view_to_mask(mask, View((32, 32), 0, 0, True), 32) == mask[:, ::-1]).all()
    assert not any(draw_view((9, 9), np.random.default_rng(i), 5, flip=False).mirror for i in range(20))
    rng = np.random.default_rng(0)
    for message, call in (("one size", lambda: augment(image, rng, mask=mask[1:])), ("to_rgb", lambda: augment(mask, rng)), ("to_rgb", lambda: augment(image / 255, rng)),
                          ("not colors", lambda: apply_view_to_mask(image, View((32, 32), 0, 0, True), 32)), ("long_side", lambda: augment(image, rng, long_side=(9, 5))),
                          ("rescale", lambda: augment(image, rng, rescale=(0, 1))), ("crop", lambda: augment(image, rng, crop=0))):
        with pytest.raises(ValueError, match=message): call()


def test_a_photograph_without_augmentation_is_what_the_frozen_models_see():
    from diclip.data import Sample, batch_images
    image, mask = picture(1), np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 7
    x, real, seen = augment(image, np.random.default_rng(0), 32, None, None, False, mask)
    assert torch.equal(x, batch_images([Sample("a", image, (6,), mask)], 32)[0]) and real.all()
    assert (seen[:, :16] == 0).all() and (seen[:, 16:] == 7).all()


# ---- download ----------------------------------------------------------------------------------------------------------------------------

class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        s, name = self.server, self.path.strip("/")
        s.asked.append(self.headers["Range"])
        if name not in s.files: return self.send_error(404)
        start = int(self.headers["Range"].split("=")[1].rstrip("-")) if s.ranges and self.headers["Range"] else 0
        body = s.files[name][start:]
        self.send_response(206 if s.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:s.cuts.pop(0)] if s.cuts else body)

    def log_message(self, *args): pass


@pytest.fixture
def server():
    s = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    s.files, s.asked, s.cuts, s.ranges = {}, [], [], True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown(); s.server_close()


def offer(server, name, content, holds=None, into=""):
    server.files[name] = content
    return Archive((f"http://127.0.0.1:{server.server_port}/{name}",), len(content), hashlib.md5(content).hexdigest(), holds or {}, into)


QUICK = dict(wait=0, progress=False)
BYTES = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()


def test_an_interrupted_download_goes_on(server, tmp_path):
    a = offer(server, "a.tar", BYTES)
    server.cuts = [1000, 2000]
    assert fetch(a, tmp_path, **QUICK).read_bytes() == BYTES, "within one call"
    assert server.asked == ["bytes=0-", "bytes=1000-", "bytes=3000-"]
    (tmp_path / "a.tar").unlink()
    server.cuts, server.asked[:] = [1234], []
    with pytest.raises(ValueError, match="1234 of 5000 bytes are kept in a.tar.part"): fetch(a, tmp_path, attempts=1, **QUICK)
    assert not (tmp_path / "a.tar").exists()
    assert fetch(a, tmp_path, **QUICK).read_bytes() == BYTES and server.asked == ["bytes=0-", "bytes=1234-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]
    server.asked.clear()
    fetch(a, tmp_path, **QUICK)
    assert not server.asked, "a good file is not fetched again"


def test_a_server_without_ranges_and_a_second_address(server, tmp_path):
    a = offer(server, "a.tar", BYTES)
    (tmp_path / "a.tar.part").write_bytes(b"x" * 700)
    server.ranges = False
    assert fetch(a, tmp_path, **QUICK).read_bytes() == BYTES
    (tmp_path / "a.tar").unlink()
    both = Archive(("http://127.0.0.1:9/a.tar", *a.urls), a.size, a.md5, {})
    assert fetch(both, tmp_path, attempts=1, **QUICK).read_bytes() == BYTES
    (tmp_path / "a.tar").unlink()
    (tmp_path / "a.tar.part").write_bytes(b"x" * 7000)
    assert fetch(a, tmp_path, **QUICK).read_bytes() == BYTES, "a part that is too long is dropped"


def test_a_wrong_hash_is_never_left_as_good(server, tmp_path):
    a = offer(server, "a.tar", BYTES)
    server.files["a.tar"] = BYTES[::-1]
    with pytest.raises(ValueError, match=f"MD5 {hashlib.md5(BYTES[::-1]).hexdigest()} instead of the published {a.md5}, kept as a.tar.bad"): fetch(a, tmp_path, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.bad"]
    (tmp_path / "a.tar").write_bytes(b"put here by hand")
    with pytest.raises(ValueError, match=f"published {a.md5}.*a.tar.bad; delete that and call diclip_data again"): fetch(a, tmp_path, **QUICK)
    server.files["a.tar"] = BYTES
    assert fetch(a, tmp_path, **QUICK).read_bytes() == BYTES


def test_no_network_says_what_to_put_where(server, tmp_path):
    a = Archive(("http://127.0.0.1:9/VOC.tar", "http://127.0.0.1:10/VOC.tar"), 10, "0" * 32, {}, note="a browser has it")
    with pytest.raises(ValueError, match=r"cannot fetch VOC.tar from http://127.0.0.1:9/VOC.tar: .*; http://127.0.0.1:10/VOC.tar: .* with --from FILE \(a browser has it\)$"): fetch(a, tmp_path, attempts=2, **QUICK)
    gone = offer(server, "gone.tar", BYTES)
    del server.files["gone.tar"]
    with pytest.raises(ValueError, match="404"): fetch(gone, tmp_path, 1, **QUICK)
    server.files["gone.tar"] = b"<html>please log in</html>"
    server.asked.clear()
    with pytest.raises(ValueError, match="offers 26 bytes instead of 5000"): fetch(gone, tmp_path, **QUICK)
    assert not list(tmp_path.glob("*.tar*")) and len(server.asked) == 1, "a firewall's page is not asked for five times"


def test_a_mirror_serves_and_says_so(server, tmp_path, capsys):
    first, second, third = (offer(server, f"{k}/a.tar", BYTES) for k in "xyz")
    server.files["x/a.tar"], server.files["y/a.tar"] = b"blocked by a firewall", BYTES[:-1] + b"?"
    sha = hashlib.sha256(BYTES).hexdigest()
    a = Archive(("http://127.0.0.1:9/a.tar", *first.urls, *second.urls, *third.urls), first.size, first.md5, {}, sha256=sha)
    assert fetch(a, tmp_path, **QUICK).read_bytes() == BYTES
    served, silent = capsys.readouterr().out.splitlines()
    assert served == f"a.tar: from {third.urls[0]}, with the published MD5 and SHA-256"
    for why in (a.urls[0], "offers 21 bytes", f"{second.urls[0]}: MD5 {hashlib.md5(BYTES[:-1] + b'?').hexdigest()} instead of the published {a.md5} and SHA-256"): assert why in silent
    other = Archive(third.urls, a.size, a.md5, {}, sha256="0" * 64)
    with pytest.raises(ValueError, match=f"has SHA-256 {sha} instead of the published {'0' * 64}"): fetch(other, tmp_path, **QUICK)


def tar(files, links=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, to in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, to
            t.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zipped(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in files.items(): z.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize("name, content", [("a.tgz", tar({"ok": b"1", "../evil": b"2"})), ("a.tgz", tar({"/evil": b"2", "../../evil": b""})), ("a.zip", zipped({"ok": b"1", "../evil": b"2"})),
                                           ("a.zip", zipped({"/evil": b"2"})), ("a.tgz", tar({"link/evil": b"2"}, [("link", "../..")])), ("a.zip", zipped({"C:\\evil": b"2"}))],
                         ids="up absolute zip_up zip_absolute link drive".split())     # the bytes hold the time: two workers would see other names
def test_archives_that_climb_out_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="do not trust it"): unpack(tmp_path / name, tmp_path / "x/y", progress=False)
    assert not [p for p in tmp_path.rglob("*") if p.name == "evil"] and not list((tmp_path / "x/y").iterdir())


def test_damaged_archives_leave_nothing(tmp_path):
    good, packed = tar({"d/one": BYTES}), bytearray(zipped({"one": BYTES}))
    packed[600] ^= 255
    for name, content in (("a.tgz", good[:3000]), ("a.zip", bytes(packed)), ("a.tar", b"neither of both" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be unpacked"): unpack(tmp_path / name, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "a.tgz").write_bytes(good)
    unpack(tmp_path / "a.tgz", tmp_path / "out", progress=False)
    unpack(tmp_path / "a.tgz", tmp_path / "out", progress=False)
    assert (tmp_path / "out/d/one").read_bytes() == BYTES


def files_of(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_voc_and_sbd_from_the_server(server, voc, sbd, tmp_path, monkeypatch):
    make = lambda folder, prefix: tar({f"{prefix}/{k}": v for k, v in files_of(folder).items()})
    monkeypatch.setitem(ARCHIVES, "voc", (offer(server, "voc.tar", make(voc, "VOCdevkit/VOC2012"), {"VOCdevkit/VOC2012/JPEGImages": 5}),))
    monkeypatch.setitem(ARCHIVES, "sbd", (offer(server, "sbd.tgz", make(sbd, "benchmark_RELEASE/dataset"), {"benchmark_RELEASE/dataset/cls": 4}),))
    root = tmp_path / "data"
    with pytest.raises(ValueError, match="SBD extends VOC.*call diclip_data voc"): get_data("sbd", root, **QUICK)
    server.cuts = [500]
    new = get_data("voc", root, **QUICK)
    assert files_of(new) == files_of(voc)
    get_data("sbd", root, **QUICK)
    assert VOC(new, "train_aug", masks="SegmentationClassAug").ids == sorted(TRAIN + MORE)
    server.asked.clear()
    for name in ("voc", "sbd"): get_data(name, root, **QUICK); verify_data(name, root, progress=False)
    assert not server.asked
    next((new / "JPEGImages").iterdir()).unlink()
    with pytest.raises(ValueError, match="JPEGImages has 4 of 5 files: call diclip_data voc without --verify"): verify_data("voc", root, progress=False)
    get_data("voc", root, **QUICK)
    assert not missing_files(ARCHIVES["voc"][0], root) and not server.asked, "unpacked again from the archive that is there"


def test_the_command(server, tmp_path, monkeypatch, capsys):
    from diclip.datasets.coco import open_dataset
    content = zipped({"val2014/a.jpg": b"1", "val2014/b.jpg": b"2"})
    monkeypatch.setitem(ARCHIVES, "coco", (offer(server, "val2014.zip", content, {"coco/val2014": 3}, "coco"),))
    with pytest.raises(SystemExit, match="coco/val2014 is incomplete: delete val2014.zip"): download.diclip_data("coco", str(tmp_path))
    monkeypatch.setitem(ARCHIVES, "coco", (offer(server, "val2014.zip", content, {"coco/val2014": 2}, "coco"),))
    download.diclip_data("coco", str(tmp_path), verify=True)
    with pytest.raises(SystemExit, match="unknown data set"): download.diclip_data("imagenet", str(tmp_path))
    monkeypatch.setitem(ARCHIVES, "coco", (Archive(("http://127.0.0.1:9/x.zip",), 10**18, "", {"coco/none": 1}),))
    with pytest.raises(SystemExit, match="make room"): download.diclip_data("coco", str(tmp_path))
    download.diclip_data("mini", str(tmp_path), n=3)
    assert [s.labels for s in open_dataset(profile("mini"), "val", tmp_path / "mini")] == [s.labels for s in MiniWorld("val", 3)]
    download.diclip_data("mini", str(tmp_path), verify=True)
    assert "'test': 3" in capsys.readouterr().out


def test_data_from_files_on_the_disk(server, voc, tmp_path, monkeypatch):
    make = lambda *names: tar({f"VOCdevkit/VOC2012/{k}": v for k, v in files_of(voc).items() if k.startswith(names)})
    lists = "VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt"
    trainval, test = make("JPEGImages/2007", "Seg", "ImageSets/Segmentation/train"), make("JPEGImages/2008", "ImageSets/Segmentation/test")
    monkeypatch.setitem(ARCHIVES, "voc", (offer(server, "voc.tar", trainval, {"VOCdevkit/VOC2012/JPEGImages": 3}),))
    monkeypatch.setitem(ARCHIVES, "voc_test", (offer(server, "test.tar", test, {lists: 2}),))
    root, disk = tmp_path / "data", tmp_path / "disk"
    disk.mkdir()
    for name, content in (("mine.tar", trainval), ("test.tar", test), ("half.tar", test[:99])): (disk / name).write_bytes(content)
    run = lambda name, *files, **k: download.diclip_data(name, str(root), from_file=[str(disk / f) for f in files], **k)
    run("voc", "mine.tar")
    with pytest.raises(ValueError, match="test.txt has 0 of 2 files"): verify_data("voc_test", root, progress=False)
    run("voc_test", "test.tar")
    verify_data("voc_test", root, progress=False)
    assert not server.asked and VOC(root / "VOCdevkit/VOC2012", "test", masks=None).ids == MORE and len(list(disk.iterdir())) == 3
    (root / f"VOCdevkit/VOC2012/JPEGImages/{MORE[1]}.jpg").unlink()
    assert missing_files(ARCHIVES["voc_test"][0], root) == {lists: (1, 2)}, "one test image is missing, although the folder holds more files than the list"
    a = ARCHIVES["voc_test"][0]
    for message, files in ((f"half.tar has MD5 {hashlib.md5(test[:99]).hexdigest()} instead of the published {a.md5}: .*get a fresh copy", ["half.tar"]),
                           (r"is a folder: give the archive itself \(test.tar\)", [""]), ("no such file", ["gone.tar"])):
        with pytest.raises(SystemExit, match=message): run("voc_test", *files)
    with pytest.raises(SystemExit, match="leave out --from"): run("voc", "mine.tar", verify=True)
    with pytest.raises(SystemExit, match="mini has no archives"): run("mini", "mine.tar")
    assert len(list(disk.iterdir())) == 3 and not server.asked


def test_one_of_several_archives_from_the_disk(server, tmp_path, monkeypatch):
    parts = {f"{k}.zip": zipped({f"{k}/{i}.jpg": b"x" * j for i in range(2)}) for j, k in enumerate(("train2014", "val2014"), 1)}
    monkeypatch.setitem(ARCHIVES, "coco", tuple(offer(server, n, c, {f"coco/{n[:-4]}": 2}, "coco") for n, c in parts.items()))
    (tmp_path / "download (1)").write_bytes(parts["val2014.zip"])
    (tmp_path / "other.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match="other.zip is none of train2014.zip, val2014.zip"): get_data("coco", tmp_path / "d", files=[tmp_path / "other.zip"], **QUICK)
    get_data("coco", tmp_path / "d", files=[tmp_path / "download (1)"], **QUICK)
    assert len(server.asked) == 1 and sorted(p.name for p in (tmp_path / "d").iterdir()) == ["coco", "train2014.zip"]


def test_the_option_is_called_from():
    from fastcore.script import anno_parser
    parser = anno_parser(download.diclip_data.__wrapped__)
    assert parser.parse_args(["voc_test", "--from", "a.tar"]).from_file == ["a.tar"] and parser.parse_args(["voc"]).from_file is None
    assert "wants a login" in " ".join(parser.format_help().split())


def test_published_hashes():
    known = {a.name: a for archives in ARCHIVES.values() for a in archives}
    assert len({h for a in known.values() for h in a.hashes.values()}) == 11 and [a.name for a in known.values() if not a.sha256] == ["benchmark.tgz"]
    assert all(set(a.sha256) <= set("0123456789abcdef") and len(a.sha256) in (0, 64) for a in known.values())
    assert [u.split("/")[2].endswith("ox.ac.uk") for u in known["VOCtrainval_11-May-2012.tar"].urls] == [True] * 2 + [False] * 3
    assert len(known) == 6 and all(len(a.md5) == 32 and set(a.md5) <= set("0123456789abcdef") and a.size > 1e8 and a.holds for a in known.values())
    assert all(u.rsplit("/", 1)[-1] == a.name for a in known.values() for u in a.urls)
    try: from torchvision.datasets.voc import DATASET_YEAR_DICT
    except ImportError: return
    assert known["VOCtrainval_11-May-2012.tar"].md5 == DATASET_YEAR_DICT["2012"]["md5"]
    from torchvision.datasets import SBDataset
    assert known["benchmark.tgz"].md5 == SBDataset.md5


# ---- the archive for VOC's server --------------------------------------------------------------------------------------------------------

LAYOUT = "results/VOC2012/Segmentation/comp6_test_cls/"


@pytest.fixture
def predictions(voc, tmp_path):
    "What diclip_segment leaves for the two test images."
    for k, name in enumerate(MORE):
        mask = np.zeros((40, 60), np.uint8)
        mask[5:20, 5:20] = 20 - k
        save_label(mask, tmp_path / f"out/{name}.png")
        overlay_png(picture(k), mask, tmp_path / f"out/{name}_overlay.png")
    return tmp_path / "out"


def members(path):
    with tarfile.open(path, "r:gz") as t: return {m.name: t.extractfile(m).read() for m in t}


def refused(**arguments):
    with pytest.raises(SystemExit) as e: submit.diclip_submit(**arguments)
    assert "\n" not in str(e.value) and str(e.value).startswith("error: ")
    return str(e.value)


def test_submit_writes_what_the_server_takes(voc, predictions, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(submit, "TEST_IMAGES", 2)
    a, b = tmp_path / "a.tgz", tmp_path / "b.tar.gz"
    submit.diclip_submit(str(predictions), data=str(voc), out=str(a))
    files = members(a)
    assert list(files) == [f"{LAYOUT}{i}.png" for i in MORE], "the two of the list, sorted, and no overlay"
    for i in MORE:
        with Image.open(io.BytesIO(files[f"{LAYOUT}{i}.png"])) as im:
            assert im.mode == "P" and im.size == (60, 40) and (np.asarray(im) == np.asarray(Image.open(predictions / f"{i}.png"))).all()
    for f in predictions.iterdir(): os.utime(f, (1, 1))
    submit.diclip_submit(str(predictions), out=str(b))
    assert a.read_bytes() == b.read_bytes(), "other times, another name, no list: the same bytes"
    for arguments in (dict(), dict(data=str(voc)), dict(list=str(voc / "ImageSets/Segmentation/test.txt"))): submit.diclip_submit(check=str(a), **arguments)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 5 and "2 masks" in out[0] and "sizes as the images'" in out[0] and "ids not compared" in out[1] and "sizes not compared" in out[4]


def test_submit_wants_all_1456_and_no_others(tmp_path):
    names = [f"2008_{i:06d}" for i in range(1456)]
    (tmp_path / "out").mkdir()
    for i in names: save_mask(tmp_path / f"out/{i}.png", np.full((1, 1), 3, np.uint8))
    (tmp_path / "list.txt").write_text("\r\n".join(names))
    submit.diclip_submit(str(tmp_path / "out"), list=str(tmp_path / "list.txt"), out=str(tmp_path / "a.tgz"))
    submit.diclip_submit(check=str(tmp_path / "a.tgz"))
    for i in names[3:8]: (tmp_path / f"out/{i}.png").unlink()
    assert "5 of 1456 masks are missing (2008_000003, 2008_000004, 2008_000005...)" in refused(predictions=str(tmp_path / "out"), list=str(tmp_path / "list.txt"), out=str(tmp_path / "b.tgz"))
    assert "1451 masks, and VOC's test list has 1,456" in refused(predictions=str(tmp_path / "out"), out=str(tmp_path / "b.tgz"))
    (tmp_path / "short.txt").write_text("\n".join(names[:3]))
    assert "1448 masks are of no image of the list (2008_000008" in refused(predictions=str(tmp_path / "out"), list=str(tmp_path / "short.txt"), out=str(tmp_path / "b.tgz"))
    assert not (tmp_path / "b.tgz").exists()


def spoil(kind, path):
    good = path.read_bytes()
    mask = np.zeros((40, 60), np.uint8)
    if kind == "half": path.write_bytes(good[:len(good) // 2])
    elif kind == "text": path.write_text("no picture")
    elif kind == "empty": path.write_bytes(b"")
    elif kind == "rgb": Image.fromarray(picture(0)).save(path)
    elif kind == "gray": Image.fromarray(mask).save(path)
    elif kind == "jpeg": Image.fromarray(picture(0)).save(path, "JPEG")
    elif kind == "chosen": Image.fromarray(picture(0)).convert("P", palette=Image.Palette.ADAPTIVE, colors=8).save(path)
    elif kind == "small": save_mask(path, mask[:39])
    elif kind == "void": save_mask(path, mask + 255)
    elif kind == "class": save_mask(path, mask + 21)


BAD = [("half", "cannot be read .*segment 2008_000002 again"), ("text", "cannot be read"), ("empty", "cannot be read"), ("rgb", "PNG of mode RGB and no PNG of mode P"), ("gray", "PNG of mode L"),
       ("jpeg", "JPEG of mode RGB"), ("chosen", "palette of its own"), ("small", r"is \(39, 60\) and its image \(40, 60\)"), ("void", "holds 255"), ("class", "holds 21")]


@pytest.mark.parametrize("kind, message", BAD)
def test_bad_predictions_are_refused_in_folders_and_archives(voc, predictions, tmp_path, monkeypatch, kind, message):
    monkeypatch.setattr(submit, "TEST_IMAGES", 2)
    spoil(kind, predictions / f"{MORE[0]}.png")
    say = refused(predictions=str(predictions), data=str(voc), out=str(tmp_path / "a.tgz"))
    assert MORE[0] in say and re.search(message, say) and not list(tmp_path.glob("*a.tgz*"))
    (tmp_path / "b.tgz").write_bytes(tar({f"{LAYOUT}{i}.png": (predictions / f"{i}.png").read_bytes() for i in MORE}))
    assert refused(check=str(tmp_path / "b.tgz"), data=str(voc)) == say


def test_bad_archives_and_arguments_are_refused(voc, predictions, tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "TEST_IMAGES", 2)
    files = {f"{LAYOUT}{i}.png": (predictions / f"{i}.png").read_bytes() for i in MORE}
    good, path = tar(files), tmp_path / "b.tgz"
    check = lambda content, **k: (path.write_bytes(content), refused(check=str(path), **k))[1]
    assert "holds results/evil: the server wants" in check(tar({**files, "results/evil": b""}))
    assert "holds 2008_000002.png" in check(tar({k.split("/")[-1]: v for k, v in files.items()}))
    assert "holds link" in check(tar(files, [("link", "../..")])) and "there twice" in check(two(files))
    for damaged in (good[:len(good) // 2], b"", b"no archive", zipped(files)): assert "b.tgz cannot be read as a .tar.gz" in check(damaged)
    assert "1 of 2 masks are missing (2008_000003)" in check(tar(dict([*files.items()][:1])), data=str(voc))
    assert "1 masks are of no image of the list (x)" in check(tar({**files, f"{LAYOUT}x.png": files[f"{LAYOUT}{MORE[0]}.png"]}), data=str(voc))
    assert "--check ARCHIVE" in refused() and "--check ARCHIVE" in refused(predictions="a", check="b") and "there is no archive" in refused(check="gone.tgz")
    one = dict(predictions=str(predictions), out=str(tmp_path / "a.tgz"))
    assert "there is no folder gone" in refused(predictions="gone") and "there is no folder gone" in refused(**one, data="gone") and "there is no list gone" in refused(**one, list="gone")
    assert "no predictions <id>.png" in refused(predictions=str(voc)) and ".tar.gz or .tgz only" in refused(predictions=str(predictions), out="a.zip")
    (voc / f"JPEGImages/{MORE[1]}.jpg").write_bytes(b"")
    assert "cannot read 2008_000003.jpg in JPEGImages" in refused(**one, data=str(voc))
    (voc / "ImageSets/Segmentation/test.txt").write_text(f"{MORE[0]}\n")
    assert "test.txt has 1 ids and VOC's has 2: get it with diclip_data voc_test" in refused(**one, data=str(voc))
    (voc / "ImageSets/Segmentation/test.txt").write_text(f"{MORE[0]}\n" * 2)
    assert "names an image twice" in refused(**one, data=str(voc))
    (voc / "ImageSets/Segmentation/test.txt").unlink()
    assert "VOC's test list comes with diclip_data voc_test" in refused(**one, data=str(voc))
    assert not (tmp_path / "a.tgz").exists()


def two(files):
    "A tar file with its first member twice."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as t:
        for name, content in [*files.items(), *files.items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return out.getvalue()


def test_archives_made_by_tar_pass(predictions, voc, tmp_path, monkeypatch):
    "As those who hand in by hand make them: tar czf results.tgz results, with its folders."
    monkeypatch.setattr(submit, "TEST_IMAGES", 2)
    (tmp_path / LAYOUT).mkdir(parents=True)
    for i in MORE: (tmp_path / f"{LAYOUT}{i}.png").write_bytes((predictions / f"{i}.png").read_bytes())
    with tarfile.open(tmp_path / "r.tgz", "w:gz") as t: t.add(tmp_path / "results", "results")
    assert submit.check_results(tmp_path / "r.tgz", submit.wanted_masks(voc)) == 2


def test_a_list_names_the_images_to_segment(voc):
    from diclip.app.commands import image_files
    tests = voc / "ImageSets/Segmentation/test.txt"
    assert [f.name for f in image_files([tests])] == [f"{i}.jpg" for i in MORE]
    (voc / f"JPEGImages/{MORE[0]}.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images of test.txt are not in JPEGImages \(2008_000002\).*diclip_data voc_test"): image_files([tests])


def test_every_command_is_registered_and_explains_itself():
    from configparser import ConfigParser
    from importlib import import_module
    from pathlib import Path
    from fastcore.script import anno_parser
    ini = ConfigParser()
    ini.read(Path(__file__).parent.parent / "settings.ini")
    commands = dict(c.split("=") for c in ini["DEFAULT"]["console_scripts"].split())
    assert "diclip_submit" in commands
    for name, place in commands.items():
        module, function = place.split(":")
        assert anno_parser(getattr(import_module(module), function).__wrapped__, name).format_help().startswith("usage")
