"Pseudo-labels and PAR: equality with loops, invariants, refusals."
import math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from diclip.labels import PAR, background_score, pseudo_labels, refine_labels

quick = settings(deadline=None, max_examples=25)


def scene(seed, B=2, C=3, H=7, W=8):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(B, 3, H, W, generator=g), torch.rand(B, C, H, W, generator=g)


def par_loop(image, maps, dilations, rounds):
    "The formulas of the notebook in float64, a pixel at a time."
    image, maps = image.double().numpy(), maps.double().numpy()
    H, W = image.shape[1:]
    offsets = [(i*d, j*d) for d in dilations for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    softmax = lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    d = np.array([math.hypot(*o) for o in offsets])
    place = softmax(-(d / (.3 * d.std(ddof=1)))**2)
    for _ in range(rounds):
        new = np.zeros_like(maps)
        for y in range(H):
            for x in range(W):
                ys, xs = np.array([(min(max(y + i, 0), H - 1), min(max(x + j, 0), W - 1)) for i, j in offsets]).T
                near = image[:, ys, xs]
                sigma = near.std(1, ddof=1, keepdims=True) + 1e-8
                kappa = -((np.abs(near - image[:, y, x, None]) / (.3 * sigma))**2).mean(0)
                new[:, y, x] = (maps[:, ys, xs] * (softmax(kappa) + .01*place)).sum(1)
        maps = new
    return torch.from_numpy(maps)


@pytest.mark.parametrize("dilations", [(1,), (1, 2, 4), (1, 2, 4, 8, 12, 24)])
def test_par_equals_the_loop(dilations):
    images, maps = scene(0)
    slow = torch.stack([par_loop(i, m, dilations, 2) for i, m in zip(images, maps)])
    torch.testing.assert_close(PAR(dilations, rounds=2)(images, maps).double(), slow, rtol=1e-4, atol=0)


def test_par_has_48_neighbors_that_sum_to_1_01():
    par = PAR()
    images, _ = scene(1)
    assert len(par.offsets) == len(set(par.offsets)) == 48 and par.rounds == 20 and par.gain == pytest.approx(1.01**20)
    torch.testing.assert_close(par.weights(images).sum(1), torch.full((2, 7, 8), 1.01))
    torch.testing.assert_close(par(images, torch.ones(2, 1, 7, 8)), torch.full((2, 1, 7, 8), 1.01**20))
    assert not par.state_dict() and not list(par.parameters())


@quick
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_chunks_change_nothing(seed, chunk):
    images, maps = scene(seed, B=4)
    torch.testing.assert_close(PAR((1, 2), 3, chunk=chunk)(images, maps), PAR((1, 2), 3)(images, maps))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10**6), st.permutations(range(3)))
def test_par_invariants(seed, order):
    images, maps = scene(seed)
    other, par = scene(seed + 1)[1], PAR((1, 3), rounds=3)
    out, close = par(images, maps), torch.testing.assert_close
    close(par(images, maps[:, order]), out[:, order])                       # classes do not mix
    close(par(images, 2*maps + other), 2*out + par(images, other), rtol=1e-4, atol=1e-5)
    close(par(images.flip(3), maps.flip(3)).flip(3), out, rtol=1e-4, atol=1e-5)
    close(par(images.transpose(2, 3), maps.transpose(2, 3)).transpose(2, 3), out, rtol=1e-4, atol=1e-5)
    close(PAR((1, 3), rounds=2)(images, PAR((1, 3), rounds=1)(images, maps)), out)
    close(par(255*images, maps), out, rtol=1e-3, atol=1e-4)                 # colors are relative
    assert (out / par.gain).min() >= maps.min() - 1e-5 and (out / par.gain).max() <= maps.max() + 1e-5


def test_par_leaves_absent_classes_and_its_input_alone():
    images, maps = scene(2)
    maps[:, 1] = 0
    before = maps.clone()
    out = PAR(rounds=2)(images, maps)
    assert (out[:, 1] == 0).all() and (out[:, [0, 2]] > 0).all() and (maps == before).all()
    assert (PAR(rounds=2)(images, 0*maps) == 0).all() and (PAR(rounds=0)(images, maps) == maps).all()


def test_par_of_a_flat_image_blurs_evenly():
    maps = torch.zeros(1, 1, 15, 15)
    maps[..., 7, 7] = 1
    out = PAR((1,), rounds=1)(torch.full((1, 3, 15, 15), .5), maps)[0, 0]
    assert out.isfinite().all() and out[7, 7] == 0 and (out > 0).sum() == 8
    torch.testing.assert_close(out, out.flip(0))


