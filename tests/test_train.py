"Training goes on after a kill as if nothing had happened, and two processes learn what one learns with the doubled batch."
import json
import socket
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from diclip.datasets.batches import Order, TrainingSet, batches, collate, positions
from diclip.engine.checkpoint import load_checkpoint, save_checkpoint
from diclip.config import profile
from diclip.data import MiniWorld, export_voc, palette, VOC
from diclip.supervision import pack, unpack
from diclip.train import Learner, read_log, train
from diclip.world import SIZE
from helper_train import learner_and_data, main, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The log of the training that nobody interrupts."
    return main(tmp_path_factory.mktemp("whole"))


def killed_and_resumed(folder, **how):
    "The log of a training that was killed after seven iterations or more and went on in another process."
    child = start(folder, pause=.1, **how)
    while len(read_log(folder)) < 7: time.sleep(.05); assert child.is_alive()
    child.kill(); child.join()
    assert 4 <= load_checkpoint(folder)[1]["iteration"] < 24
    again = start(folder, resume=True, **how); again.join()
    assert again.exitcode == 0
    return read_log(folder)


def test_kill_and_resume_equals_uninterrupted(tmp_path, whole):
    resumed = killed_and_resumed(tmp_path)
    assert [l["iteration"] for l in resumed] == [l["iteration"] for l in whole] == list(range(1, 25))
    for a, b in zip(resumed, whole): assert a == pytest.approx(b, abs=1e-4)


def test_a_cache_that_learns_goes_on_after_a_kill(tmp_path):
    whole, resumed = main(tmp_path / "whole", online=True), killed_and_resumed(tmp_path / "killed", online=True)
    assert sum(l["taken_object"] for l in whole[:4]) and sum(l["taken_object"] for l in whole[8:]), "it learns before the kill and after"
    for a, b in zip(resumed, whole, strict=True): assert a == pytest.approx(b, abs=1e-4)


def test_a_cache_that_learns_refuses_several_processes(monkeypatch):
    from accelerate import Accelerator
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ValueError, match="with one process"): learner_and_data(online=True)


def test_tensorboard_has_the_losses_and_a_panel_with_each_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = main(tmp_path, iterations=8)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in board.Images("image, labels, head")] == [4, 8]
    assert [e.value for e in board.Scalars("seg")] == pytest.approx([l["seg"] for l in log])
    first = board.Images("image, labels, head")[0]
    assert (first.height, first.width) == (4 * SIZE, 3 * SIZE)


def test_a_panel_shows_image_labels_and_segmentation_and_changes_nothing():
    learner, data = learner_and_data(iterations=2)
    before = {k: v.clone() for k, v in learner.module.state_dict().items()}
    batch = collate([data[i] for i in range(4)])
    panel = learner.panel(batch, most=2)
    torch.testing.assert_close(panel[:, :SIZE, :SIZE], batch["image"][0])
    colors = set(map(tuple, (panel[:, :, SIZE:].flatten(1).T * 255).round().int().tolist()))
    assert colors <= set(map(tuple, palette(9).tolist())) and learner.student.training
    assert all(torch.equal(v, before[k]) for k, v in learner.module.state_dict().items())


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    how = dict(dropout=False, iterations=12)
    one = main(tmp_path / "one", batch=8, **how)
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    share = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    both = [start(tmp_path / "two", dict(share, RANK=str(r), LOCAL_RANK=str(r)), **how) for r in (0, 1)]
    for c in both: c.join()
    assert [c.exitcode for c in both] == [0, 0]
    two = load_checkpoint(tmp_path / "two")
    assert two[1]["settings"]["processes"] == 2
    for k, v in load_checkpoint(tmp_path / "one")[0].items():    # AdamW turns rounding into small steps where the gradient is zero, as for the bias of a key
        if k.startswith("student"): torch.testing.assert_close(two[0][k], v, atol=2e-3, rtol=1e-3)
    for a, b in zip(one, read_log(tmp_path / "two"), strict=True): assert a == pytest.approx(b, abs=2e-4)


def test_a_kill_between_the_two_files_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"w": torch.zeros(2)}, dict(iteration=1))
    def die(*_): raise KeyboardInterrupt
    monkeypatch.setattr("diclip.engine.checkpoint.write_json", die)
    with pytest.raises(KeyboardInterrupt): save_checkpoint(tmp_path, {"w": torch.ones(2)}, dict(iteration=2))
    tensors, state = load_checkpoint(tmp_path)
    assert state["iteration"] == 1 and not tensors["w"].any()


@pytest.mark.parametrize("keep", [0, 40, -1])
def test_damaged_checkpoints_are_named(tmp_path, keep):
    save_checkpoint(tmp_path, {"w": torch.zeros(64)}, dict(iteration=1))
    path = tmp_path / "checkpoint-0000001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="restore the folder"): load_checkpoint(tmp_path)


def test_labels_given_to_another_dataset_are_refused(tmp_path):
    learner, data = learner_and_data(iterations=2)
    train(learner, data, tmp_path, progress=False)
    more, other = learner_and_data(iterations=2, images=12)
    with pytest.raises(ValueError, match="another images"): train(more, other, tmp_path, resume=True, progress=False)


@given(n=st.integers(1, 40), seed=st.integers(0, 5), k=st.integers(0, 400))
@settings(max_examples=100, deadline=None)
def test_every_epoch_shows_every_image_once(n, seed, k):
    order, epoch = Order(n, seed), k // n
    assert sorted(order[epoch * n + i] for i in range(n)) == list(range(n))
    assert order[k] == Order(n, seed)[k]


@given(iteration=st.integers(0, 50), batch=st.integers(1, 6), processes=st.integers(1, 4))
def test_processes_share_the_positions_of_the_larger_batch(iteration, batch, processes):
    shared = [k for r in range(processes) for k in positions(iteration, batch, r, processes)]
    assert shared == list(positions(iteration, batch * processes))


@given(st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_unpack_undoes_pack(seed):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.random((3, 7)) < .4)
    maps = torch.from_numpy(rng.random((3, 7, 5))).float() * labels[..., None]
    packed, index = pack(maps, labels)
    direct = torch.where(maps.amax(1) > .3, maps.argmax(1) + 1, 0)
    small = torch.where(packed.amax(1) > .3, packed.argmax(1) + 1, 0)
    assert torch.equal(unpack(small, index), direct)


def test_a_damaged_file_in_a_run_over_1000_images(tmp_path):
    scene = MiniWorld("train", 1)[0]
    small = [type(scene)(f"{i:04d}", scene.image[:16, :16], (), scene.mask[:16, :16] * 0) for i in range(1000)]
    export_voc(small, tmp_path, "train")
    broken = tmp_path / "JPEGImages/0500.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    p, world = profile("mini", batch=50), VOC(tmp_path, "train", classes=profile("mini").classes)
    with pytest.raises(ValueError, match="0500.jpg"): [b["index"] for b in batches(TrainingSet(world, p), 0, 20)]
    skipped = [n for b in batches(TrainingSet(world, p, on_error="skip"), 0, 20) for n in b["skipped"]]
    assert len(skipped) == 1 and "0500.jpg" in skipped[0]
