"""Solutions of 06, what can take the lateral sum's place.

>>> check("6.1", steps)
Exercise 6.1: right. The lateral sum differs from row to row: no memory of this kind can follow
it.
>>> check("6.2", blind)
Exercise 6.2: right. Blindness is not enough either: only one of them leaves every row's sum at
zero.
>>> check("6.3", turned)
Exercise 6.3: right. f is [0.045, -0.045], and the balanced rule sends [-0.032, 0.032]. Yet both
have the form J x.
"""

import math

from exercises import check  # noqa: F401, used in the examples

# Every step leaves a share ``decay`` of the gap: the first whole number of steps for which
# decay^n is at most 0.1, here 22 and 230.
steps = [math.ceil(math.log(0.1) / math.log(decay)) for decay in (0.9, 0.99)]

# A baseline that moves along with g: the two means of g over this row, weighted by attention or
# not. The running mean does not, since it was known before; a constant in g that lasts for many
# steps would reach it in the end.
blind = {"full", "mean", "diagonal_lateral", "diagonal_mean"}

# f raises the key with the larger g, the balanced rule the one with the larger (1 - a) g: a
# strongly attended key has nearly no say there.
turned = (0.9, 0.1), (1.0, 0.5)


def distorted_error(a, g):
    """J x = a x - a sum(a x): with a x = g it is what is wanted. So x = g / a, up to a constant.

    >>> check("6.4", distorted_error)
    Exercise 6.4: right. So it has the form J x. But see how large x is at a key that the query
    hardly looks at.
    """
    return g / a
