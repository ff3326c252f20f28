"""`voc` and `coco` from end to end: every command and every experiment on tiny folders in the true formats, with both models' topologies
at reduced width and random weights."""
import json, re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from diclip import DiCLIP
from diclip.app import bench, commands, repro, submit
from diclip.cache import Cache
from diclip.config import PROFILES
from diclip.data import palette
from diclip.datasets.coco import open_dataset
from diclip.engine.checkpoint import load_checkpoint
from diclip.train import Learner, read_log, train
from helper_voc import Real, random_cache


@pytest.fixture(scope="module", autouse=True)
def real(tmp_path_factory):
    "The commands find both profiles at reduced width."
    made = Real(tmp_path_factory.mktemp("real"))
    with pytest.MonkeyPatch.context() as m:
        for name, p in made.profiles.items(): m.setitem(PROFILES, name, p)
        yield made


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    "Each test begins as a process of its own would: in its own folder, with gradients, with no precision chosen."
    from accelerate.state import AcceleratorState
    monkeypatch.chdir(tmp_path)
    torch.set_grad_enabled(True)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def ids_of(path):
    "Class ids of a label image in VOC's palette."
    with Image.open(path) as im:
        assert im.mode == "P" and (np.array(im.getpalette(), np.uint8).reshape(-1, 3) == palette()[:len(im.getpalette()) // 3]).all()
        return np.asarray(im)


def size_of(path):
    with Image.open(path) as im: return im.size[::-1]


def test_the_topologies_are_those_of_the_published_models():
    import open_clip
    from diclip.clip import mini_clip
    from diclip.engine.unet_attention import self_attention_layers
    from helpers_sd import SD21_UNET
    m, p = DiCLIP.from_pretrained("voc"), PROFILES["voc"]
    with torch.device("meta"): true = mini_clip(dict(model_cfg=open_clip.get_model_config("ViT-B-16-quickgelu")))
    assert [k for k, _ in m.clip.model.named_parameters()] == [k for k, _ in true.named_parameters()]
    assert (m.clip.depth, m.clip.heads, m.clip.patch, m.clip.grid_size, p.grid) == (12, 12, 16, (14, 14), (8, 8))
    assert [type(b.mlp.gelu) for b in m.clip.blocks] == [type(b.mlp.gelu) for b in true.visual.transformer.resblocks]
    for k in set(SD21_UNET) - {"block_out_channels", "cross_attention_dim"}:
        v = m.sd.pipe.unet.config[k]
        assert (tuple(v) if isinstance(v, list) else v) == (tuple(SD21_UNET[k]) if isinstance(SD21_UNET[k], list) else SD21_UNET[k]), k
    assert len(self_attention_layers(m.sd.pipe.unet)) == 9 and m.sd.factor == 8


def check_model(folder, name):
    "What a training leaves: its checkpoint, finite losses, and a folder with profile, cache, adapter and head that loads."
    m, p, log = DiCLIP.from_pretrained(folder / "model"), PROFILES[name], read_log(folder)
    C = len(p.classes)
    assert load_checkpoint(folder)[1]["iteration"] == log[-1]["iteration"] == 3 and all(0 < log[-1][k] < 10 for k in ("seg", "cache"))
    assert m.profile == p and m.cache.keys.shape == (C * (p.centroids + 1), 64) and m.cache.values.shape == (len(m.cache), C + 1)
    assert m.adapter.keys.shape == (len(m.cache) + p.prompts, 64)
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in m.student.state_dict().values())
    assert m.student.head(torch.randn(1, 12, 64, 96), p.grid).shape == (1, C + 1, 8, 8)


def check_scores(text, name, *facts):
    "The printed protocol, the mIoU in its interval and a line for every class."
    line = next(l for l in text.splitlines() if l.startswith(f"{name} val"))
    for fact in ("labels not given", "no CRF", "images 4", *facts): assert fact in line.split(", "), fact
    miou, low, high, accuracy = map(float, re.search(r"mIoU ([\d.]+) \[([\d.]+), ([\d.]+)\], pixel accuracy ([\d.]+)", text).groups())
    assert 0 <= low <= miou <= high <= 100 and 0 <= accuracy <= 100
    classes = re.findall(r"^  (\S.*?) +([\d.]+|nan)$", text, re.M)
    assert [c for c, _ in classes] == ["background", *PROFILES[name].classes] and {v for _, v in classes} > {"nan"}


@pytest.mark.parametrize("name, precision", [("voc", "bf16"), ("coco", "fp32"), ("coco", "bf16")])
def test_training_and_evaluation(real, name, precision, tmp_path, capsys):
    data, folder = str(real.data[name]), tmp_path / "train"
    random_cache(PROFILES[name], "cache.safetensors")
    commands.diclip_train(name, data=data, out=str(folder), cache="cache.safetensors", precision=precision)
    n = len(open_dataset(PROFILES[name], "train", data))
    assert f"{n} images, labels given, masks not used; 3 iterations of 2" in capsys.readouterr().out
    check_model(folder, name)
    commands.diclip_eval(str(folder / "model"), data=data, one_scale=True, precision=precision)
    check_scores(capsys.readouterr().out, name, "scales 1", "no flip", f"precision {precision}")


def test_every_command_as_voc(real, tmp_path, monkeypatch, capsys):
    data, p, said = real.data["voc"], PROFILES["voc"], lambda: capsys.readouterr().out
    commands.diclip_cache(out="cache", model="voc")
    assert "60 pairs of 20 classes: cache/cache.safetensors" in said()
    drawn = sorted(tmp_path.glob("cache/pool/*/*.png"))
    assert len(drawn) == 40 and {f.parent.name for f in drawn} == set(p.classes) and {size_of(f) for f in drawn} == {(64, 64)}
    cache = "cache/cache.safetensors"
    assert Cache.load(cache).meta["pool"]["words"]["tvmonitor"] == "tv monitor"

    learn = partial(commands.diclip_train, "voc", data=str(data), out="train", cache=cache)
    step, done = Learner.step, []
    def stopped(self, batch):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(step(self, batch))
        return done[-1]
    with monkeypatch.context() as mp:
        mp.setattr(Learner, "step", stopped)
        mp.setattr("diclip.model.train", partial(train, save_every=1))
        with pytest.raises(SystemExit, match="interrupted"): learn()
    assert load_checkpoint("train")[1]["iteration"] == 2
    with pytest.raises(SystemExit, match="pass --resume"): learn()
    learn(resume=True)
    assert "8 images, labels given, masks not used; 3 iterations of 2" in said()
    check_model(tmp_path / "train", "voc")

    commands.diclip_eval("train/model", data=str(data))
    check_scores(said(), "voc", "scales 0.7/1", "flip", "mean of logits", "precision fp32")
    tests = data / "ImageSets/Segmentation/test.txt"
    commands.diclip_segment([str(tests)], "train/model", out="segmented", archive="a.tar.gz", crf=True)
    assert said().startswith("3 of 3 images, labels not given, scales 0.7/1.0, flip, mean of logits, CRF")
    for name in tests.read_text().split():
        ids, size = ids_of(f"segmented/{name}.png"), size_of(data / f"JPEGImages/{name}.jpg")
        assert ids.shape == size_of(f"segmented/{name}_overlay.png") == size and ids.max() <= 20
    monkeypatch.setattr(submit, "TEST_IMAGES", 3)
    submit.diclip_submit("segmented", data=str(data), out="b.tgz")
    submit.diclip_submit(check="a.tar.gz", data=str(data))
    assert said().count("3 masks, palette PNG, class ids 0 to 20; ids as in the test list, sizes as the images'") == 2
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tgz").read_bytes()

    sample = next(s for s in open_dataset(p, "val", data) if len(s.labels) == 2)
    names = [p.classes[c] for c in sample.labels]
    for model, more in (("voc", dict(cache=cache)), ("train/model", {})):
        commands.diclip_cam([str(data / f"JPEGImages/{sample.id}.jpg")], ",".join(names), model, out=f"cams/{model}", **more)
        assert set(np.unique(ids_of(f"cams/{model}/{sample.id}.png"))) <= {0, *(c + 1 for c in sample.labels)}
        for what in (*names, "overlay"): assert size_of(f"cams/{model}/{sample.id}_{what}.png") == sample.image.shape[:2]

    bench.diclip_bench("voc", images=1, runs=1, record="speed.json")
    (run,) = json.loads((tmp_path / "speed.json").read_text())["runs"].values()
    assert run["parameters"]["profile"] == "voc" and f"pool, 20 x {p.images_per_class} images" in run["sums"] and "training, 3 x 2 images" in run["sums"]


def check_record(record, name, out, split):
    assert record["experiment"] == name and record["protocol"].startswith(f"voc {split}, labels ") and record["environment"]["versions"]["torch"]
    assert len(record["settings"]["classes"]) == 20 and record["settings"]["clip"].endswith("clip") and record["settings"]["crop"] == 128 and record["models"]["clip"].startswith("clip-")
    for row, r in record["results"].items(): assert 0 <= r["low"] <= r["high"] <= 100 and len(r["seeds"]) >= 1, row
    assert (out / f"{name}.html").stat().st_size > 10_000


def test_the_main_command_as_voc(real, tmp_path, monkeypatch, capsys):
    "diclip_repro measures the training-free half, then trains Table IV."
    small, kept = partial(repro.run_notebook, overrides=real.settings["voc"], draws=20), {}
    monkeypatch.setattr(repro, "run_notebook", lambda name, out, **k: kept.setdefault(name, small(name, out, **k)))
    repro.diclip_repro(profile="voc", data=str(real.data["voc"]), out="out", n_train=4, n_val=4, per_class=2, n_heads=4, iterations=2, controls=True)
    text = capsys.readouterr().out
    for name, record in kept.items():
        check_record(record, name, tmp_path / "out", "val")
        assert record["parameters"]["n_val"] == 4 and record["table"] in text
    assert list(kept) == ["components", "training"]
    assert {"+ negative cache", "hand-made + ACR", "untrained UNet", "no class keys"} < set(kept["components"]["results"])
    assert {"+ adapter", "masks (supervised)"} < set(kept["training"]["results"]) and set(kept["training"]["inference"]) == {"one scale", "scales + flip", "scales + flip + CRF"}


@pytest.mark.parametrize("name, how", [("choices", dict(n_train=2)), ("controls", dict(n_train=2, alphas=[1., 8.], widths=[1.], temperatures=[0, .1], timesteps=[50])),
                                       ("adapter", dict(n_teach=4, n_judge=4, n_choose=4, seeds=1, iterations=2, draws=20)),
                                       ("table", dict(table="IV", n_train=4, n_choose=4, n_val=4, seeds=1, iterations=2, draws=20)),
                                       ("confusion", dict(n_train=4, n_choose=4, n_val=4, iterations=2, draws=20)),
                                       ("cost", dict(n_train=4, n_choose=4, n_val=4, iterations=2, points=2, draws=20)), ("rivals", dict(n_train=2, n_choose=2, n_val=2, names=["NACLIP"], most=1, draws=20)), ("online", dict(n_train=4, n_choose=2, n_val=4, seeds=1, iterations=2, points=1, confidences=[.7], budgets=[2], momenta=[.5], shares=[0.], draws=20)), ("figures", dict(n_val=4, shown=2, rounds=1, alphas=[1.], n_train=4, iterations=2, real=False))])
def test_an_experiment_as_voc(real, name, how, tmp_path):
    record = repro.run_notebook(name, tmp_path, profile="voc", data=str(real.data["voc"]), overrides=real.settings["voc"], **how)
    check_record(record, name, tmp_path, "val" if name in ("table", "confusion", "cost", "rivals", "online", "figures") else "train")
    assert record["parameters"]["profile"] == "voc"


def test_all_rivals_at_the_true_topology(real):
    from diclip.data import batch_images, multi_hot
    from diclip.rivals import RIVALS, rival_output
    m = DiCLIP.from_pretrained("voc")
    samples = open_dataset(m.profile, "train", real.data["voc"], 1)[:]
    x, y = batch_images(samples, m.profile.crop), multi_hot(samples, 20)
    for name in RIVALS:
        f, scores = rival_output(m, x, name, y)
        assert f.shape[:2] == (1, m.profile.grid[0] * m.profile.grid[1]) and scores.shape == (1, 20, f.shape[1]) and scores.isfinite().all(), name
