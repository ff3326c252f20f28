"diclip_bench: what is counted, what is timed, what is written; the true sizes without their weights."
import json
from functools import partial

import pytest
import torch
from helpers_sd import SD21_REDUCED_WIDTH, SD21_UNET, VAE

import diclip.app.bench as bench
from diclip.config import get_profile

torch.set_num_threads(1)
STAGES = ["VAE encoder", "UNet", "ACR", "CLIP with VCE", "CAM and retrieval", "labels with PAR", "drawing: one step", "drawing: decoder", "training step"]


def test_the_median_leaves_out_warm_up_and_interruptions(monkeypatch):
    took, now = iter([9., 1., 5., 2., 3., 2.]), [0.]
    monkeypatch.setattr(bench, "perf_counter", lambda: now[0])
    assert bench.median_seconds(lambda: now.__setitem__(0, now[0] + next(took)), runs=5) == 2.


def test_operations_by_hand():
    "A convolution, a linear layer with its backward pass, and attention as two products."
    conv, lin = torch.nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), torch.nn.Linear(7, 4)
    assert bench.operations(lambda: conv(torch.rand(2, 3, 8, 12))) == 2 * (2 * 4 * 6) * 5 * 27
    x = torch.rand(6, 7)                                      # the input needs no gradient: one product forward, one for the weights
    assert bench.operations(lambda: lin(x).sum().backward()) == 2 * (2 * 6 * 7 * 4)
    q, k = torch.rand(3, 2, 10, 8), torch.rand(3, 2, 20, 8)
    assert bench.operations(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k)) == 2 * (2 * 3 * 2 * 10 * 20 * 8)


def test_stable_diffusion_has_its_true_size():
    from diffusers import UNet2DConditionModel
    with torch.device("meta"):
        sd, twin = bench.random_sd(get_profile("voc"), "meta"), UNet2DConditionModel(**SD21_UNET)
    shapes = lambda net: {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert shapes(sd.pipe.unet) == shapes(twin)
    assert sum(p.numel() for p in sd.pipe.vae.parameters()) == 83_653_863 and sd.factor == 8      # AutoencoderKL of Stable Diffusion
    with pytest.raises(ValueError, match="not known here"): bench.random_sd(get_profile("voc", sd="somebody/sd-1"))


def check(run, images):
    assert list(run["stages"]) == STAGES and run["rate"] > 1e8
    for name, s in run["stages"].items():
        assert s["seconds"] > 0 and s["memory"] > 1e8 and s["operations"] >= 0
        assert (s["operations"] == 0) == (name == "labels with PAR")
    assert run["parameters"]["images"] == images and len(run["sums"]) == 4


def test_mini_with_one_image(tmp_path, capsys):
    file = tmp_path / "speed.json"
    bench.diclip_bench("mini", images=1, runs=1, record=str(file))
    out = capsys.readouterr().out
    record = json.loads(file.read_text())
    (run,) = record["runs"].values()
    check(run, 1)
    assert record["experiment"] == "speed" and all(name in out for name in STAGES) and bench.speed_table(run) in out
    assert run["parameters"] == dict(profile="mini", random=False, images=1, device="cpu", precision="fp32", runs=1)
    run["rate"] = 7.
    bench.add_run(file, run)                                  # the same parameters: replaced
    bench.add_run(file, run | dict(parameters=run["parameters"] | dict(precision="bf16")))
    runs = json.loads(file.read_text())["runs"]
    assert len(runs) == 2 and list(runs.values())[0]["rate"] == 7.
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ValueError, match="something else"): bench.add_run(other, run)


def test_the_topology_of_voc_at_random_weights(monkeypatch):
    "ViT-B/16 at its true size, Stable Diffusion 2.1 at reduced width, small pictures."
    n, unet = len(VAE["block_out_channels"]), dict(SD21_REDUCED_WIDTH)
    vae = dict(VAE, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n)
    monkeypatch.setattr(bench, "random_sd", partial(bench.random_sd, config=dict(bench.SD21, unet=unet, vae=vae)))
    p = get_profile("voc", crop=96, size=64, par_rounds=1, sd_draws=2, sd_crop=128)
    run = bench.bench(p, random=True, images=2, runs=1)
    check(run, 2)
    assert "pool, 20 x 50 images" in run["sums"] and "training, 20000 x 4 images" in run["sums"]


@pytest.mark.parametrize("how, message", [(dict(precision="int8"), "fp32, bf16, fp16"), (dict(precision="fp16"), "bf16"), (dict(images=-1), "at least one"), (dict(runs=0), "at least one"),
                                          (dict(profile="maxi"), "choose one of mini, voc, coco")])
def test_refusals(how, message):
    with pytest.raises(SystemExit, match=message): bench.diclip_bench(**how)


def test_sums_by_hand():
    stages = {name: dict(seconds=i + 1., operations=10 * (i + 1)) for i, name in enumerate(STAGES)}
    p = get_profile("voc", steps=10, images_per_class=3, iterations=5, batch=2)
    assert list(bench.sums(stages, p).values()) == [78, 78 * 60, 30, 300]           # 10 * 7 + 8; 1 + ... + 6 + 9
    assert list(bench.sums(stages, p, "operations").values()) == [780, 780 * 60, 300, 3000]
    assert list(bench.sums(stages, get_profile("mini", iterations=5, batch=2)).values())[2:] == [30, (6 + 9) * 10]
