"""One cycle of f-distill in PyTorch, the peer of poise's in ``benchmarks/fdistill.py``: Jensen-Shannon, Karras bins."""

import copy

import torch
from torch.nn import functional as F

from benchmarks.torch_unet import Denoiser, Head, UNet


class TorchDistillation:
    """Teacher, student, fake score and head with their optimizers.

    Args:
      network: the arguments of the U-Net.
      weights: the teacher's, by official name.
      config: the settings, a :class:`poise.fdistill.FDistillConfig`.
      device: where it runs.
      compiled: whether the networks go through ``torch.compile``.
      precision: what the networks compute in, ``"float32"`` or ``"bfloat16"``.
    """

    def __init__(self, network: dict, weights: dict, config, device: str, compiled: bool, precision: str = "float32"):
        self.config, self.device, self.classes = config, device, network["classes"]
        self.dtype = torch.bfloat16 if precision == "bfloat16" else None
        teacher = Denoiser(UNet(**network)).to(device)
        teacher.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        teacher.requires_grad_(False)
        self.teacher, self.student, self.fake = (copy.deepcopy(teacher) for _ in range(3))
        self.student.requires_grad_(True)
        self.fake.requires_grad_(True)
        size = network["size"] >> (len(network["mult"]) - 1)
        features = network["width"] * network["mult"][-1] * size**2
        self.head = Head(features, self.classes).to(device)
        self.optimizers = {
            name: torch.optim.AdamW(
                getattr(self, name).parameters(), lr=1e-3, weight_decay=0.0, betas=betas, fused=True
            )
            for name, betas in (("student", (0.9, 0.999)), ("fake", (0.9, 0.999)), ("head", (0.5, 0.999)))
        }
        self.ema = [parameter.detach().clone() for parameter in self.student.parameters()]
        self.bins = torch.zeros(config.num_bins, device=device)  # logarithms of running means of the ratio
        steps = torch.linspace(0, 1, 1000, device=device)
        low, high = config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho)
        self.levels = (low + steps * (high - low)) ** config.rho
        if compiled:
            for name in ("teacher", "student", "fake", "head"):
                setattr(self, name, torch.compile(getattr(self, name)))

    def _autocast(self):
        return torch.autocast(self.device, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def _labels(self, batch: int):
        return F.one_hot(torch.randint(self.classes, (batch,), device=self.device), self.classes).float()

    def _draw(self, x, lowest: int, highest: int):
        index = torch.randint(lowest, highest + 1, (len(x),), device=self.device)
        sigma = self.levels[index]
        return sigma, x + sigma[:, None, None, None] * torch.randn_like(x), index

    def generate(self, latents, labels):
        """The student's images."""
        sigma = torch.full((len(latents),), self.config.sigma_init, device=self.device)
        return self.student(latents * self.config.sigma_init, sigma, labels)[0]

    def _step(self, name: str, loss, clip: bool):
        optimizer, module = self.optimizers[name], getattr(self, name)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        optimizer.step()

    def cycle(self, images, labels) -> None:
        """One update of the student and ``fake_updates`` of its critics; ``images`` are ``[k, B, C, H, W]``."""
        with self._autocast():
            self._student(images[0].shape)
            for image, label in zip(images, labels, strict=True):
                self._critics(image, label)

    def _student(self, shape):
        config = self.config
        labels = self._labels(shape[0])
        x = self.generate(torch.randn(shape, device=self.device), labels)
        sigma, xt, index = self._draw(x, config.min_level, config.max_level)
        real, features = self.teacher(xt, sigma, labels)
        logits = self.head(features, sigma, labels).float()
        with torch.no_grad():
            fake = self.fake(xt, sigma, labels)[0]
            ratio = logits.clamp(-config.ratio_clip, config.ratio_clip)
            bins = index * config.num_bins // 1000
            counts = torch.bincount(bins, minlength=config.num_bins)
            sums = torch.zeros_like(self.bins).index_add_(0, bins, ratio.exp())
            means = torch.where(counts > 0, sums / counts.clamp(min=1), self.bins.exp())
            self.bins = (config.bins_decay * self.bins.exp() + (1 - config.bins_decay) * means).log()
            log_weight = F.logsigmoid(ratio - self.bins[bins])
            weight = torch.softmax(log_weight, 0) * len(x)
            scale = weight / ((x - real).abs().mean((1, 2, 3)) + config.matching_eps)
            gradient = (fake - real) * scale[:, None, None, None]
        loss = 0.5 * ((x - (x - gradient).detach()) ** 2).mean() + config.gan_weight * F.softplus(-logits).mean()
        self._step("student", loss, clip=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.student.parameters()), 1 - config.ema_decays[0])

    def _critics(self, image, label):
        config = self.config
        labels = self._labels(len(image))
        with torch.no_grad():
            x = self.generate(torch.randn_like(image), labels)
            sigma, xt, _ = self._draw(x, 0, 999)
            real_sigma, real_xt, _ = self._draw(image, 0, 999)
            both = self.teacher(
                torch.cat([xt, real_xt]), torch.cat([sigma, real_sigma]), torch.cat([labels, label]), True
            )
            fake_features, real_features = both.chunk(2)
        denoised = self.fake(xt, sigma, labels)[0]
        weight = 1 / sigma**2 + 1 / config.sigma_data**2
        self._step("fake", (weight[:, None, None, None] * (denoised - x) ** 2).mean(), clip=True)
        fake_logits = self.head(fake_features, sigma, labels).float()
        real_logits = self.head(real_features, real_sigma, label).float()
        self._step("head", F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean(), clip=False)

    @torch.no_grad()
    def sample(self, latents, labels, sigmas):
        """EDM's deterministic Heun sampler with the teacher."""
        with self._autocast():
            x = latents * sigmas[0]
            for i in range(len(sigmas) - 1):
                now, after = (sigmas[j].expand(len(x)) for j in (i, i + 1))
                slope = (x - self.teacher(x, now, labels)[0]) / sigmas[i]
                euler = x + (sigmas[i + 1] - sigmas[i]) * slope
                if i < len(sigmas) - 2:
                    other = (euler - self.teacher(euler, after, labels)[0]) / sigmas[i + 1]
                    euler = x + (sigmas[i + 1] - sigmas[i]) * (slope + other) / 2
                x = euler
            return x