def test_par_follows_edges():
    images = torch.zeros(1, 3, 24, 24)
    images[..., 11:] = 1                                                    # the edge lies at column 11 ...
    images += .02 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    maps = torch.linspace(1, 0, 24).expand(1, 1, 24, 24)                    # ... and the map knows nothing of it
    out = PAR()(images, maps)[0, 0] / PAR().gain
    assert out[:, :11].min() > out[:, 11:].max() + .2


def test_par_keeps_dtype_and_takes_no_gradient():
    images, maps = scene(3)
    assert PAR(rounds=1)(images, maps.half()).dtype == torch.half
    assert not PAR(rounds=1)(images, maps.requires_grad_()).requires_grad
    assert PAR(rounds=1)(images[:0], maps[:0].detach()).shape == (0, 3, 7, 8)


def test_par_refuses():
    images, maps = scene(4)
    par = PAR(rounds=1)
    for i, m in ((images, maps[:1]), (images, maps[..., 1:]), (images[0], maps[0]), (images, maps[0])):
        with pytest.raises(ValueError, match="resize the maps first"): par(i, m)
    for i, m in ((images / 0 * 0, maps), (images, maps / 0 * 0), ((255*images).byte(), maps)):
        with pytest.raises(ValueError, match="floats without NaN"): par(i, m)
    for bad in (dict(dilations=()), dict(dilations=(0, 1)), dict(rounds=-1), dict(chunk=0)):
        with pytest.raises(ValueError, match="give"): PAR(**bad)


@quick
@given(st.integers(0, 10**6), st.sampled_from([.5, 1., 2., 5.]))
def test_background_score(seed, gamma):
    maps = scene(seed)[1]
    score = background_score(maps, gamma)
    assert score.shape == (2, 1, 7, 8) and 0 <= score.min() and score.max() <= 1
    torch.testing.assert_close(score[:, 0], (1 - maps.max(1).values)**gamma)
    torch.testing.assert_close(background_score(maps.flatten(2), gamma), score.flatten(2))      # patches, too


@quick
@given(st.integers(0, 10**6))
def test_pseudo_label_modes(seed):
    maps = scene(seed)[1]
    default, cut = pseudo_labels(maps), pseudo_labels(maps, threshold=.5)
    assert default.dtype == torch.int64 and default.shape == (2, 7, 8) and (default == cut).all()
    pair, value, index = pseudo_labels(maps, .25, .7), *maps.max(1)
    assert (pair[value <= .25] == 0).all() and (pair[value > .7] == index[value > .7] + 1).all()
    assert (pair[(value > .25) & (value <= .7)] == 255).all()
    grown = pseudo_labels(maps, gamma=4)
    assert (grown[default > 0] == default[default > 0]).all() and (grown > 0).sum() >= (default > 0).sum()


def test_no_class_is_background_and_ties_too():
    assert (pseudo_labels(torch.zeros(1, 4, 3, 3)) == 0).all()
    half = torch.full((1, 1, 2, 2), .5)
    assert (pseudo_labels(half) == 0).all() and (pseudo_labels(half, threshold=.5) == 0).all()
    assert (pseudo_labels(half, .5, .9) == 0).all() and (pseudo_labels(half, .1, .5) == 255).all()


def test_label_refusals():
    maps = scene(0)[1]
    for call in (lambda m: background_score(m), lambda m: pseudo_labels(m), lambda m: pseudo_labels(m, .25, .7), lambda m: pseudo_labels(m, threshold=.5)):
        with pytest.raises(ValueError, match="normalize them"): call(maps + 1)
        with pytest.raises(ValueError, match="normalize them"): call(maps - 1)
        with pytest.raises(ValueError, match="NaN"): call(maps / 0 * 0)
        with pytest.raises(ValueError, match="floats"): call(maps > .5)
    for bad, words in ((dict(low=.2), "pair"), (dict(high=.2), "pair"), (dict(low=.7, high=.25), "below"), (dict(low=.2, high=.7, threshold=.5), "not all"), (dict(gamma=0), "above 0")):
        with pytest.raises(ValueError, match=words): pseudo_labels(maps, **bad)
        with pytest.raises(ValueError, match=words): refine_labels(scene(0)[0], maps, PAR(rounds=1), **bad)


@pytest.mark.parametrize("threshold", [.3, .55])
def test_thresholds_equal_a_constant_channel(threshold):
    images, maps = scene(5)
    par = PAR((1, 2), rounds=5)
    joint = par(images, torch.cat([torch.full_like(maps[:, :1], threshold), maps], 1)).argmax(1)
    assert (refine_labels(images, maps, par, threshold=threshold) == joint).float().mean() > .995
    assert (refine_labels(images, maps, PAR(rounds=0)) == pseudo_labels(maps)).all()
    assert (refine_labels(images, maps, PAR(rounds=0), .25, .7) == pseudo_labels(maps, .25, .7)).all()
