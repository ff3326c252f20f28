"The rendered world, image files of every kind, VOC's format and broken copies of it."
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diclip.config import PROFILES, profile
from diclip.data import VOC, MiniWorld, Sample, batch_images, export_voc, multi_hot, read_image, to_rgb
from diclip.datasets.coco import open_dataset
from diclip.shapes import CLASSES, silhouette
from diclip.world import MIN_PIXELS, SIZE, SPLITS, render


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(sorted(SPLITS)))
def test_a_scene_is_a_function_of_its_seed_and_fits_its_labels(index, split):
    a, b = render(index, split), render(index, split)
    assert (a.image == b.image).all() and (a.mask == b.mask).all() and a.caption == b.caption
    assert a.image.shape == (SIZE, SIZE, 3) and a.image.dtype == np.uint8 and a.mask.shape == (SIZE, SIZE)
    assert set(np.unique(a.mask)) - {0} == {c + 1 for c in a.labels}
    assert all((a.mask == c + 1).sum() >= MIN_PIXELS for c in a.labels)
    assert all((CLASSES[c] in a.caption.split()) == (c in a.labels) for c in range(8))


def test_splits_differ():
    assert len({render(3, s).image.tobytes() for s in SPLITS}) == len(SPLITS)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(CLASSES))
def test_silhouettes_stay_near_their_frame(seed, name):
    for polygon, paint in silhouette(name, np.random.default_rng(seed)):
        assert polygon.ndim == 2 and polygon.shape[1] == 2 and abs(polygon).max() < 1.4
        assert paint in (0, 1, 2, "dark", "light")


def test_profiles_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="choose one of mini, voc, coco"): profile("pascal")
    with pytest.raises(ValueError, match="did you mean layers"): profile("mini", layer=3)
    with pytest.raises(ValueError, match="prompt_names"): profile("mini", classes=("boat",))
    with pytest.raises(ValueError, match="non-empty"): profile("mini", classes=(), prompt_names=())
    assert {n: p.grid for n, p in PROFILES.items()} == dict(mini=(SIZE // 8,) * 2, voc=(20, 20), coco=(20, 20))


def test_settings_are_checked_when_they_are_set_and_name_what_there_is():
    from dataclasses import replace
    from typing import get_args
    from diclip.acr import PROPAGATIONS
    from diclip.cam import NORMS
    from diclip.clip import READOUTS
    from diclip.config import FusionName, CamSettings, HeadSettings, PropagationName, ReadoutName, RetrievalSettings
    from diclip.head import HEADS
    from diclip.retrieval import READINGS
    from diclip.vce import FUSIONS
    for names, there in ((PropagationName, PROPAGATIONS), (ReadoutName, READOUTS), (FusionName, FUSIONS), (HeadSettings.__annotations__["head"], HEADS),
                         (CamSettings.__annotations__["norm"], NORMS), (RetrievalSettings.__annotations__["dynamic_votes"], READINGS)):
        assert set(get_args(names)) == set(there)
    p = profile("mini")
    for wrong in (dict(alpha=-1), dict(tau_n=float("nan")), dict(steps=0), dict(groups=2.5), dict(timestep=1000), dict(sd_layers=(-1,)), dict(rescale=(.5,)), dict(fusion="sum"),
                  dict(foreground_weight=1.5), dict(mask_threshold=1.), dict(thresholds=(.2, 3.)), dict(crop="wide")):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError) as e: replace(p, **wrong)
        assert str(e.value).startswith(f"setting {name}") and "\n" not in str(e.value) and "http" not in str(e.value), e.value
        with pytest.raises(ValueError, match=f"setting {name}"): profile("mini", **wrong)


def picture(tmp_path, name, image):
    image.save(tmp_path / name)
    return read_image(tmp_path / name)


def test_images_of_every_kind_become_rgb(tmp_path):
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
    assert (picture(tmp_path, "rgb.png", Image.fromarray(rgb)) == rgb).all()
    gray = picture(tmp_path, "gray.png", Image.fromarray(rgb[..., 0]))
    assert (gray == rgb[..., :1]).all()
    deep = picture(tmp_path, "deep.png", Image.fromarray((rgb[..., 0].astype(np.uint16) * 257)))
    assert (deep == rgb[..., :1]).all()
    clear = np.dstack([rgb, np.zeros((10, 12), np.uint8)])
    assert (picture(tmp_path, "rgba.png", Image.fromarray(clear)) == 255).all()
    assert picture(tmp_path, "one.png", Image.fromarray(rgb[:1, :1])).shape == (1, 1, 3)
    assert picture(tmp_path, "palette.png", Image.fromarray(rgb).convert("P")).shape == (10, 12, 3)
    assert batch_images([rgb[:1, :1], rgb], 96).shape == (2, 3, 96, 96)


def test_images_that_are_none_are_refused(tmp_path):
    Image.fromarray(render(0).image).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not an image")
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(ValueError, match=f"cannot read {name}"): read_image(tmp_path / name)
    with pytest.raises(ValueError, match="no image file"): read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="NaN"): to_rgb(np.full((4, 4, 3), np.nan))
    with pytest.raises(ValueError, match="permute"): to_rgb(np.zeros((2, 3, 4, 4)))


