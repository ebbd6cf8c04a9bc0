"""Checkpoint conversion between Meta, Hugging Face, Megatron and DeepSpeed, without torch."""

__version__ = "0.1.0"
