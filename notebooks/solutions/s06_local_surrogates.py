"""Solutions of 06, what can take the lateral sum's place.

The answers that are not functions:

>>> steps
[22, 230]
>>> check("6.1", steps)
Exercise 6.1: right. The lateral sum is another one in every row of every sequence: no memory of
this kind can follow it.
>>> check("6.1", (21, 229))
Exercise 6.1: not right yet. At a decay of 0.9, after 21 steps it is just below 0.9.
>>> check("6.1", (9, 90))
Exercise 6.1: not right yet. At a decay of 0.9 it is not 9. How much of the gap is left after one
step, and two?
>>> check("6.1", 22)
Exercise 6.1: not right yet. The shape of the pair of steps is () and should be (2,).
>>> check("6.1", "22, 230")
Exercise 6.1: not right yet. Numbers are wanted here, and the pair of steps is '22, 230' (str).

>>> check("6.2", blind)
Exercise 6.2: right. Blindness to the common mode is not enough either: only one of them leaves
every row's sum at zero.
>>> check("6.2", {"full"})
Exercise 6.2: not right yet. Nothing in it is wrong, but it is not complete: 3 more are blind to it.
>>> check("6.2", blind | {"running"})
Exercise 6.2: not right yet. running was tried with g and with g + 5, and sends something else. Does
its baseline move along?
>>> check("6.2", ["lateral"])
Exercise 6.2: not right yet. 'lateral' is none of zero, diagonal, running, diagonal_running, mean,
diagonal_mean, full, diagonal_lateral.
>>> check("6.2", 4)
Exercise 6.2: not right yet. A set of names is wanted here, and this is 4 (int).

>>> check("6.3", turned)
Exercise 6.3: right. f is [0.045, -0.045], and the balanced rule sends [-0.032, 0.032]. Yet both
have the form J x.
>>> check("6.3", ((0.5, 0.5), (1.0, -1.0)))
Exercise 6.3: not right yet. They point the same way: f is [0.5, -0.5], the balanced rule sends
[0.25, -0.25].
>>> check("6.3", ((0.9, 0.1), (1.0, 1.0)))
Exercise 6.3: not right yet. One of the two is zero: f is [0, 0], the balanced rule sends [-0.072,
0.072].
>>> check("6.3", ((9, 1), (1.0, 0.5)))
Exercise 6.3: not right yet. a should be two positive weights that sum to 1, and it is [9, 1].
>>> check("6.3", (0.9, 0.1))
Exercise 6.3: not right yet. The shape of the pair (a, g) is (2,) and should be (2, 2).
"""

import math

from exercises import check  # noqa: F401, used in the examples

# Every step leaves a share ``decay`` of the gap: the first whole number of steps for which decay^n is at most 0.1.
steps = [math.ceil(math.log(0.1) / math.log(decay)) for decay in (0.9, 0.99)]

# A baseline that moves along with g: the two means of g over this row, weighted by attention or not. The running mean
# does not, since it was known before; a constant in g that lasts for many steps would reach it in the end.
blind = {"full", "mean", "diagonal_lateral", "diagonal_mean"}

# f raises the key with the larger g, the balanced rule the one with the larger (1 - a) g: a strongly attended key has
# nearly no say there.
turned = (0.9, 0.1), (1.0, 0.5)


def distorted_error(a, g):
    """J x = a x - a sum(a x): with a x = g it is what is wanted. So x = g / a, up to a constant.

    >>> check("6.4", distorted_error)
    Exercise 6.4: right. So it has the form J x. But see how large x is at a key that the query hardly
    looks at.
    >>> check("6.4", lambda a, g: g / a - 7)
    Exercise 6.4: right. So it has the form J x. But see how large x is at a key that the query hardly
    looks at.
    >>> check("6.4", lambda a, g: g - a * g.sum(-1, keepdim=True))
    Exercise 6.4: not right yet. This is what the balanced rule sends, J x. The error x that J makes it
    of is wanted.
    >>> check("6.4", lambda a, g: (1 - a) * g)
    Exercise 6.4: not right yet. On a = [0.5, 0.25, 0.25], g = [1, 2, 4] your x is [0.5, 1.5, 3]: J x is
    [-0.438, 0.031, 0.406], and should be [-2.5, 0.25, 2.25].
    >>> check("6.4", lambda a, g: g / (a - a))
    Exercise 6.4: not right yet. There are NaNs or infinities in x for rows of shape (3,).
    >>> check("6.4", lambda a, g: g.sum() / a.sum())
    Exercise 6.4: not right yet. The shape of x for rows of shape (3,) is () and should be (3,).
    """
    return g / a
