"Tiny folders in the true formats of VOC and COCO, and both models' topologies at reduced width and random weights: `voc` and `coco` in seconds."
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diclip.cache import Cache
from diclip.clip import load_clip, mini_clip
from diclip.config import COCO_CLASSES, VOC_CLASSES, profile
from diclip.data import palette_image
from diclip.keys import cache_values
from helpers_sd import random_sd21_topology_reduced_width

SIZES = (188, 250), (250, 167), (141, 250)     # half of VOC's
CATEGORIES = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]     # the gaps in COCO's numbers
SMALL = dict(clip_weights="", sd_alternatives=(), crop=128, prompt="a photo of a {category}", size=64, steps=2, images_per_class=2, centroids=2,
             par_rounds=1, head_width=32, prompts=4, iterations=3, batch=2, warmup=1, scales=(.7, 1.), cam_scales=(1., .5), crf_rounds=1)


def clip_folder(folder, seed=0):
    "ViT-B/16 with QuickGELU: twelve layers of twelve heads, patches of 16 on a grid of 14 x 14, and open_clip's own vocabulary; an eighth of its width."
    import open_clip
    from safetensors.torch import save_file
    config = deepcopy(open_clip.get_model_config("ViT-B-16-quickgelu"))
    config["embed_dim"] = 64
    config["vision_cfg"] |= dict(width=96, head_width=8)
    config["text_cfg"] |= dict(width=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = mini_clip(dict(model_cfg=config)).state_dict()
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config)))
    return folder


def photo(i, classes):
    "A blurred background with one box on it, or two: (H, W, 3) uint8 and [(class, left, top, right, bottom)]."
    rng, (h, w), boxes = np.random.default_rng(i), SIZES[i % 3], []
    image = np.array(Image.fromarray(rng.integers(60, 200, (5, 6, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC))
    for k in range(1 + i % 2):
        c, left, top = (classes - 1 - 3 * i - 7 * k) % classes, w // 8 + k * w // 2, int(rng.integers(h // 8, h // 3))
        boxes.append((c, left, top, left + w // 3, top + h // 2))
        image[top:top + h // 2, left:left + w // 3] = np.random.default_rng(1000 + c).integers(0, 256, 3) // 8 * 8 + rng.integers(0, 8, (h // 2, w // 3, 1))
    return image, boxes


def write_voc(root, **counts):
    "VOCdevkit/VOC2012 with so many images a split: masks with borders of 255, none for test."
    for f in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"): (root / f).mkdir(parents=True)
    i = 0
    for split, n in counts.items():
        ids = [f"{2007 + (split == 'test')}_{j:06d}" for j in range(i, i + n)]
        for name in ids:
            image, boxes = photo(i, len(VOC_CLASSES))
            mask = np.zeros(image.shape[:2], np.uint8)
            for c, left, top, right, bottom in boxes:
                mask[top - 2:bottom + 2, left - 2:right + 2] = 255
                mask[top:bottom, left:right] = c + 1
            Image.fromarray(image).save(root / f"JPEGImages/{name}.jpg", quality=92)
            if split != "test": palette_image(mask).save(root / f"SegmentationClass/{name}.png")
            i += 1
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    return root


def write_coco(root, **counts):
    "COCO 2014 with so many images a split: polygons, and run lengths of a crowd in every third image."
    (root / "annotations").mkdir(parents=True)
    cats = [dict(id=k, name=n, supercategory="x") for k, n in zip(CATEGORIES, COCO_CLASSES)]
    i = 0
    for split, n in counts.items():
        (root / f"{split}2014").mkdir()
        images, found = [], []
        for i in range(i, i + n):
            image, boxes = photo(i, len(COCO_CLASSES))
            h, w = image.shape[:2]
            images.append(dict(id=7 * i + 9, file_name=f"COCO_{split}2014_{7 * i + 9:012d}.jpg", height=h, width=w))
            Image.fromarray(image).save(root / f"{split}2014" / images[-1]["file_name"], quality=92)
            regions = [(CATEGORIES[c], [[l, t, r, t, r, b, l, b]]) for c, l, t, r, b in boxes]
            if i % 3 == 0: regions.append((1, dict(size=[h, w], counts=[h * (w - 10), h * 10])))
            found += [dict(id=100 * i + k, image_id=7 * i + 9, category_id=c, iscrowd=int(isinstance(s, dict)), area=1, bbox=[], segmentation=s) for k, (c, s) in enumerate(regions)]
        i += 1
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(dict(info={}, licenses=[], images=images, annotations=found, categories=cats)))
    return root


def random_cache(profile, file):
    "A cache of random keys, since eighty classes take half a minute to draw."
    clip, index = load_clip(profile), torch.arange(len(profile.classes)).repeat_interleave(profile.centroids)
    keys = torch.randn(len(index) + len(profile.classes), clip.embed_dim, generator=torch.Generator().manual_seed(0))
    keys = torch.nn.functional.normalize(keys, dim=-1)
    values = cache_values(keys[:len(index)], clip.text(profile.prompt_names), index, len(profile.classes)).clamp_min(0)
    Cache(keys, values, profile.classes, dict(clip=clip.fingerprint, grid=list(profile.grid))).save(file)


class Real:
    "Models and data folders in one place, and what makes `voc` and `coco` cheap without another topology."

    def __init__(self, root):
        models = dict(clip=str(clip_folder(root / "clip")), sd=str(random_sd21_topology_reduced_width(root / "sd")))
        self.data = dict(voc=write_voc(root / "VOCdevkit/VOC2012", train=8, val=4, test=3), coco=write_coco(root / "coco", train=4, val=4))
        self.settings = dict(voc=SMALL | models, coco=SMALL | models | dict(images_per_class=1, centroids=1))
        self.profiles = {name: profile(name, **s) for name, s in self.settings.items()}
