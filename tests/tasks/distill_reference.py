"""Writes distill_reference.npz with PyTorch 2.13: python -m tests.tasks.distill_reference.

`kl` is torch.nn.KLDivLoss of each token at a temperature, in float64; `gradient` that of its sum.
"""

from pathlib import Path

import numpy as np
import torch

TEMPERATURE = 2.5


def main():
    rng = np.random.default_rng(3)
    student, teacher = (torch.tensor(2 * rng.normal(size=(2, 5, 11))) for _ in range(2))
    student.requires_grad_()
    log_q, p = (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).softmax(-1)
    kl = torch.nn.KLDivLoss(reduction="none")(log_q, p).sum(-1)
    kl.sum().backward()
    np.savez(
        Path(__file__).with_suffix(".npz"),
        student=student.detach().numpy(),
        teacher=teacher.numpy(),
        temperature=TEMPERATURE,
        kl=kl.detach().numpy(),
        gradient=student.grad.numpy(),
    )


if __name__ == "__main__":
    main()
