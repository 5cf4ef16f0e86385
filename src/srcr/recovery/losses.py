"""How far a student's predictions are from its teacher's, for training: each a function of log probabilities
[n, positions, vocabulary], of the teacher and the student, whose result is [n, positions]."""

from collections.abc import Callable

from torch import Tensor

#: ``(teacher, student)`` log probabilities -> the loss of each position.
Loss = Callable[[Tensor, Tensor], Tensor]


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student): what is measured."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def cakld(teacher: Tensor, student: Tensor) -> Tensor:
    """Forward and reverse KL, the forward one weighted by how sure the teacher is on average
    (confidence-aware KL: BitDistiller, arXiv 2402.10631, section 3.3)."""
    difference = teacher - student
    sure = teacher.amax(-1).exp().mean()
    forward = (teacher.exp() * difference).sum(-1)
    return sure * forward - (1 - sure) * (student.exp() * difference).sum(-1)


LOSSES: dict[str, Loss] = {"kl": forward_kl, "cakld": cakld}
