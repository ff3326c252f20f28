"The study: what is filed is what would be computed, a change costs what it changes, and nothing else is lost or taken for something else."
import json, shutil, signal, subprocess, sys, time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.app.experiment import Seeded
from diclip.app.stages import READS, SOURCES, Plan, Study as Bare
from diclip.app.tables import TABLES, measure, table_rows
from diclip.cache import build_cache
from diclip.config import Profile, get_profile
from diclip.data import batch_images, export_voc, MiniWorld, palette_image
from diclip.datasets.coco import open_dataset
from diclip.engine.store import Store, facts_key
from diclip.study import Study
from diclip.supervision import class_maps
from helper_voc import write_coco, write_voc

torch.set_num_threads(1)
FEW = ("boat", "plane", "bird")
QUICK = dict(cached_classes=FEW, sd_draws=1, images_per_class=2, centroids=1, iterations=2, batch=2, head_width=16, prompts=2, par_rounds=1)


@pytest.fixture(scope="module")
def study(tmp_path_factory): return Study("mini", tmp_path_factory.mktemp("stages"), None, n_train=3, n_choose=3, n_val=3, **QUICK)


def by_the_method(s):
    "Static CAMs of the scored images by the path of training and commands, nothing filed."
    p, sd = s.profile, Seeded(s.sd, s.plan.seed)
    from diclip.imagepool import profile_pool
    cache = build_cache(s.clip, sd, profile_pool(s.sd, p, s.store.folder / "pool"), p, seed=s.plan.seed, progress=False)
    x = batch_images(s.images("val")[:], p.crop)
    with torch.no_grad(): return class_maps(s.clip, sd, s.text, x, s.labels("val"), p, cache)


CHANGES = [{}, dict(alpha=2.), dict(timestep=300), dict(rounds=3), dict(rounds=0), dict(groups=4), dict(norm="minmax"), dict(beta=3.), dict(sharpness=2.),
           dict(clustered=False), dict(text_weighted=False), dict(readout="dual"), dict(layers=3), dict(fusion="sd"), dict(sd_layers=(2, 3)), dict(seed=1, rounds=0),
           dict(background_centroids=0), dict(mask_threshold=.3), dict(cached_classes=("boat", "car")), dict(redundancy=True), dict(relation="threshold")]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_is_filed_is_what_the_method_gives(study, change):
    "All of them share one folder, so whatever a key leaves out would come back from another row."
    s = study.at(**change)
    found, want = s.maps("static", "val"), by_the_method(s)["static"]
    assert (found - want).abs().mean() < 4e-3 and (found - want).abs().max() < .25, (found - want).abs().max()


def test_other_templates_are_other_words(study):
    "The model is shared; its prompts are the row's."
    other = study.at(templates=("a drawing of a {} at night.",))
    assert not torch.allclose(other.text, study.text) and torch.equal(other.text, study.clip.text(study.profile.prompt_names, other.profile.templates))
    assert other.clip.templates == other.profile.templates != study.clip.templates and other.map_facts("vce") != study.map_facts("vce")


@pytest.mark.parametrize("teacher", ["masks", "vce", "static"])
def test_a_head_is_filed_under_what_its_tokens_depend_on(study, teacher):
    for change in (dict(crop=128), dict(precision="bf16"), dict(seed=3), dict(head_width=32)): assert study.at(**change).student_facts(teacher) != study.student_facts(teacher)
    assert study.at(timestep=7).student_facts("masks") == study.student_facts("masks"), "masks teach without the diffusion model"


def test_images_are_known_by_their_labels_and_masks(study):
    from dataclasses import replace
    from diclip.app.stages import Images
    scenes = MiniWorld("train", 3)

    class Other(list):
        pass

    facts = lambda some: Images(Other(some)).facts["digest"]
    first = scenes[0]
    flipped = replace(first, mask=np.where(first.mask == 0, 255, first.mask).astype(first.mask.dtype))
    relabeled = replace(scenes[1], labels=tuple(sorted({*scenes[1].labels} ^ {0, 1})) or (2,))
    known = facts(scenes[:])
    assert known == facts(scenes[:]) and facts([flipped, scenes[1], scenes[2]]) != known and facts([first, relabeled, scenes[2]]) != known


