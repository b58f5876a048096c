"""Federated PEFT fine-tuning of quantized foundation models on NVIDIA FLARE."""

__version__ = "0.1.0"
