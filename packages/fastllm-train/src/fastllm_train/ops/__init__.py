"""Fused operators of fastllm_core as torch operators, one module per operator.

Each module registers its operators under ``torch.ops.fastllm`` when it is imported, with fake
kernels (so that they work under ``torch.compile`` and ``FakeTensorMode``) and autograd. Nothing is
imported here: torch is loaded by ``from fastllm_train.ops.rmsnorm import rmsnorm``, not before.
"""