ORDER = ["attention", "refined", "features", "cache", "score"]


@pytest.mark.parametrize("change, computed", [
    (dict(beta=.7), "score"), (dict(sharpness=7.), "score"), (dict(centroids=2), "cache score"), (dict(alpha=3.), "features cache score"), (dict(tau_n=.1), "refined features cache score"),
    (dict(timestep=77), "attention refined features cache score"), (dict(seed=5), "attention refined features cache score"), (dict(gamma=.8), ""), (dict(iterations=7), ""), (dict(scales=(1.,)), "")], ids=str)
def test_a_change_costs_what_it_changes(study, change, computed):
    study.score("static")
    before = dict(study.store.made)
    for _ in range(2): study.at(**change).score("static")     # the second time for nothing
    new = {k: v - before.get(k, 0) for k, v in study.store.made.items() if v > before.get(k, 0)}
    assert new == {k: 2 if k in ORDER[:3] else 1 for k in computed.split()}, "train and val make two arrays"


def test_every_setting_is_read_by_a_stage_or_by_none():
    named = [n for names in READS.values() for n in names]
    assert len(named) == len(set(named)), "a setting has two stages"
    models = "clip clip_weights sd sd_alternatives sd_unet sd_versions"       # in their fingerprints
    elsewhere = "name scales view_mean cam_scales crf_rounds crf_position crf_bilateral affinity_score_threshold"
    assert set(named) | set((models + " " + elsewhere).split()) == {f.name for f in fields(Profile)}
    assert not set(named) & {f.name for f in fields(Plan)}, "a name of the plan and of the profile"


@pytest.mark.parametrize("source", [s for s in SOURCES if s not in ("diffusion", "untrained")])
def test_controls_go_the_same_way(study, source):
    s = study.at(source=source)
    t, matrix = s.score("vce")
    assert matrix.images == 3 and 0 < t < 1 and 0 <= matrix.miou() <= 1
    if source != "raw": assert not np.array_equal(s.features("val"), study.features("val"))
    if source in ("clip", "hand"): assert s.at(source=source, seed=3, rounds=0).source_facts() == s.at(rounds=0).source_facts(), "no chance in it, no seed in its name"


def test_a_head_goes_on_where_it_was_stopped(study, monkeypatch):
    whole = study.at(iterations=4).student("static").state_dict()
    from diclip import study as module
    s, real = Study("mini", study.store.folder.parent / "again", None, n_train=3, n_choose=3, n_val=3, **QUICK | dict(iterations=4)), module.train
    def stopped(learner, *rest, **how): return real(learner, *rest, **how | dict(save_every=2, evaluate=lambda l: 1 / 0, eval_every=3))
    monkeypatch.setattr(module, "train", stopped)
    with pytest.raises(ZeroDivisionError): s.student("static")
    monkeypatch.undo()
    for k, w in s.student("static").state_dict().items(): torch.testing.assert_close(w, whole[k])
    assert [l["iteration"] for l in s.log("static")][-1] == 4
    assert s.segmentation("static")[1].miou() == study.at(iterations=4).segmentation("static")[1].miou()


