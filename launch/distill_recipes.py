"""The named settings of ``python -m poise.launch.distill --recipe=NAME``; flags override them."""

from typing import Any

# What the paper's runs on EDM teachers share.
_PAPER = {
    "precision": "bfloat16", "sigma_min": 0.002, "sigma_max": 80.0, "fake_updates": 5, "weight_decay": 1e-2,
    "warmup_steps": 500, "decay_steps": 0, "bins": "linear", "ratio_min": 0.1, "ratio_max": 20.0, "ema_decay": 0.9999,
    "eval_every": 5_000, "eval_draws": 1, "save_every": 0, "save_every_seconds": 600.0, "teacher_decay": False,
    "teacher_ema_rampup": 0.05,
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    # Seconds, to see that everything works.
    "smoke": {
        "teacher_steps": 6, "warmup_steps": 2, "steps": 4, "batch_size": 8, "teacher_batch_size": 8, "fake_updates": 1,
        "model_channels": 4, "channel_mult": (1,), "attn_resolutions": (), "sampler_steps": 3, "eval_draws": 1,
        "eval_every": 2, "save_every": 2, "decay_steps": 4,
    },
    # Half a minute: a student that cannot fit both modes of its teacher, so that divergences differ to the eye.
    "mixture2d": {
        "data": "mixture2d", "sigma_min": 0.05, "sigma_max": 0.5, "batch_size": 256, "warmup_steps": 500, "steps": 400,
        "decay_steps": 0, "learning_rate": 1e-2, "gan_weight": 0.0, "ema_decay": 0.9,
    },
    # EDM's teacher for CIFAR-10, without its augmentation, and the f-distill paper's distillation of it.
    "cifar10": {
        **_PAPER, "preset": "paper_cifar10", "divergence": "forward_kl", "data": "tfds:cifar10",
        "architecture": "ddpmpp", "model_channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4,
        "attn_resolutions": (16,), "dropout": 0.13,
        "teacher_steps": 390_625, "teacher_batch_size": 512, "teacher_learning_rate": 1e-3,
        "teacher_warmup_steps": 19_531, "teacher_ema_halflife": 500_000.0,
        "batch_size": 2_048, "steps": 60_000, "learning_rate": 1e-4, "fake_learning_rate": 1e-4,
        "head_learning_rate": 1e-4, "gan_weight": 1e-3, "r1_weight": 1.0, "feature_levels": (0, 1, 2),
        "bins_decay": 0.0, "sampler_steps": 18,
    },
    # The same for ImageNet at 64x64 pixels.
    "imagenet64": {
        **_PAPER, "preset": "paper_imagenet64", "divergence": "jensen_shannon", "data": "tfds:imagenet_resized/64x64",
        "architecture": "adm", "model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3,
        "attn_resolutions": (32, 16, 8), "dropout": 0.10, "remat": True,
        "teacher_steps": 610_352, "teacher_batch_size": 4_096, "teacher_learning_rate": 1e-4,
        "teacher_warmup_steps": 2_441, "teacher_ema_halflife": 50e6,
        "batch_size": 512, "steps": 380_000, "learning_rate": 2e-6, "fake_learning_rate": 2e-6,
        "head_learning_rate": 2e-6, "gan_weight": 3e-3, "feature_levels": (-1,), "bins_decay": 0.5,
        "sampler_steps": 40, "eval_images": 10_000,
    },
}  # fmt: skip
