"""A sample of what users get wrong: one sentence on stderr, exit code 2, nothing lost. A longer list was tried by hand."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.cache import Cache
from diclip.data import VOC, MiniWorld, Sample, export_voc, multi_hot, read_image, to_rgb
from diclip.datasets.coco import read_annotations
from diclip.engine.checkpoint import load_checkpoint, save_checkpoint
from diclip.model import DiCLIP, new_student

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A model with fresh weights, and its folder."
    m = DiCLIP.from_pretrained("mini")
    m.student = new_student(m.clip, m.profile).eval()
    folder = tmp_path_factory.mktemp("saved") / "model"
    m.save_pretrained(folder)
    return m, folder


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3): Image.fromarray(np.full((40, 60, 3), 60 * i, np.uint8)).save(tmp_path / f"photos/{i}.jpg")
    return tmp_path / "photos"


def shell(*words, cwd=None):
    "Exit code and error stream of a command, as a user sees them."
    ran = subprocess.run([str(BIN / words[0]), *map(str, words[1:])], cwd=cwd, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    return ran.returncode, ran.stderr


@pytest.mark.parametrize("words, message", [(["diclip_cam", "nothing.png", "--classes", "boat"], "check the path"), (["diclip_train", "--device", "foo"], "unknown device 'foo'"),
    (["diclip_cache", "--device", "cuda:77"], "PyTorch finds"), (["diclip_segment", ".", "--model", "runs/none/model"], "no"), (["diclip_repro", "--profile", "maxi"], "unknown profile 'maxi'"), (["diclip_train", "--seed", "-1"], "seed=-1"),
    (["diclip_data", "imagenet"], "unknown data set"), (["diclip_train", "--data", ".", "--labels", "none.csv"], "no list of labels"), (["diclip_bench", "--runs", "0"], "at least one")])
def test_one_line_and_exit_code_2(words, message, tmp_path):
    code, said = shell(*words, cwd=tmp_path)
    assert code == 2 and len(said.strip().splitlines()) == 1 and said.startswith("error: ") and message in said


def test_a_traceback_for_those_who_ask(tmp_path):
    code, said = shell("diclip_cam", "nothing.png", "--classes", "boat", "--debug", cwd=tmp_path)
    assert code == 1 and said.startswith("Traceback") and "check the path" in said


def test_nobodys_picture_is_overwritten(model, photos, monkeypatch):
    from diclip.app.commands import diclip_cam, diclip_segment
    monkeypatch.chdir(photos.parent)
    Image.open(photos / "0.jpg").save(photos / "0.png")
    kept = {f: f.read_bytes() for f in photos.iterdir()}
    for run in (lambda: diclip_segment([str(photos / "0.png")], model=str(model[1]), out="photos"), lambda: diclip_cam([str(photos / "0.png")], classes="boat", out="photos")):
        with pytest.raises(SystemExit, match="would replace the image") as e: run()
        assert e.value.code == 2
    with pytest.raises(SystemExit, match="would both become 0.png"): diclip_segment([str(photos)], model=str(model[1]), out="out")
    assert {f: f.read_bytes() for f in photos.iterdir()} == kept and not Path("out").exists()


def test_files_that_cannot_be_read_are_named_and_skipped(model, photos, monkeypatch, capsys):
    from diclip.app.commands import diclip_segment
    monkeypatch.chdir(photos.parent)
    (photos / "9.jpg").write_bytes((photos / "0.jpg").read_bytes()[:200])
    (photos / ("x" * 250 + ".jpg")).write_bytes((photos / "0.jpg").read_bytes())
    monkeypatch.setattr("diclip.data.MAX_PIXELS", 40 * 60)
    Image.new("RGB", (61, 40)).save(photos / "large.png")
    diclip_segment([str(photos)], model=str(model[1]), out="out", one_scale=True, skip_damaged=True)
    said = capsys.readouterr().out
    assert said.startswith("3 of 6 images; skipped 9, large, xxx") and {f.stem[0] for f in Path("out").glob("*.png")} == set("012")
    with pytest.raises(SystemExit, match="large: large.png is too large"): diclip_segment([str(photos / "large.png")], model=str(model[1]), out="o", one_scale=True)


@pytest.mark.parametrize("image", [np.full((4, 4), 200.), -np.ones((4, 4)), np.full((4, 4), -3), np.full((4, 4), 70_000), np.full((4, 4), "a"), np.full((4, 4), 1j), np.full((4, 4), np.nan)], ids=lambda x: f"{x.dtype}{x.flat[0]}")
def test_numbers_that_are_no_colors(image):
    with pytest.raises(ValueError): to_rgb(image)


def test_colors_of_any_depth(tmp_path):
    gray = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    for name, image in (("deep.png", Image.fromarray(gray.astype(np.uint16) * 257)), ("float.tiff", Image.fromarray(gray / np.float32(255))), ("bytes.tiff", Image.fromarray(gray.astype(np.float32)))):
        image.save(tmp_path / name)
        assert np.abs(read_image(tmp_path / name)[..., 0].astype(int) - gray).max() <= 1, name
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    dark.save(tmp_path / "dark.png")
    assert read_image(tmp_path / "dark.png").max() == 0 and to_rgb(gray > 100).max() == 255


def test_labels_that_are_no_classes():
    image = np.zeros((4, 4, 3), np.uint8)
    for bad in ((-1,), (8,), (1.5,), ("cat",), None, 3):
        with pytest.raises(ValueError, match="odd"): multi_hot([Sample("odd", image, bad, None)], 8)
    for bad in (image, None, Sample("odd", image[..., 0], (1,), None)):
        with pytest.raises(ValueError): multi_hot([bad], 8)


def test_fit_refuses(model, tmp_path):
    m = DiCLIP(model[0].clip, model[0].sd, model[0].profile)
    blank = [Sample(str(i), np.zeros((160, 160, 3), np.uint8), (), None) for i in range(3)]
    for samples, message in ((blank, "none of the images has a label"), ([], "without images"), (None, "without images")):
        with pytest.raises(ValueError, match=message): m.fit(samples, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="no folder .*can be made"): m.fit(MiniWorld("train", 2), __file__, progress=False)
    for seed in ("a", -1, 1.5):
        with pytest.raises(ValueError, match="seed="): new_student(m.clip, m.profile, seed=seed)
    with pytest.raises(ValueError, match="cache is int"): m.use_cache(5)
    with pytest.raises(ValueError, match="nothing|no head and adapter"): DiCLIP.from_pretrained("mini").fit(MiniWorld("train", 2), tmp_path / "b", progress=False, go_on=True)


def test_another_data_set_of_the_same_size(tmp_path):
    from diclip.train import data_digest
    a, b = MiniWorld("train", 3)[:], MiniWorld("val", 3)[:]
    assert len({data_digest(a), data_digest(b), data_digest(a[::-1]), data_digest(MiniWorld("train", 3)), data_digest(MiniWorld("val", 3))}) == 5


def test_a_flipped_bit_in_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, {"w": torch.arange(40.)}, dict(iteration=3))
    file = tmp_path / "checkpoint-0000003.safetensors"
    assert file.stat().st_mode & 0o777 == (tmp_path / "checkpoint.json").stat().st_mode & 0o777
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 40):
        bad = bytearray(whole)
        bad[at] ^= 1 << rng.integers(8)
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged"): load_checkpoint(tmp_path)
    file.write_bytes(whole)
    assert load_checkpoint(tmp_path)[1]["iteration"] == 3


@pytest.mark.parametrize("change, message", [(lambda j: j.update(adapter=[10**9, 9]), None), (lambda j: j.pop("cache"), "does not fit this version"), (lambda j: j["profile"].update(sd="somebody/else"), "pass trust=True"), (lambda j: j["profile"].update(clip="/elsewhere"), "pass trust=True"),
    (lambda j: j["profile"].update(head="conv"), "not those of a conv head"), (lambda j: j["profile"].update(head_width=128), "width 128"), (lambda j: j.update(profile=None), "does not fit")])
def test_a_model_folder_that_was_edited(model, tmp_path, change, message):
    import shutil
    folder = shutil.copytree(model[1], tmp_path / "m")
    facts = json.loads((folder / "diclip.json").read_text())
    change(facts)
    (folder / "diclip.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message or "with an adapter"): DiCLIP.from_pretrained(folder)


def test_weights_that_say_nothing(model, tmp_path):
    for bad, message in ((float("nan"), "holds NaN"), (0, "all zero")):
        save_checkpoint(tmp_path, {k: v * bad if bad else torch.zeros_like(v) for k, v in model[0].student.state_dict().items()}, dict(iteration=0))
        (tmp_path / "diclip.json").write_text((model[1] / "diclip.json").read_text())
        with pytest.raises(ValueError, match=message): DiCLIP.from_pretrained(tmp_path)


def test_a_cache_of_another_recipe(model):
    m = model[0]
    keys = torch.eye(m.clip.embed_dim)[:8]
    meta = dict(clip=m.clip.fingerprint, sd=m.sd.fingerprint, grid=[20, 20], alpha=16., timestep=100, sd_layers=None)
    use = lambda **other: DiCLIP(m.clip, m.sd, m.profile, Cache(keys, torch.eye(8, 9), m.profile.classes, meta | other))
    assert use().cache is not None
    for other in (dict(sd="mini_sd:000"), dict(alpha=8.), dict(timestep=50), dict(sd_layers=[0, 1])):
        with pytest.raises(ValueError, match=f"made with {next(iter(other))}"): use(**other)


@pytest.mark.parametrize("keys, values, message", [(torch.zeros(0, 9), torch.zeros(0, 9), "without a pair"), (torch.eye(9)[:3], 1e30 * torch.eye(3, 9), "in \\[-1, 1\\]")])
def test_a_cache_that_says_nothing_or_too_much(keys, values, message):
    with pytest.raises(ValueError, match=message): Cache(keys, values, tuple("abcdefgh"))


@pytest.mark.parametrize("n", [2.5, "3", 0, -1])
def test_numbers_of_images_that_are_none(n, tmp_path):
    with pytest.raises(ValueError, match="ask for 1 to 400"): MiniWorld("val", n)
    export_voc(MiniWorld("train", 3), tmp_path, "train")
    with pytest.raises(ValueError, match="ask for 1 to 3"): VOC(tmp_path, "train", n, MiniWorld.classes)


def test_the_same_cache_is_the_same_bytes(tmp_path):
    for name in ("a", "b"): Cache(torch.eye(9)[:3], torch.eye(3, 9), tuple("abcdefgh"), dict(zip("zyxwv", range(5)))).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def coco(tmp_path, change):
    parts = dict(images=[dict(id=1, file_name="a.jpg", height=4, width=6), dict(id=2, file_name="b.jpg", height=4, width=6)], categories=[dict(id=5, name="cat")],
                 annotations=[dict(id=1, image_id=1, category_id=5, iscrowd=0, area=4, bbox=[0, 0, 2, 2], segmentation=[[0, 0, 2, 0, 2, 2]])])
    change(parts)
    (tmp_path / "instances.json").write_text(json.dumps(parts))
    return read_annotations(tmp_path / "instances.json")


@pytest.mark.parametrize("change, message", [(lambda p: p["images"][1].update(id=1), "image 1 is there twice"), (lambda p: p["images"][1].update(file_name="x/a.png"), "file name a is there twice"), (lambda p: p["annotations"].append(p["annotations"][0]), "annotation 1 is there twice"),
    (lambda p: p["annotations"][0].update(image_id=9), "of image 9"), (lambda p: p["images"][0].update(height=10**6, width=10**6), "pixels"), (lambda p: p["images"][0].pop("file_name"), "KeyError"), (lambda p: p["categories"][0].pop("name"), "KeyError")])
def test_cocos_file(tmp_path, change, message):
    assert coco(tmp_path, lambda p: None).imgs
    with pytest.raises(ValueError, match=message): coco(tmp_path, change)


def test_vocs_folder(tmp_path):
    root = export_voc(MiniWorld("val", 3)[:], tmp_path / "VOC2012", "val")
    for n in (-1, 0, 4):
        with pytest.raises(ValueError, match="val has 3 images"): VOC(root, "val", n, MiniWorld.classes)
    mask = root / "SegmentationClass/val_0000.png"
    Image.fromarray(np.full((160, 160), 300, np.uint16)).save(mask)
    with pytest.raises(ValueError, match="has class 300"): VOC(root, "val", None, MiniWorld.classes)[0]
    mask.write_bytes(b"")
    with pytest.raises(ValueError, match="val_0000.png"): VOC(root, "val", None, MiniWorld.classes)[0]
    for content, message in ((b"", "lists no images"), (b"\xff\xfe", "is no text file")):
        (root / "ImageSets/Segmentation/val.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message): VOC(root, "val", None, MiniWorld.classes)


def test_streams(model):
    "A generator of images is read a batch at a time."
    m, seen = model[0], []
    def images():
        for i in range(6):
            seen.append(i)
            yield np.full((40, 60, 3), 40 * i, np.uint8)
    stream = m.segment_each(images(), scales=(1.,), flip=False, batch=2)
    first = next(stream)
    assert seen == [0, 1] and torch.equal(first, m.segment(list(images())[:1], scales=(1.,), flip=False)[0])
    assert len(list(stream)) == 5
    for bad in (0, -1, "a", 1.5):
        with pytest.raises(ValueError, match="batch="): m.segment([np.zeros((8, 8, 3), np.uint8)], batch=bad)
    for bad in ([], (20.,), "1", 1., (None,), (-1.,)):
        with pytest.raises(ValueError, match="scale"): m.segment([np.zeros((8, 8, 3), np.uint8)], scales=bad)


def test_ctrl_c(model, photos):
    for i in range(3, 40): (photos / f"{i}.jpg").write_bytes((photos / "0.jpg").read_bytes())
    process = subprocess.Popen([str(BIN / "diclip_segment"), "photos", "--model", str(model[1]), "--out", "out"], cwd=photos.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"),
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # a shell in the background would have it ignored
    out, end = photos.parent / "out", time.time() + 100
    while not list(out.glob("*_overlay.png")):
        assert time.time() < end and process.poll() is None
        time.sleep(.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and said.strip().splitlines() == ["interrupted: what is finished is kept"]
    assert not [f for f in out.iterdir() if f.name.endswith(".tmp")]
