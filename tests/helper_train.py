"A training small enough for a test, here or in a process of its own."
import multiprocessing
import os
import time
from pathlib import Path

import torch

import diclip
from diclip.datasets.batches import TrainingSet
from diclip.cache import build_cache
from diclip.clip import load_clip
from diclip.config import profile
from diclip.data import MiniWorld
from diclip.online import OnlineCache, OnlineLearner, OnlineSettings
from diclip.supervision import Frozen, precompute
from diclip.train import Learner, new_student, train


def learner_and_data(batch=4, iterations=24, images=16, dropout=True, sd=None, online=False, **settings):
    "Raw CLIP, no diffusion model: fast, and the cache of its own features is as good as any for a test; `online`: it learns."
    p = profile("mini", batch=batch, iterations=iterations, warmup=2, head_width=32, prompts=4, par_rounds=2, images_per_class=3, centroids=2, **settings)
    clip, world = load_clip(p), MiniWorld("train", images)
    cache = build_cache(clip, sd, Path(diclip.__file__).parent / "pool/mini", p, progress=False)
    frozen, student = Frozen(clip, sd, p, cache), new_student(clip, p, cache)
    if not dropout: student.head.fusion.dropout.p = 0.
    if online: student.adapter = OnlineCache(cache, frozen.text, OnlineSettings(confidence=.7, budget=4, least=1), p.sharpness)
    from accelerate import Accelerator
    kind = OnlineLearner if online else Learner
    return kind(student, frozen, p, Accelerator(cpu=True), precompute(frozen, world[:], progress=False)), TrainingSet(world, p)


def main(folder, resume=False, pause=0., **how):
    learner, data = learner_and_data(**how)
    step = learner.step
    def slow(batch): time.sleep(pause); return step(batch)
    learner.step = slow
    return train(learner, data, folder, resume=resume, save_every=4, log_every=1, progress=False)


def _process(environment, folder, how):
    os.environ.update(environment)
    torch.set_num_threads(1)
    main(folder, **how)


def start(folder, environment={}, **how):
    "A process that trains; torchrun's variables make it one of several. All are children of a server that has imported what is slow, and nothing else."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip", "accelerate", "sklearn.cluster", "torch.utils.tensorboard", "diclip.train", "diclip.cache", "diclip.clip"])
    process = context.Process(target=_process, args=(environment, folder, how))
    process.start()
    return process