def test_teachers_and_rows(study):
    for teacher in ("vce", "dynamic", "masks"):
        row = study.row(teacher, "head", draws=20)
        assert row["low"] <= row["miou"] <= row["high"] and len(row["seeds"]) == 1 and row["memory"] > .1
    rows = study.vary("beta", [.5, 2.], seeds=(0, 1), draws=20)
    assert rows[.5]["difference"] == [0, 0, 0] and len(rows[2.]["seeds"]) == 2
    plain, walk = (study.at(affinity=a).row("vce", "labels", draws=20) for a in (False, True))
    assert plain["miou"] != walk["miou"]
    for bad, message in ((lambda: study.student("nobody"), "choose one of vce"), (lambda: study.maps("none", "val"), "choose one of center"), (lambda: study.row("vce", "heads"), "choose one of cam"),
                         (lambda: study.at(alpha=-1), "alpha=-1"), (lambda: study.at(alfa=1), "no setting alfa"), (lambda: study.at(n_val=-1), "negative"), (lambda: study.at(source="oracle").cache(), "another source")):
        with pytest.raises(ValueError, match=message): bad()


@pytest.mark.parametrize("name", ["mini", "voc", "coco"])
def test_every_table_has_rows_for_every_profile(name, tmp_path):
    for table in TABLES:
        rows = table_rows(table, Study(name, tmp_path, None))
        assert len(rows) >= 2 and all(kind in ("vce", "static", "dynamic") for kind, _ in rows.values())
    voc = Study("voc", tmp_path, None)
    paper = {"VIa": ("9 groups", "groups", 9), "VIb": ("3 layers", "layers", 3), "VIc": ("threshold 5e-4", "tau_n", .2), "VId": ("attention weight 1.0", "alpha", 1.), "VIe": ("10 centroids", "centroids", 10),
             "VIf": ("92 prompts (312 pairs)", "prompts", 92), "VIg": ("cache weight 0.5", "dynamic_beta", .5), "VIh": ("loss weight 0.1", "cache_weight", .1), "VII": ("3 iterations", "rounds", 3),
             "XIV": ("50 images a class", "images_per_class", 50)}
    for table, (row, setting, value) in paper.items():
        p = table_rows(table, voc)[row][1].profile
        assert getattr(p, setting) == pytest.approx(value) and p == get_profile("voc", **{setting: getattr(p, setting)}), "the paper's row is the profile"


def test_a_table_is_measured_and_read_again(study):
    found = measure("XIb", study, (0, 1), draws=20)
    assert set(found) == {"Thresholding", "ACR"} and set(found["ACR"]) == {"Precision", "Recall", "mIoU"} and found["Thresholding"]["mIoU"]["difference"] == [0, 0, 0]
    before = dict(study.store.made)
    again = measure("XIb", study, (0, 1), draws=20)
    assert again["ACR"]["mIoU"]["value"] == found["ACR"]["mIoU"]["value"] and dict(study.store.made) == before
    assert measure("VIh", study, (0,), (), draws=20)["loss weight 0.1"] == {}, "no heads asked for, none trained"


def test_the_ratio_is_that_of_two_heads(study):
    found = measure("IX", study, (), (0,), draws=20)
    for r in found.values():
        ratio, full = r["Ratio to fully supervised"], r["fully supervised"]["miou"]
        assert abs(ratio["value"] - 100 * r["VOC val mIoU"]["miou"] / full) < 1 / full and ratio["range"][0] <= ratio["value"] <= ratio["range"][1]


def test_another_folder_of_pictures_is_another_study(tmp_path):
    for k in (0, 4):
        export_voc(MiniWorld("train", 8)[k:k + 4], tmp_path / f"d{k}", "train"); export_voc(MiniWorld("val", 8)[k:k + 4], tmp_path / f"d{k}", "val")
    a, b = (Study("mini", tmp_path / "s", None, data=str(tmp_path / f"d{k}"), n_train=0, n_choose=4, n_val=0, rounds=0, sd_draws=1) for k in (0, 4))
    assert a.score("vce")[1].images == 4 and a.score("vce")[1].miou() != b.score("vce")[1].miou()
    assert a.images("val").facts != b.images("val").facts


