"""Solutions of 01, the softmax Jacobian by hand.

The answers that are not functions:

>>> check("1.4", against)
Exercise 1.4: right. The cosine is -0.23. A step along d undoes what a step along f does.
>>> check("1.4", [2.0, 0.0, -1.0])
Exercise 1.4: not right yet. The cosine of d with f is 0.88, and should be below -0.2.
>>> check("1.4", [-1, -1, -1])
Exercise 1.4: not right yet. All of its entries are the same: f is zero, and has no direction.
>>> check("1.4", [[1, 2, 3]])
Exercise 1.4: not right yet. The shape of the answer is (1, 3) and should be (3,).
>>> check("1.4", "downwards")
Exercise 1.4: not right yet. Numbers are wanted here, and the answer is 'downwards' (str).
"""

import torch

from exercises import check  # noqa: F401, used in the examples


def lateral_part(a, g):
    """Everything that the sum of a row knows, less the key's own term, weighed by the key's attention.

    >>> check("1.1", lateral_part)
    Exercise 1.1: right. Its rows do not sum to zero, and neither do those of the diagonal part;
    together they do.

    Wrong in typical ways:

    >>> check("1.1", lambda a, g: a * (1 - a) * g)
    Exercise 1.1: not right yet. This is the diagonal part, what a key can do by itself. The other part
    is wanted.
    >>> check("1.1", lambda a, g: a * ((a * g).sum(-1, keepdim=True) - a * g))
    Exercise 1.1: not right yet. The sign is off: what the others gain, this key has to lose.
    >>> check("1.1", lambda a, g: a * (g - g.sum(-1, keepdim=True)))
    Exercise 1.1: not right yet. On a = [0.5, 0.25, 0.25], g = [1, 2, 4] it gives [-3, -1.25, -0.75]
    instead of [-0.75, -0.375, -0.25].
    >>> check("1.1", lambda a, g: a * (g - (a * g).sum(-1, keepdim=True)))
    Exercise 1.1: not right yet. This is the whole of f: its rows sum to zero. What a key can do by
    itself has to go.
    >>> check("1.1", lambda a, g: -a * (a * g).sum(-1, keepdim=True))
    Exercise 1.1: not right yet. The sum runs over the *other* keys; yours takes in the key's own term,
    too.
    >>> check("1.1", lambda a, g: a * g - (a * g).sum(-1, keepdim=True))
    Exercise 1.1: not right yet. The sum is right, but each key weighs it by its own attention: a factor
    a is missing.
    >>> check("1.1", lambda a, g: a * (a * g - (a * g).sum()))
    Exercise 1.1: not right yet. Right for one row, wrong for several: each row has a sum of its own,
    over the last axis.
    >>> check("1.1", lambda a, g: (a * g).sum(-1))
    Exercise 1.1: not right yet. The shape of the result for rows of shape (3,) is () and should be
    (3,).
    >>> check("1.1", lambda a: a)
    Exercise 1.1: not right yet. It raised TypeError: <lambda>() takes 1 positional argument but 2 were
    given, on a = [0.5, 0.25, 0.25], g = [1, 2, 4].
    >>> check("1.1", lambda a, g: a.mul_(g))
    Exercise 1.1: not right yet. It changes its input a, which others may still need. Operations with a
    trailing underscore, `*=` and assignments to elements do so: compute something new instead.
    """
    weighted = a * g
    return -a * (weighted.sum(-1, keepdim=True) - weighted)


def local_weights(s):
    """Sigmoid attention. Anything that works element by element and grows is right, the exponential included.

    >>> check("1.2", local_weights)
    Exercise 1.2: right. The price: rows sum to 1.26 and 1.55 where a softmax has 1. Keys no longer
    compete, and a query without a match can attend to nothing, or one with many to all of them.
    >>> check("1.2", torch.exp)
    Exercise 1.2: right. The price: rows sum to 10.69 and 58.37 where a softmax has 1. Keys no longer
    compete, and a query without a match can attend to nothing, or one with many to all of them.
    >>> check("1.2", lambda s: s.softmax(-1))
    Exercise 1.2: not right yet. The score of key 0 rises, and in row 0 the weight of key 2 moves by
    -0.052: an off-diagonal entry of the Jacobian. What is it that ties the keys?
    >>> check("1.2", torch.relu)
    Exercise 1.2: not right yet. Attention weights are positive here, and s = [[0.3, -1.2, 2, 0.5], [-3,
    1, 0, 4]] gives [[0.3, 0, 2, 0.5], [0, 1, 0, 4]].
    >>> check("1.2", torch.ones_like)
    Exercise 1.2: not right yet. The score of key 0 rises by 0.5, and its own weight does not grow in
    every row.
    """
    return torch.sigmoid(s - torch.tensor(s.shape[-1]).log())


def best_constant(a, g):
    """Least squares: with u = a (1 - a), the multiple c u that is closest to u g - f.

    >>> check("1.3", best_constant)
    Exercise 1.3: right. So the best constant is in general neither b nor the plain mean: the factor 1-a
    has moved it.
    >>> check("1.3", lambda a, g: (a * g).sum())
    Exercise 1.3: not right yet. On a = [0.7, 0.2, 0.1], g = [1, 2, 4] your c is 1.500 (the lateral sum
    b). There the distance to f is 0.2471, and at 1.600 it is smaller.
    >>> check("1.3", lambda a, g: g.mean())
    Exercise 1.3: not right yet. On a = [0.7, 0.2, 0.1], g = [1, 2, 4] your c is 2.333 (the plain mean
    of g). There the distance to f is 0.1960, and at 2.233 it is smaller.
    >>> check("1.3", lambda a, g: g)
    Exercise 1.3: not right yet. The shape of the constant is (3,) and should be that of a single
    number, ().
    """
    u, f = a * (1 - a), a * (g - (a * g).sum())
    return (u * (u * g - f)).sum() / (u * u).sum()


# What f wants, raise the first key's score and lower the last one's, on top of a large negative constant.
#
# f sees the differences only. d is swayed by the constant, and most at the key with the largest a (1 - a), the first.
against = [-98.0, -100.0, -101.0]
