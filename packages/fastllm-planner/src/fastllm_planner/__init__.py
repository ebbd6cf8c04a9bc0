"""fastllm-planner: what fits, how fast, and with which strategy. Imports nothing heavy."""

__version__ = "0.1.0"