@pytest.fixture
def voc(tmp_path):
    return export_voc(MiniWorld("val", 3)[:], tmp_path / "VOC2012", "train")


def test_voc_round_trip(voc):
    data = VOC(voc, "train", classes=CLASSES)
    for a, b in zip(data, MiniWorld("val", 3)):
        assert a.labels == b.labels and (a.mask == b.mask).all()
        assert abs(a.image.astype(int) - b.image).mean() < 12
    assert multi_hot(data[:], 8).sum() == sum(len(s.labels) for s in data)
    from torchvision.datasets import VOCSegmentation
    assert VOCSegmentation is not None
    assert len(open_dataset(profile("mini"), "train", voc)) == 3


def test_broken_voc_folders_are_refused(voc):
    mask = voc / "SegmentationClass/val_0001.png"
    good = mask.read_bytes()
    Image.open(mask).convert("RGB").save(mask)
    with pytest.raises(ValueError, match="in color"): VOC(voc, "train", classes=CLASSES)[1]
    mask.write_bytes(good)
    with pytest.raises(ValueError, match="pass the data set's own classes"): [s for s in VOC(voc, "train", classes=CLASSES[:1])]
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(mask)
    with pytest.raises(ValueError, match="different data sets"): VOC(voc, "train", classes=CLASSES)[1]
    mask.unlink()
    with pytest.raises(ValueError, match="no mask"): VOC(voc, "train", classes=CLASSES)[1]
    (voc / "JPEGImages/val_0000.jpg").unlink()
    with pytest.raises(ValueError, match="no image file"): VOC(voc, "train", classes=CLASSES)[0]
    with pytest.raises(ValueError, match="this folder has train"): VOC(voc, "trainaug")
    for f in os.listdir(voc / "SegmentationClass"): (voc / "SegmentationClass" / f).unlink()
    (voc / "SegmentationClass").rmdir()
    with pytest.raises(ValueError, match="no folder SegmentationClass.*diclip_data voc"): VOC(voc, "train")
    with pytest.raises(ValueError, match="no folder JPEGImages"): VOC(voc / "elsewhere", "train")
    with pytest.raises(ValueError, match="pass --data ROOT"): open_dataset(profile("voc"), "train")


def test_mini_world_is_a_sequence():
    w = MiniWorld("val", 5)
    assert isinstance(w[0], Sample) and (w[-1].image == w[4].image).all() and len(w[1:3]) == 2
    with pytest.raises(IndexError): w[5]
    with pytest.raises(ValueError, match="unknown split"): MiniWorld("dev")
