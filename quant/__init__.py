"""Quantizers, quantization-aware training, post-training quantization and integer export, as pure functions."""

__all__: list[str] = []
