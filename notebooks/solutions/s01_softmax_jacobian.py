"""Solutions of 01, the softmax Jacobian by hand.

>>> check("1.4", against)
Exercise 1.4: right. The cosine is -0.23. A small step against d raises the loss.
"""

import torch

from exercises import check  # noqa: F401, used in the examples


def lateral_part(a, g):
    """The sum of a row, less the key's own term, weighed by the key's attention.

    >>> check("1.1", lateral_part)
    Exercise 1.1: right. Its rows do not sum to zero, nor do those of the diagonal part; together
    they do.
    """
    weighted = a * g
    return -a * (weighted.sum(-1, keepdim=True) - weighted)


def local_weights(s):
    """Sigmoid attention. Anything that grows and works element by element is right, exp included.

    >>> check("1.2", local_weights)
    Exercise 1.2: right. The price: rows sum to 1.26 and 1.55 where a softmax has 1. Keys do not
    compete: a query without a match can attend to nothing, one with many to all of them.
    """
    return torch.sigmoid(s - torch.tensor(s.shape[-1]).log())


def best_constant(a, g):
    """Least squares: with u = a (1 - a), the multiple c u that is closest to u g - f.

    >>> check("1.3", best_constant)
    Exercise 1.3: right. It is neither b nor the plain mean: the factor 1-a has moved it.
    """
    u, f = a * (1 - a), a * (g - (a * g).sum())
    return (u * (u * g - f)).sum() / (u * u).sum()


# Small differences on top of a large negative constant. f sees the differences only: a step against
# it lowers the first key's score and raises the others'. d is swayed by the constant: a step
# against it raises all scores, and most that of the key with the largest a (1 - a), the first.
against = [-98.0, -100.0, -101.0]
