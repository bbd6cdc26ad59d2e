"""What the libraries that we stand in for agree on, and kdkernels writes otherwise."""

from __future__ import annotations

from kdkernels.divergences import Divergence, forward_kl, jsd, reverse_kl
from kdkernels.scalars import number

BETA = "a number in [0, 1]: 0 is KL(teacher, student), 1 is KL(student, teacher), in between the Jensen-Shannon divergence"


def divergence_of_beta(beta: float) -> Divergence:
    """The divergence that Liger and TRL mean by ``beta``, after GKD (arXiv 2306.13649).

    In (0, 1) it is beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, p the teacher, q the student. At the
    ends that formula vanishes, and a KL divergence stands in its place: no limit of the formula, a convention.

    Raises TypeError or ValueError that names beta.
    """
    number("beta", beta, BETA, 0.0, 1.0)
    return forward_kl() if beta == 0 else reverse_kl() if beta == 1 else jsd(float(beta))
