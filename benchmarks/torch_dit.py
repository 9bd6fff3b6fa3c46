"""A DiT of diffusers' own classes in PyTorch: trained on images, and sampled, for outside.py.

  python benchmarks/torch_dit.py '{"do": "train", "images": "train.npz", "out": "FOLDER"}'

The process needs torch and diffusers, and nothing of this project. The argument has the name of a
function below and what it takes, in JSON.
"""

import json
import math
import os
import pathlib
import sys
import time

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

# The process of DiT and, without learned variances, of its published folder.
PROCESS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
           "beta_schedule": "linear", "clip_sample": False}  # fmt: skip
CLASSES = 10  # its null label is 10
NETWORK = {
    "num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 4, "in_channels": 1,
    "sample_size": 28, "patch_size": 4, "num_embeds_ada_norm": CLASSES,
}  # fmt: skip
STEPS, BATCH, RATE, WARMUP, DECAY, DROPOUT = 9000, 64, 1.5e-3, 200, 0.999, 0.1


class Pixels(nn.Module):
    """In place of an autoencoder: the DiT is one of pixels."""

    class Config:
        scaling_factor = 1.0

    class Decoded:
        def __init__(self, sample):
            self.sample = sample

    config = Config()
    decode = Decoded


def train(images: str, out: str, seed: int = 0, steps: int = STEPS, keep_every: int = 250) -> dict:
    """Train on the `images` and `labels` of a file and write a pipeline's folder; it continues."""
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
    kept, step, seconds, losses = pathlib.Path(out) / "training.pt", 0, 0.0, []
    if kept.exists():
        stored = torch.load(kept, weights_only=True)
        network.load_state_dict(stored["network"])
        optimizer.load_state_dict(stored["optimizer"])
        average, step, seconds = stored["average"], stored["step"], stored["seconds"]
    kept.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    while step < steps:
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
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(DECAY, step / (step + 10)))
        losses.append(loss.item())
        if step % keep_every == 0 or step == steps:
            now = time.perf_counter()
            start, seconds = now, seconds + now - start
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(),
                     "average": average, "step": step, "seconds": seconds}  # fmt: skip
            torch.save(state, partial := kept.with_suffix(".partial"))
            os.replace(partial, kept)
            print(f"step {step}: loss {np.mean(losses):.4f}, {seconds:.0f} s", flush=True)
            losses = []
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    network.save_pretrained(pathlib.Path(out) / "transformer")
    scheduler.save_pretrained(pathlib.Path(out) / "scheduler")
    classes = {"transformer": network, "scheduler": scheduler}
    index = {name: ["diffusers", type(each).__name__] for name, each in classes.items()}
    index = {"_class_name": "DiTPipeline", "_diffusers_version": diffusers.__version__, **index}
    (pathlib.Path(out) / "model_index.json").write_text(json.dumps(index, indent=2))
    count = sum(map(torch.numel, parameters))
    return {"steps": step, "seconds": seconds, "parameters": count}


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    done = {"train": train}[asked.pop("do")](**asked)
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    print(json.dumps(done | versions))


if __name__ == "__main__":
    main()
