"""Random Stable Diffusion pipelines in diffusers' folder format: the right shapes and file names, weights that mean nothing."""
import json
import warnings
from pathlib import Path

import torch

VAE = dict(sample_size=96, latent_channels=8, block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8)
MINI_UNET = dict(
    sample_size=12, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(64, 128),
    down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    cross_attention_dim=64, attention_head_dim=4, norm_num_groups=16)
SD21_UNET = dict(  # the published unet/config.json of Stable Diffusion 2.1, key by key
    sample_size=96, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True, upcast_attention=True)
SD21_REDUCED_WIDTH = dict(SD21_UNET, block_out_channels=(40, 80, 160, 160), cross_attention_dim=64, norm_num_groups=8)
SCHEDULER = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
                 steps_offset=1, set_alpha_to_one=False)


def tiny_tokenizer(folder, length=77):
    "A `CLIPTokenizer` of single characters, from a vocab.json and a merges.txt as the real one has them."
    from transformers import CLIPTokenizer
    chars = "abcdefghijklmnopqrstuvwxyz0123456789,.'{}"
    words = [*chars, *(c + "</w>" for c in chars), "<|startoftext|>", "<|endoftext|>"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=length)


def random_pipeline(folder, unet, vae, seed=0, dtype=torch.float16):
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    folder, n = Path(folder), len(vae["block_out_channels"])
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
                          max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL(**vae, down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n),
            unet=UNet2DConditionModel(**unet), text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
            scheduler=PNDMScheduler(**SCHEDULER, skip_prk_steps=True), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.to(dtype=dtype).save_pretrained(str(folder), safe_serialization=True)
    return folder


def random_mini_sd(folder, seed=0):
    "The mini model's topology (96x96 pictures, 12x12 latents of 8 channels), half precision, random weights."
    return random_pipeline(folder, MINI_UNET, VAE, seed)


def random_sd21_topology_reduced_width(folder, seed=0):
    "Stable Diffusion 2.1's block types, four levels, heads [5, 10, 20, 20] and linear projections; an eighth of its width, a tiny VAE and text encoder."
    return random_pipeline(folder, SD21_REDUCED_WIDTH, dict(VAE, latent_channels=4, sample_size=768), seed)