# ---- real images for the cache -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "VOC's format: 30 scenes in train, which have no boat alone, and 60 in more, the same 30 among them."
    root, scenes = tmp_path_factory.mktemp("scenes"), MiniWorld("train", 60)[:]
    for split, some in (("train", scenes[:30]), ("more", scenes), ("val", MiniWorld("val", 3)[:])): export_voc(some, root, split)
    return root


def collecting(folder, store, **change): return Study("mini", store, None, data=str(folder), n_train=20, n_choose=3, n_val=3, **QUICK | dict(pool="real") | change)


def files(pool): return {f.relative_to(pool).as_posix(): f.read_bytes() for f in sorted(pool.glob("*/*"))}


def test_real_images_have_one_label_and_come_from_the_lists_in_order(folder, tmp_path):
    s = collecting(folder, tmp_path, top_up="more")
    taken, lists = json.loads((s.pool() / "pool.json").read_text())["taken"], {n: (folder / f"ImageSets/Segmentation/{n}.txt").read_text().split() for n in ("train", "more")}
    samples = {i: v for i, v in zip(lists["more"], open_dataset(s.profile, "more", str(folder)))}
    for name, ids in taken.items():
        alone = [i for i in lists["more"] if samples[i].labels == (s.profile.classes.index(name),)]
        assert ids == alone[:2], "train is the beginning of more here, and no image comes twice"
        for k, i in enumerate(ids): assert (np.asarray(Image.open(s.pool() / f"{name}/{k:04d}.png")) == samples[i].image).all()
    assert list(taken) == list(FEW) and not set(taken["boat"]) & set(lists["train"]) and set(taken["plane"]) <= set(lists["train"])
    s.at(alpha=3., iterations=9).pool()
    assert s.store.made["real"] == 1, "collected once"
    assert s.at(images_per_class=1).pool() != s.pool()


def test_the_cache_of_real_images_is_made_of_them_and_nothing_else(folder, tmp_path):
    s = collecting(folder, tmp_path, top_up="more")
    given = {n: [np.asarray(Image.open(f)) for f in sorted((s.pool() / n).iterdir())] for n in FEW}
    with torch.no_grad(): want = build_cache(s.clip, Seeded(s.sd, 0), given, s.profile, progress=False)
    torch.testing.assert_close(s.cache().keys, want.keys)
    assert s.cache_facts() != s.at(pool="").cache_facts() and not torch.equal(s.cache().keys, s.at(pool="").cache().keys)
    row = table_rows("XIII", s.at(pool=""))["Real data"][1]
    assert row.pool() == s.pool() and row.row("static", draws=20)["miou"] == s.row("static", draws=20)["miou"]
    assert row.encoder_facts() == s.at(pool="").encoder_facts(), "the attention stays"


def test_masks_are_read_for_their_classes_alone(folder, tmp_path):
    before = files(collecting(folder, tmp_path / "a", top_up="more").pool())
    other = shutil.copytree(folder, tmp_path / "other")
    for f in (other / "SegmentationClass").iterdir():
        mask = np.asarray(Image.open(f))
        moved = np.random.default_rng(0).permutation(mask.flatten()).reshape(mask.shape)
        palette_image(moved).save(f)
    assert files(collecting(other, tmp_path / "b", top_up="more").pool()) == before


def test_too_few_real_images_are_refused_before_anything_is_computed(folder, tmp_path):
    s = collecting(folder, tmp_path)
    for ask in (s.pool, lambda: measure("XIII", s.at(pool=""), draws=20)):
        with pytest.raises(ValueError, match="^0 images in train have 'boat' as their only label and 2 are wanted: choose a smaller images_per_class, or name another list with top_up$"): ask()
    with pytest.raises(ValueError, match="^[34] images in train, more have '(plane|boat|bird)'"): s.at(top_up="more", images_per_class=20).pool()
    with pytest.raises(ValueError, match="no list nowhere.txt"): s.at(top_up="nowhere").pool()
    assert not s.store.made and not list(tmp_path.rglob("*.png"))


