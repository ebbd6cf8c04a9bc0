"""Pre-training on DeepSpeed and Megatron-style parallelism, exact in every layout."""

__version__ = "0.1.0"
