"""Solutions of 06, what helps."""

from exercises import check  # noqa: F401, used in the examples


def behind_a_cap(s, sent, c):
    """The factors c and 1/c cancel.

    >>> check("6.1", behind_a_cap)
    Exercise 6.1: right. Beyond the cap next to nothing arrives: a score that has run far is pushed
    no further.
    """
    return sent * (1 - (s / c).tanh() ** 2)


def tangent_part(q, dq):
    """What lies along q, over the squared length of q, is how much of q there is in dq.

    >>> check("6.2", tangent_part)
    Exercise 6.2: right. That takes one sum over the channels of a query, and nothing of its keys.
    """
    along = (q * dq).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True)
    return dq - along * q
