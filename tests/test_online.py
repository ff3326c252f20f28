"""The cache that learns: what it keeps, what it takes in, and that nothing depends on how often a training was killed."""
import pytest
import torch
from torch.nn import functional as F

from diclip.cache import Cache
from diclip.online import OnlineCache, OnlineSettings, confident_features, pure_features, right_parts
from diclip.retrieval import retrieve


def batch(seed, B=3, C=4, N=30, d=8):
    g = torch.Generator().manual_seed(seed)
    labels = torch.rand(B, C, generator=g) > .4
    return F.normalize(torch.randn(B, N, d, generator=g), dim=-1), torch.rand(B, C, N, generator=g) * labels[..., None], labels


def made(**how):
    g = torch.Generator().manual_seed(0)
    values = torch.cat([F.one_hot(torch.tensor([0, 1, 2, 3]), 5), torch.tensor([[0, 0, 0, 0, 1]])]).float()
    static = Cache(F.normalize(torch.randn(5, 8, generator=g), dim=-1), values, tuple("abcd"), dict(clip="x"))
    return static, OnlineCache(static, torch.randn(4, 8, generator=g), OnlineSettings(**dict(dict(budget=2, least=2), **how)))


def test_an_empty_place_votes_for_nothing():
    static, online = made()
    f = batch(1)[0]
    assert torch.allclose(online(f), retrieve(f, static.keys, static.values), atol=1e-6)


@pytest.mark.parametrize("how", [dict(), dict(per_class=False), dict(momentum=0.), dict(momentum=1.), dict(confidence=.6), dict(alike=.3)])
def test_what_stays_true(how):
    static, online = made(**how)
    for seed in range(8): online.update(*batch(seed))
    assert torch.equal(online.static_keys, static.keys) and torch.equal(online.static_values, static.values), "nothing is forgotten"
    assert torch.allclose(online.keys[online.used].norm(dim=-1), torch.ones(int(online.used.sum())), atol=1e-5)
    assert not online.keys[~online.used].any() and not online.values[~online.used].any()
    if online.settings.per_class: assert online.owner.bincount(minlength=5).tolist() == [2] * 5
    v = online.values[online.used]
    assert ((v > 0).sum(1) <= 1).all() and v.max() <= 1 and v.min() >= 0


def test_full_momentum_changes_no_place_that_is_taken():
    _, online = made(momentum=1.)
    for seed in range(8): online.update(*batch(seed))
    assert online.used.all()
    kept = online.keys.clone()
    online.update(*batch(99))
    assert torch.allclose(online.keys, kept, atol=1e-6)


def test_absent_classes_and_few_patches_are_not_taken():
    f, maps, labels = batch(3)
    found, c, image, sure = confident_features(f, maps + .9 * ~labels[..., None], labels, .8, 2)
    assert len(found) == len(c) == len(image) == len(sure) and (sure.sum(1) >= 2).all()
    assert all(k == 4 or labels[i, k] for k, i in zip(c.tolist(), image.tolist()))
    assert not len(confident_features(f, maps, labels, .8, 31)[0])


def test_purity_is_a_mean_over_features():
    masks = torch.tensor([[[1, 1], [0, 255]]])
    sure = torch.tensor([[True, True, True, True], [False, False, True, False], [True, False, True, False]])
    classes = torch.tensor([0, 4, 4])
    part = right_parts(classes, torch.tensor([0, 0, 0]), sure, masks, (2, 2), 4)
    assert part.tolist() == [pytest.approx(2 / 3), 1, .5]
    assert pure_features(classes, part, 4) == {"taken_object": 1, "right_object": pytest.approx(2 / 3), "taken_background": 2, "right_background": 1.5}
    unknown = right_parts(torch.tensor([0]), torch.tensor([0]), torch.tensor([[False, False, False, True]]), masks, (2, 2), 4)
    assert unknown.tolist() == [-1] and set(pure_features(torch.tensor([0]), unknown, 4).values()) == {0}
    nothing = torch.tensor([]).long()
    assert set(pure_features(nothing, right_parts(nothing, nothing, sure[:0], masks, (2, 2), 4), 4).values()) == {0}


def test_a_place_is_as_pure_as_what_it_was_made_of():
    _, online = made(momentum=.75)
    assert online.purity() == {"cache_object": 0, "cache_background": 0}
    online.used[[0, 2, 8]] = True                       # two objects and a background
    online.note(torch.tensor([0, 2, 8, -1, 0, 2]), torch.tensor([1., .5, .25, .9, 0., -1.]))
    assert online.pure[[0, 2, 8]].tolist() == [.75, .5, .25] and (online.pure >= 0).sum() == 3
    assert online.purity() == {"cache_object": pytest.approx((.75 + .5) / 2), "cache_background": .25}


def test_copies_take_no_place():
    _, online = made(budget=4)
    f, maps, labels = batch(2)
    first = online.update(f, maps, labels)[-1]
    kept, taken = online.keys.clone(), online.used.clone()
    again = online.update(f, maps, labels)[-1]
    assert torch.equal(online.used, taken) and torch.allclose(online.keys, kept, atol=1e-5) and torch.equal(first, again)
    _, every = made(budget=4, alike=2.)
    every.update(f, maps, labels), every.update(f, maps, labels)
    assert every.used.sum() > taken.sum()


def test_padding_is_not_taken_in():
    f, maps, labels = batch(3)
    inside = torch.rand(f.shape[:2]) > .5
    *_, image, sure = confident_features(f, maps, labels, .6, 1, inside)
    assert len(sure) and not (sure & ~inside[image]).any()
    everything, nothing = made()[1], made()[1]
    everything.update(f, maps, labels), nothing.update(f, maps, labels, torch.zeros_like(inside))
    assert everything.used.any() and not nothing.used.any()


def test_a_learned_cache_is_a_cache(tmp_path):
    static, online = made()
    for seed in range(4): online.update(*batch(seed))
    online.as_cache().save(tmp_path / "c.safetensors")
    back, f = Cache.load(tmp_path / "c.safetensors"), batch(5)[0]
    assert torch.allclose(retrieve(f, back.keys, back.values), online(f), atol=1e-5) and back.classes == static.classes
    assert back.meta["online"]["budget"] == 2 and back.meta["clip"] == "x" and back.background.tolist() == sorted(back.background.tolist())


def test_a_state_of_other_settings_is_refused():
    _, online = made()
    _, other = made(confidence=.9)
    with pytest.raises(ValueError, match="confidence"): other.load_state_dict(online.state_dict())
    same = made()[1]
    online.update(*batch(1))
    same.load_state_dict(online.state_dict())
    assert torch.equal(same.keys, online.keys)


@pytest.mark.parametrize("bad", [dict(confidence=.5), dict(confidence=1.2), dict(momentum=-.1), dict(alike=0.), dict(budget=0), dict(least=0), dict(teacher="head")])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError): OnlineSettings(**bad)
