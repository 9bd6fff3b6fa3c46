"""A DiT of diffusers' own classes in PyTorch: trained on images, and sampled, for outside.py.

  python benchmarks/torch_dit.py '{"do": "train", "images": "train.npz", "out": "FOLDER"}'

The process needs torch and diffusers, and nothing of this project. The argument has the name of a
function below and what it takes, in JSON.
"""

import json
import math
import pathlib
import sys
import time

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

# The process of DiT and, without learned variances, of its published folder.
PROCESS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
           "beta_schedule": "linear", "clip_sample": False}  # fmt: skip
CLASSES = 10  # its null label is 10
NETWORK = {
    "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 4, "in_channels": 1,
    "out_channels": 1,  # DiTPipeline does not take it from in_channels
    "sample_size": 28, "patch_size": 4, "num_embeds_ada_norm": CLASSES,
}  # fmt: skip
STEPS, BATCH, RATE, WARMUP, DECAY, DROPOUT = 6000, 64, 1.5e-3, 200, 0.999, 0.1


class Pixels(AutoencoderKL):
    """The autoencoder that the pipeline asks for; this DiT is one of pixels."""

    def decode(self, z, *_, **__) -> DecoderOutput:
        return DecoderOutput(sample=z)


def train(images: str, out: str, seed: int = 0, steps: int = STEPS) -> dict:
    """Train on the `images` and `labels` of a file and write a pipeline's folder."""
    with np.load(images) as file:
        pixels = torch.from_numpy(file["images"][:, None].astype(np.float32) / 127.5 - 1)
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    torch.manual_seed(seed)
    # Each block of diffusers has an embedder of its own, which would drop labels alone in training
    # mode: then no step would see a null label. Labels are dropped here, for all blocks at once.
    network = DiTTransformer2DModel(**NETWORK).eval()
    scheduler, parameters = DDIMScheduler(**PROCESS), list(network.parameters())
    average = [each.detach().clone() for each in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    start = time.perf_counter()
    for step in range(steps):
        draw = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(labels), (BATCH,), generator=draw)
        dropped = torch.rand(BATCH, generator=draw) < DROPOUT
        level = torch.randint(1000, (BATCH,), generator=draw)
        noise = torch.randn(BATCH, *pixels.shape[1:], generator=draw)
        noisy = scheduler.add_noise(pixels[rows], noise, level)
        asked = torch.where(dropped, CLASSES, labels[rows])
        warm, rest = min(1.0, (step + 1) / WARMUP), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = RATE * warm * rest
        loss = F.mse_loss(network(noisy, timestep=level, class_labels=asked).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(DECAY, (step + 1) / (step + 11)))
        if step % 250 == 249:
            seconds = time.perf_counter() - start
            print(f"step {step + 1}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    network.save_pretrained(pathlib.Path(out) / "transformer")
    scheduler.save_pretrained(pathlib.Path(out) / "scheduler")
    classes = {"transformer": network, "scheduler": scheduler}
    index = {name: ["diffusers", type(each).__name__] for name, each in classes.items()}
    index = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__, **index}
    (pathlib.Path(out) / "model_index.json").write_text(json.dumps(index, indent=2))
    count = sum(map(torch.numel, parameters))
    return {"steps": steps, "seconds": seconds, "parameters": count}


@torch.inference_mode()
def sample(
    folder: str, out: str, count: int, seed: int, scale: float = 1.0, steps: int = 50,
    batch: int = 50,
) -> dict:  # fmt: skip
    """Write `images` in [-1, 1] of labels 0, 1, ..., 9, 0, ... and their noise.

    Without guidance (scale 1) they are those of DiTPipeline. It guides towards the label 1000,
    which this network does not have: with guidance the same loop is written out.
    """
    pipe = DiTPipeline.from_pretrained(folder, vae=Pixels(scaling_factor=1.0))
    pipe.set_progress_bar_config(disable=True)
    labels, images, noises, rows = torch.arange(count) % CLASSES, [], [], []  # rows: of each call
    listen = lambda _, args, kwargs: rows.append(len(args[0]))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(listen, with_kwargs=True)
    for start in range(0, count, batch):
        own = labels[start : start + batch]
        noise = torch.randn(len(own), 1, 28, 28, generator=seeded(seed, start))
        if scale == 1:
            drawn = pipe(own.tolist(), 1.0, seeded(seed, start), steps, output_type="pt")
            images.append(2 * drawn.images - 1)
        else:
            images.append(guided(pipe, noise, own, scale, steps))
        noises.append(noise)
    np.savez(
        out, images=torch.cat(images)[:, 0].numpy(), noise=torch.cat(noises)[:, 0].numpy(),
        labels=labels.numpy(),
    )  # fmt: skip
    return {"samples": count, "network_calls": sum(rows) / count, "scale": scale}


def seeded(seed: int, start: int) -> torch.Generator:
    """The generator of the noise of the samples from `start` on."""
    return torch.Generator().manual_seed(1_000_003 * seed + start)


def guided(pipe, x: torch.Tensor, labels: torch.Tensor, scale: float, steps: int) -> torch.Tensor:
    """The loop of DiTPipeline with this network's null label, and clipped as it does."""
    both = torch.cat([labels, torch.full_like(labels, CLASSES)])
    pipe.scheduler.set_timesteps(steps)
    for level in pipe.scheduler.timesteps:
        asked = {"timestep": level.expand(len(both)), "class_labels": both}
        answers = pipe.transformer(torch.cat([x, x]), **asked).sample
        right, null = answers.chunk(2)
        x = pipe.scheduler.step(null + scale * (right - null), level, x).prev_sample
    return x.clamp(-1, 1)


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    done = {"train": train, "sample": sample}[asked.pop("do")](**asked)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    print(json.dumps(done | versions))


if __name__ == "__main__":
    main()
