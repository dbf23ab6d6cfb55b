"""The digits' U-Net in PyTorch, the peer of poise's in ``benchmarks/fdistill.py``.

DDPM++ with EDM's preconditioning, written for this comparison in plain, idiomatic PyTorch. Parameters have the official
names, so that ``poise.nets.to_state_dict`` fills it and both networks can be seen to compute the same.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

_SKIP = math.sqrt(0.5)


class GroupNorm(nn.GroupNorm):
    """At least four channels a group, at most 32 groups."""

    def __init__(self, channels: int):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)


class Conv(nn.Conv2d):
    """A convolution behind a nearest-neighbour doubling, or before a 2x2 mean."""

    def __init__(self, inputs: int, outputs: int, size: int, resample: str = ""):
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.resample = resample

    def forward(self, x):
        if self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif self.resample == "down":
            x = F.avg_pool2d(x, 2)
        return super().forward(x)


class Block(nn.Module):
    """Two normalized convolutions around a shortcut, then attention."""

    def __init__(self, inputs: int, outputs: int, emb: int, resample: str = "", attention: bool = False):
        super().__init__()
        self.norm0, self.conv0 = GroupNorm(inputs), Conv(inputs, outputs, 3, resample)
        self.affine = nn.Linear(emb, outputs)
        self.norm1, self.conv1 = GroupNorm(outputs), Conv(outputs, outputs, 3)
        self.skip = Conv(inputs, outputs, 1, resample) if inputs != outputs or resample else nn.Identity()
        self.attention = attention
        if attention:
            self.norm2, self.qkv, self.proj = (
                GroupNorm(outputs),
                Conv(outputs, 3 * outputs, 1),
                Conv(outputs, outputs, 1),
            )

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = F.silu(self.norm1(h + self.affine(emb)[:, :, None, None]))
        x = (self.conv1(h) + self.skip(x)) * _SKIP
        if self.attention:
            batch, channels, height, width = x.shape
            qkv = self.qkv(self.norm2(x)).reshape(batch, channels, 3, height * width)
            q, k, v = (part.transpose(1, 2)[:, None] for part in qkv.unbind(2))
            a = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
            x = (self.proj(a) + x) * _SKIP
        return x


class UNet(nn.Module):
    """DDPM++, class-conditional."""

    def __init__(self, size: int, channels: int, classes: int, width: int, mult, blocks: int, attn_resolutions):
        super().__init__()
        self.width, self.classes, emb = width, classes, 4 * width
        if classes:
            self.map_label = nn.Linear(classes, width)
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.enc, self.dec, widths = nn.ModuleDict(), nn.ModuleDict(), []
        x = width
        for level, factor in enumerate(mult):
            res = f"{size >> level}x{size >> level}"
            if level == 0:
                self.enc[f"{res}_conv"] = Conv(channels, width, 3)
            else:
                self.enc[f"{res}_down"] = Block(x, x, emb, "down")
            widths.append(x)
            for i in range(blocks):
                self.enc[f"{res}_block{i}"] = Block(x, width * factor, emb, "", size >> level in attn_resolutions)
                x = width * factor
                widths.append(x)
        for level, factor in reversed(list(enumerate(mult))):
            res = f"{size >> level}x{size >> level}"
            if level == len(mult) - 1:
                self.dec[f"{res}_in0"], self.dec[f"{res}_in1"] = Block(x, x, emb, "", True), Block(x, x, emb)
            else:
                self.dec[f"{res}_up"] = Block(x, x, emb, "up")
            for i in range(blocks + 1):
                attention = i == blocks and size >> level in attn_resolutions
                self.dec[f"{res}_block{i}"] = Block(x + widths.pop(), width * factor, emb, "", attention)
                x = width * factor
        self.dec[f"{size}x{size}_aux_norm"], self.dec[f"{size}x{size}_aux_conv"] = GroupNorm(x), Conv(x, channels, 3)

    def forward(self, x, noise, labels, features_only: bool = False):
        """The image, and the last output of the encoder; or the latter alone."""
        half = self.width // 2
        frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device=x.device) / (half - 1))
        angle = noise[:, None] * frequency
        emb = torch.cat([angle.sin(), angle.cos()], 1)
        if self.classes:
            emb = emb + self.map_label(labels * math.sqrt(self.classes))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else layer(x, emb)
            skips.append(x)
        features = x
        if features_only:
            return features
        for name, layer in self.dec.items():
            if "_block" in name:
                x = layer(torch.cat([x, skips.pop()], 1), emb)
            elif name.endswith("_aux_norm"):
                x = F.silu(layer(x))
            else:
                x = layer(x) if name.endswith("_aux_conv") else layer(x, emb)
        return x, features


class Denoiser(nn.Module):
    """EDM's preconditioning."""

    def __init__(self, model: nn.Module, sigma_data: float = 0.5):
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x, sigma, labels, features_only: bool = False):
        """The clean image and the features, or the features alone."""
        s, d = sigma[:, None, None, None], self.sigma_data
        scaled, noise = x / (s**2 + d**2).sqrt(), sigma.log() / 4
        if features_only:
            return self.model(scaled, noise, labels, True)
        out, features = self.model(scaled, noise, labels)
        return x * (d**2 / (s**2 + d**2)) + out * (s * d / (s**2 + d**2).sqrt()), features


class Head(nn.Module):
    """A perceptron on normalized features, the noise level and the class."""

    def __init__(self, inputs: int, classes: int, hidden: int = 128, noise_channels: int = 32):
        super().__init__()
        self.noise_channels = noise_channels
        self.norm = nn.LayerNorm(inputs, eps=1e-6)
        total = inputs + noise_channels + classes
        self.layers = nn.Sequential(
            nn.Linear(total, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )

    def forward(self, features, sigma, labels):
        """Logits ``[B]``."""
        half = self.noise_channels // 2
        frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device=sigma.device) / half)
        angle = (sigma.log() / 4)[:, None] * frequency
        x = self.norm(features.flatten(1))
        return self.layers(torch.cat([x, angle.cos(), angle.sin(), labels], 1))[:, 0]