def test_a_collection_that_was_interrupted_is_made_whole(folder, tmp_path, monkeypatch):
    from diclip.datasets import singles
    s, real, written = collecting(folder, tmp_path, top_up="more"), singles.write_atomic, []
    def stopped(path, save):
        if len(written) == 4: raise KeyboardInterrupt
        written.append(real(path, save))
    with monkeypatch.context() as m:
        m.setattr(singles, "write_atomic", stopped)
        with pytest.raises(KeyboardInterrupt): s.pool()
    assert len(list(tmp_path.rglob("*.png"))) == 4 and not list(tmp_path.rglob("pool.json")) and not s.store.made["real"]
    assert len(files(s.pool())) == 6 and s.store.made["real"] == 1 and not list(tmp_path.rglob("*.tmp"))


def test_coco_tops_up_voc(tmp_path):
    voc, coco = write_voc(tmp_path / "VOC2012", train=4), write_coco(tmp_path / "coco", train=5)
    file = coco / "annotations/instances_train2014.json"
    notes = json.loads(file.read_text())
    shown = {9: ["tv"], 16: ["tv", "person"], 23: ["couch"], 30: ["zebra"], 37: ["tv"]}     # image: what is in it
    number = {c["name"]: c["id"] for c in notes["categories"]}
    first = notes["annotations"][0]
    notes["annotations"] = [first | dict(id=10 * i + k, image_id=i, category_id=number[n]) for i, names in shown.items() for k, n in enumerate(names)]
    file.write_text(json.dumps(notes))
    s = Study("voc", tmp_path / "s", None, data=str(voc), n_train=0, pool="real", top_up="train", top_up_data=str(coco), images_per_class=1, cached_classes=("tvmonitor", "sofa"))
    taken = json.loads((s.pool() / "pool.json").read_text())["taken"]
    assert taken["sofa"] == ["COCO_train2014_000000000023"] and taken["tvmonitor"][0].startswith("2007_"), "VOC's own come first"
    assert json.loads((s.at(images_per_class=3, cached_classes=("tvmonitor",)).pool() / "pool.json").read_text())["taken"]["tvmonitor"][1:] == [f"COCO_train2014_{i:012d}" for i in (9, 37)]


# ---- the store ---------------------------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time, numpy as np
from diclip.engine.store import Store
def rows(start):
    for i in range(start, 40):
        time.sleep(.05)
        print(i, flush=True)
        yield np.full((1, 3), i)
print(Store(sys.argv[1]).array("slow", dict(a=1), (40, 3), rows)[:, 0].sum())
"""


def test_a_killed_stage_goes_on(tmp_path):
    done = []
    for _ in range(20):
        run = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            done.append(float(line))
            if len(done) % 11 == 0: run.send_signal(signal.SIGKILL); break
        if run.wait() == 0: break
    assert done[-1] == sum(range(40)) and len(done) - 1 <= 40 + 4, "each kill costs the row that was under way"
    assert not list(tmp_path.rglob("*.part")) and json.loads(next(tmp_path.rglob(facts_key(dict(a=1)) + ".json")).read_text()) == dict(a=1)


def test_two_that_want_the_same_array_make_it_once(tmp_path):
    runs = [subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [run.communicate()[0].split() for run in runs]
    assert sorted(map(len, lines)) == [1, 41] and lines[0][-1] == lines[1][-1]


def test_arrays_stay_on_disk_and_what_is_written_to_them_does_not(tmp_path):
    store = Store(tmp_path)
    a = store.array("x", {}, (4, 2), lambda start: [np.ones((4, 2))])
    a[0] = 7
    assert store.array("x", {}, (4, 2), None)[0, 0] == 1 and isinstance(a, np.memmap)
    with pytest.raises(ValueError, match="3 rows were computed, not 4"): store.array("y", {}, (4, 2), lambda start: [np.ones((3, 2))])
