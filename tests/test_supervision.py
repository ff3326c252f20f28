"Labels that supervise the adapter, and the score of labels as the logs have it."
import numpy as np, pytest, torch
from diclip.cam import resize_maps
from diclip.labels import PAR, pseudo_labels, refine_labels


class TinyCLIP:
    "Attention of three layers of two heads over a class token and 4 x 4 patches."
    def dense(self, images, keep=()):
        from types import SimpleNamespace
        g = torch.Generator().manual_seed(int(images.sum() * 100) % 9973)
        return SimpleNamespace(attention=[torch.rand(len(images), 2, 17, 17, generator=g).softmax(-1) for _ in range(3)])


def scene(seed, side=32):
    "A dark square on a bright ground, and its map on the 4 x 4 grid."
    from diclip.data import Sample
    rng = np.random.default_rng(seed)
    image, mask = rng.integers(180, 220, (side, side, 3)).astype(np.uint8), np.zeros((side, side), np.uint8)
    at = slice(side // 4, 3 * side // 4 + 3)
    image[at, at], mask[at, at] = 40, 2
    maps = torch.zeros(3, 4, 4)
    maps[1, 1:3, 1:3] = torch.tensor([[1., .8], [.8, .9]])
    return Sample(str(seed), image, (1,), mask), maps.flatten(1)


def toy(**over):
    from diclip.config import profile
    return profile("mini", classes=("a", "b", "c"), prompt_names=("a", "b", "c"), crop=32, patch=8, par_dilations=(1, 2), **over)


def test_labels_of_patches_are_the_most_frequent_of_their_pixels():
    from diclip.supervision import on_grid
    target = torch.from_numpy(np.random.default_rng(0).choice([0, 1, 2, 255], (3, 12, 8)))
    found = on_grid(target, (3, 2)).view(3, 3, 2)
    for b, y, x in np.ndindex(3, 3, 2):
        values, counts = target[b, 4 * y:4 * y + 4, 4 * x:4 * x + 4].unique(return_counts=True)
        assert found[b, y, x] == values[counts == counts.max()].min()
    assert torch.equal(on_grid(target, (12, 8)).view_as(target), target)


def test_the_labels_of_the_adapter_are_refined_where_the_profile_says_so():
    from diclip.config import profile
    from diclip.data import batch_images
    from diclip.supervision import make_par, on_grid, patch_labels, pixel_labels
    assert not profile("mini").refine_patches and profile("voc").refine_patches and profile("coco").refine_patches
    (s, m), p, labels = scene(0), toy(), torch.tensor([[False, True, False]])
    x, valid = batch_images([s], 32), torch.ones(1, 32, 32, dtype=torch.bool)
    valid[..., :13] = False
    q, par = toy(refine_patches=True), make_par(p)
    refined = patch_labels(m[None], (4, 4), q, None, x, labels, par)
    assert torch.equal(refined, on_grid(refine_labels(x, resize_maps(m[None], (4, 4), (32, 32)), par), (4, 4)))
    assert torch.equal(refined, on_grid(pixel_labels(x, m[None], labels, (4, 4), p, par), (4, 4)))
    assert torch.equal(patch_labels(m[None], (4, 4), p, None, x, labels, par), pseudo_labels(m[None])), "without the switch nothing is refined"
    padded = patch_labels(m[None], (4, 4), q, valid, x, labels, par).view(4, 4)
    assert (padded[:, :2] == 255).all() and torch.equal(padded[:, 2:], refined.view(4, 4)[:, 2:])
    with pytest.raises(ValueError, match="set refine_patches=False"): patch_labels(m[None], (4, 4), q)


def test_the_score_of_labels_by_affinity_and_par_step_by_step():
    from diclip.affinity import affinity_refine
    from diclip.data import batch_images
    from diclip.metrics import ConfusionMatrix
    from diclip.supervision import label_score, patch_attention
    clip, p = TinyCLIP(), toy(affinity_layers=2, affinity_score_threshold=.6, thresholds=(.2, .7))
    samples, maps = zip(*(scene(i, side) for i, side in enumerate((32, 32, 44))))        # images of any size
    par, rows = PAR((1, 2), p.par_rounds), {}
    for affinity in (True, False):
        cm = ConfusionMatrix(4)
        for s, m in zip(samples, maps):
            layers = clip.dense(batch_images([s], 32)).attention[1:]
            A = sum(a.mean(1)[:, 1:, 1:] for a in layers) / 2
            torch.testing.assert_close(patch_attention(clip, batch_images([s], 32), 2), A)
            walked = affinity_refine(m[None], A, (4, 4), .6) if affinity else m[None]
            image = torch.from_numpy(s.image).permute(2, 0, 1)[None] / 255
            cm.update(refine_labels(image, resize_maps(walked, (4, 4), s.mask.shape), par), s.mask[None].astype(int))
        rows[affinity] = label_score(clip, torch.stack(maps), samples, p, affinity)
        assert torch.equal(rows[affinity].matrix, cm.matrix) and rows[affinity].images == 3
    assert rows[False].miou() > .7 and not torch.equal(rows[True].matrix, rows[False].matrix)
