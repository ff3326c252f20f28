"One training step on VOC and on COCO: ViT-B/16 at its true size, SD 2.1's topology at reduced width, 320 x 320, batch 4, random weights."
import resource

import numpy as np
import pytest
import torch
from PIL import Image

from diclip.datasets.batches import TrainingSet, batches
from diclip.cache import cache_from_pooled
from diclip.clip import DenseCLIP
from diclip.config import profile
from diclip.data import Sample
from diclip.sd import load_sd
from diclip.supervision import Frozen
from diclip.train import Learner, new_student
from helpers_sd import random_sd21_topology_reduced_width


class Photos:
    "Four noisy pictures of other sizes, two classes each."
    def __init__(self, classes): self.classes = classes
    def __len__(self): return 4
    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        small = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((500, 375 - 20 * i), Image.BICUBIC))
        mask = np.zeros(image.shape[:2], np.uint8); mask[100:200, 100:300] = 1 + i
        return Sample(f"photo{i}", image, (i, i + 5), mask)


@pytest.mark.parametrize("name", ["voc", "coco"])
def test_one_step_with_true_vit_b16_and_sd21_topology_at_reduced_width(name, tmp_path):
    import open_clip
    p = profile(name, sd=str(random_sd21_topology_reduced_width(tmp_path / "sd")), sd_alternatives=())
    torch.manual_seed(0)
    clip = DenseCLIP(open_clip.create_model(p.clip, pretrained=None), open_clip.get_tokenizer(p.clip), templates=p.templates)
    sd, g = load_sd(p), torch.Generator().manual_seed(0)
    C = len(p.classes)
    assert (p.grid, p.batch, C, clip.width, clip.depth) == ((20, 20), 4, {"voc": 20, "coco": 80}[name], 768, 12)
    pooled = torch.nn.functional.normalize(torch.randn(2, p.centroids * C, clip.embed_dim, generator=g), dim=-1)
    cache = cache_from_pooled(*pooled, [c for c in range(C) for _ in range(p.centroids)], clip.text(p.prompt_names), p.classes, p.centroids, 1)
    learner = Learner(new_student(clip, p, cache), Frozen(clip, sd, p, cache), p)
    assert len(learner.module.adapter.keys) == {"voc": 312, "coco": 480 + 92}[name]
    before = {k: v.clone() for k, v in learner.module.state_dict().items()}
    parts = learner.step(next(iter(batches(TrainingSet(Photos(p.classes), p), 0, 1))))
    assert set(parts) == {"seg", "cache"} and all(np.isfinite(v) and v > 0 for v in parts.values())
    changed = [k for k, v in learner.module.state_dict().items() if not torch.equal(v, before[k])]
    assert any(k.startswith("head") for k in changed) and any(k.startswith("adapter") for k in changed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8e6       # kB
