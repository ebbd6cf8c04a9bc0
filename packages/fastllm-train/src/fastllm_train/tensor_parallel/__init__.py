"""Tensor and sequence parallelism, applied from outside to a plain single-device model.

Shoeybi et al. 2019 (arXiv:1909.08053), Korthikanti et al. 2022 (arXiv:2205.05198). Weights are cut
into plain parameters, hooks at the entrance and exit of attention, MLP, embedding and head do the
communication: no module of the model knows of it.
"""
