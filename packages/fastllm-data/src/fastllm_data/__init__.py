"""JSONL to Megatron-compatible datasets through a native builder."""

__version__ = "0.1.0"
