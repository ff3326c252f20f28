"""Pictures of one's own: any list of labels, no masks, and the same training as on the usual data."""
import json, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.app.commands import diclip_cam, diclip_segment, diclip_train
from diclip.app.report import compare, doubtful, training_report, zero_shot
from diclip.data import MiniWorld
from diclip.datasets.own import OwnImages, read_labels
from diclip.model import DiCLIP
from diclip.world import CLASSES


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Twelve scenes as PNG, which keeps every pixel, and their labels."
    folder = tmp_path_factory.mktemp("own") / "photos"
    folder.mkdir()
    scenes = MiniWorld("train", 12)[:]
    for s in scenes: Image.fromarray(s.image).save(folder / f"{s.id}.png")
    rows = "".join(f"{s.id}.png,{';'.join(CLASSES[c] for c in s.labels)}\n" for s in scenes)
    (folder.parent / "labels.csv").write_text("file,labels\n" + rows)
    return folder


def test_the_training_is_the_usual_one(photos, tmp_path, monkeypatch, capsys):
    "Without masks, from files and a list: the losses of the mini world digit by digit; then the model's own folder goes on."
    monkeypatch.chdir(tmp_path)
    diclip_train(n=12, iterations=3, out="usual")
    diclip_train(data=str(photos), labels=str(photos.parent / "labels.csv"), classes=",".join(CLASSES), iterations=3, out="own")
    assert Path("usual/log.jsonl").read_text() == Path("own/log.jsonl").read_text()
    report = Path("own/report.html").read_text()
    assert "<h2>What to look at</h2>" in report and "http" not in report.replace("http-equiv", "") and "<math>" in report
    diclip_train(profile="own/model", data=str(photos), labels=str(photos.parent / "labels.csv"), iterations=2, out="more")
    a, b = (DiCLIP.from_pretrained(f"{f}/model") for f in ("own", "more"))
    assert a.profile.classes == b.profile.classes == CLASSES and not torch.equal(a.student.head.classify.bias, b.student.head.classify.bias)
    diclip_segment([str(photos)], model="more/model", out="seg", one_scale=True)
    assert "12 of 12 images, labels not given, one scale, no CRF" in capsys.readouterr().out
    before = {f: f.stat().st_mtime_ns for f in Path("seg").glob("*.png")}
    Path("seg/train_0003.png").unlink()
    diclip_segment([str(photos)], model="more/model", out="seg", one_scale=True)
    assert "(11 were there)" in capsys.readouterr().out and {f.name for f in before if f.stat().st_mtime_ns != before[f]} == {"train_0003.png", "train_0003_overlay.png"}
    diclip_segment([str(photos)], model="own/model", out="seg", one_scale=True)
    assert "were there" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="which is none of whale"): diclip_train(data=str(photos), labels=str(photos.parent / "labels.csv"), classes="whale", iterations=1, out="x")


def test_classes_of_a_list(photos, tmp_path):
    (tmp_path / "l.json").write_text(json.dumps({"train_0000": ["pear"], "train_0001.png": ["apple", "pear"]}))
    own = OwnImages(photos, tmp_path / "l.json")
    assert own.classes == ("apple", "pear") and own.labels == {"train_0000": (1,), "train_0001": (0, 1)} and own.unnamed == 10
    assert own[0].mask is None and own.image_labels() == [(1,), (0, 1)] and len(OwnImages(photos, tmp_path / "l.json", n=1)) == 1


def test_vocs_annotations_without_masks(tmp_path):
    for f in ("JPEGImages", "Annotations"): (tmp_path / f).mkdir()
    for n, c in (("a", "cat"), ("b", "dog")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"JPEGImages/{n}.jpg")
        (tmp_path / f"Annotations/{n}.xml").write_text(f"<annotation><filename>{n}.jpg</filename><object><name>{c}</name></object></annotation>")
    assert OwnImages(tmp_path).labels == {"a": (0,), "b": (1,)}
    (tmp_path / "Annotations/b.xml").write_text('<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation>&b;</annotation>')
    with pytest.raises(ValueError, match="b.xml is no annotation"): read_labels(tmp_path)


def test_what_the_report_computes():
    truth = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1]], dtype=torch.bool)
    scores = torch.tensor([[.9, .1], [.8, .2], [.1, .9], [.2, .8], [.05, .7]])
    assert zero_shot(scores, truth)[1] == 1 and zero_shot(scores, torch.zeros_like(truth)) == [None, None]
    assert doubtful(torch.cat([scores, torch.tensor([[.3, .1]])]), torch.cat([truth, torch.tensor([[False, False]])])) == [(4, 0)]
    square = torch.zeros(4, 4, dtype=torch.long)
    left, all_ = square.clone(), square + 1
    left[:, :2] = 1
    row = compare([left, square], [all_, square], torch.tensor([[True], [False]]))[0]
    assert row == dict(images=1, cam=.5, seg=1., agree=.5, found=1.)
