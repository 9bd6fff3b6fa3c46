"""The U-Net (DDPM++) and the DiT of this project in plain PyTorch, to compare speed with.

Written from the architectures (Karras et al. 2022, Appendix F.2; Peebles and Xie 2022), with the
same parameters as `mclr_jax.networks.unet` and `mclr_jax.networks.dit`. Images are NCHW.
"""

import json
import math
import sys
import time

import tasks
import torch
import torch.nn.functional as F
from torch import nn


def sinusoids(values: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """(B,) and (K,) -> (B, 2 K)."""
    angles = values[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice; optionally resampled before and attending after."""

    def __init__(self, inputs: int, outputs: int, embedding: int, resample="", attend=False):
        super().__init__()
        self.resample = resample
        self.norm0 = group_norm(inputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.affine = nn.Linear(embedding, outputs)
        self.norm1 = group_norm(outputs)
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        project = inputs != outputs or resample
        self.skip = nn.Conv2d(inputs, outputs, 1) if project else nn.Identity()
        self.attend = attend
        if attend:
            self.norm2 = group_norm(outputs)
            self.qkv = nn.Conv2d(outputs, 3 * outputs, 1)
            self.proj = nn.Conv2d(outputs, outputs, 1)

    def resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x, embedding):
        h = self.conv0(self.resampled(F.silu(self.norm0(x))))
        h = self.conv1(F.silu(self.norm1(h + self.affine(embedding)[:, :, None, None])))
        x = (h + self.skip(self.resampled(x))) * math.sqrt(0.5)
        if self.attend:
            # (B, 3 C, H, W) -> three (B, 1 head, H W, C)
            q, k, v = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
            h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
            x = (x + self.proj(h)) * math.sqrt(0.5)
        return x


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNet(nn.Module):
    """DDPM++ of EDM, one attention head."""

    def __init__(
        self, channels=32, channel_mult=(1, 2, 2), num_blocks=2, attention_resolutions=(8,),
        num_classes=10, resolution=32,
    ):  # fmt: skip
        super().__init__()
        self.num_classes = num_classes
        width = 4 * channels
        self.register_buffer("frequencies", 1e-4 ** torch.linspace(0, 1, channels // 2))
        self.map_label = nn.Linear(num_classes, channels)
        noise = nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        self.map_noise = nn.Sequential(*noise)
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        current, skips = channels, [channels]
        for level, mult in enumerate(channel_mult):
            attend = resolution >> level in attention_resolutions
            if level:
                self.encoder.append(ResidualBlock(current, current, width, "down"))
                skips.append(current)
            for _ in range(num_blocks):
                self.encoder.append(ResidualBlock(current, channels * mult, width, "", attend))
                current = channels * mult
                skips.append(current)
        blocks = (ResidualBlock(current, current, width, attend=attend) for attend in (True, False))
        self.middle = nn.ModuleList(blocks)
        for level in reversed(range(len(channel_mult))):
            if level < len(channel_mult) - 1:
                self.decoder.append(ResidualBlock(current, current, width, "up"))
            for index in range(num_blocks + 1):
                attend = resolution >> level in attention_resolutions and index == num_blocks
                inputs, current = current + skips.pop(), channels * channel_mult[level]
                self.decoder.append(ResidualBlock(inputs, current, width, "", attend))
        last = nn.Conv2d(current, 3, 3, padding=1)
        self.last = nn.Sequential(group_norm(current), nn.SiLU(), last)

    def forward(self, x, c_noise, label):
        """x (B, 3, H, W), c_noise (B,), label (B,) -> (B, 3, H, W)."""
        one_hot = F.one_hot(label, self.num_classes).to(x.dtype) * math.sqrt(self.num_classes)
        embedding = self.map_noise(sinusoids(c_noise, self.frequencies) + self.map_label(one_hot))
        x = self.first(x)
        skips = [x]
        for block in self.encoder:
            x = block(x, embedding)
            skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for block in self.decoder:
            if not block.resample:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, embedding)
        return self.last(x)


class TransformerBlock(nn.Module):
    """Attention and MLP with adaLN-Zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, condition):
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_a) + shift_a
        qkv = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + gate_a * self.proj(h)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale_m) + shift_m
        return x + gate_m * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiT(nn.Module):
    """Transformer on patches."""

    def __init__(
        self, width=192, depth=6, heads=3, patch=4, channels=3, num_classes=10, resolution=32
    ):
        super().__init__()
        self.patch, self.num_classes, features = patch, num_classes, channels * patch**2
        self.register_buffer("frequencies", 1e-4 ** (torch.arange(128) / 128))
        self.register_buffer("positions", torch.randn(1, (resolution // patch) ** 2, width))
        self.embed_patches = nn.Linear(features, width)
        self.embed_noise = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_label = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList([TransformerBlock(width, heads) for _ in range(depth)])
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, features)

    def forward(self, x, c_noise, label):
        """x (B, C, H, W), c_noise (B,), label (B,) -> (B, C, H, W)."""
        size = x.shape[-2:]
        h = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        h = self.embed_patches(h) + self.positions
        noise = self.embed_noise(sinusoids(1000 * c_noise, self.frequencies))
        condition = F.silu(noise + self.embed_label(label))
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        h = self.last(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return F.fold(h.transpose(1, 2), size, self.patch, stride=self.patch)


def denoise(network, x, sigma, label, sigma_data=0.5):
    """EDM preconditioning; sigma (B,)."""
    s = sigma[:, None, None, None]
    total = s**2 + sigma_data**2
    output = network(x * total.rsqrt(), sigma.log() / 4, label)
    return sigma_data**2 / total * x + s * sigma_data * total.rsqrt() * output


def loss(network, x0, label, sigma_data=0.5):
    """Denoising score matching with EDM's noise levels and weights -> ()."""
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(len(x0), device=x0.device))
    x = x0 + sigma[:, None, None, None] * torch.randn_like(x0)
    error = (denoise(network, x, sigma, label, sigma_data) - x0).square().mean((1, 2, 3))
    return (error * (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2).mean()


class Trainer:
    """Adam (fused) and an exponential average of the weights (one call for all of them).

    `mode` is that of `torch.compile`, "" for eager; `dtype` that of the products, by autocast.
    """

    def __init__(self, network: nn.Module, mode: str = "", dtype: torch.dtype | None = None):
        self.network = network
        self.parameters = list(network.parameters())
        self.averages = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4, fused=True)
        self.loss = torch.compile(loss, mode=mode) if mode else loss
        self.dtype = dtype

    def step(self, x0, label) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()  # CUDA graphs may write over the last results
        with torch.autocast(x0.device.type, self.dtype, enabled=self.dtype is not None):
            value = self.loss(self.network, x0, label)
        value.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1e-3)
        return value.detach()


@torch.inference_mode()
def heun(denoise_fn, x, label, sigmas):
    """EDM Algorithm 1 without churn; sigmas (N + 1,) ends in 0."""
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        slope = (x - denoise_fn(x, torch.full((len(x),), s), label)) / s
        y = x + (t - s) * slope
        if t > 0:
            slope = (slope + (y - denoise_fn(y, torch.full((len(x),), t), label)) / t) / 2
            y = x + (t - s) * slope
        x = y
    return x


def main() -> None:
    """Train in bfloat16, for accelerator_sections.py: the process of an `alternation.Worker`.

    The argument has the network, its options, the device, the mode of `torch.compile`, the batch
    and the shape of an example in JSON.
    """
    asked = json.loads(sys.argv[1])
    device, start = asked["device"], time.perf_counter()
    network = {"dit": DiT, "unet": UNet}[asked["network"]](**asked["options"]).to(device)
    height, width, channels = asked["shape"]
    x0 = torch.randn(asked["batch"], channels, height, width, device=device) / 2
    label = torch.randint(network.num_classes, (asked["batch"],), device=device)
    if asked["network"] == "unet":
        network, x0 = (each.to(memory_format=torch.channels_last) for each in (network, x0))
    torch.set_float32_matmul_precision("high")  # as XLA does on GPUs
    trainer = Trainer(network, asked["mode"], torch.bfloat16)

    def run(steps: int) -> float:
        for _ in range(steps):
            value = trainer.step(x0, label)
        return value.item()  # waits for the device

    loss = run(3)
    count = sum(map(torch.numel, trainer.parameters))
    origin = {"torch": torch.__version__, "loss": loss, "parameters": count}
    if device == "cuda":
        origin["peak_bytes"] = torch.cuda.max_memory_allocated()
    origin["first_steps_seconds"] = time.perf_counter() - start
    tasks.serve(origin, lambda calls: {"loss": run(calls)})


if __name__ == "__main__":
    main()
