"""The z-loss against its formula."""

from __future__ import annotations

import torch

from fastllm_train.models.z_loss import loss_with_z


def test_value_and_gradient_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(7, 11, dtype=torch.float64, generator=generator)
    labels = torch.randint(11, (7,), generator=generator)
    labels[2] = -100
    share = torch.tensor([0.0, 1.0, 0.0, 0.5, 1.0, 1.0, 2.0], dtype=torch.float64)
    one, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    objective, cross_entropy = loss_with_z(one, labels, share, 0.1)
    want = torch.nn.functional.cross_entropy(other, labels, reduction="none") @ share
    torch.testing.assert_close(cross_entropy, want, rtol=1e-12, atol=0)
    want = want + 0.1 * (other.logsumexp(-1).square() @ share)
    torch.testing.assert_close(objective, want, rtol=1e-12, atol=0)
    objective.backward()
    want.backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-13)
