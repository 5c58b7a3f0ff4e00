"""Solutions of 05, training without the lateral sum.

>>> check("5.2", of_eight)
Exercise 5.2: right. Eight runs often miss a share of three quarters: say the power before the
runs.
>>> check("5.3", blind)
Exercise 5.3: right. Blindness is not enough either: only one of them leaves every row's sum at
zero.
>>> check("5.4", turned)
Exercise 5.4: right. f is [0.045, -0.045], and the balanced rule sends [-0.032, 0.032]. Yet both
have the form J x.
"""

from scipy.stats import binom

from exercises import check  # noqa: F401, used in the examples


def kept(rule, full, none):
    """A ratio of means.

    >>> check("5.1", kept)
    Exercise 5.1: right. It can be above 1 (better than the exact pass) and negative (worse than
    untrained queries and keys).
    """
    return 1 - (rule.mean() - full.mean()) / (none.mean() - full.mean())


# Wilson's lower end is 0.41 for six of eight, and 0.53 for seven.
of_eight = 7, binom.pmf(7, 8, 0.75) + binom.pmf(8, 8, 0.75)

# A baseline that moves along with g: the two means of g over this row, weighted by attention or
# not. The running mean does not, since it was known before; a constant in g that lasts for many
# steps would reach it in the end.
blind = {"full", "mean", "diagonal_lateral", "diagonal_mean"}

# f raises the key with the larger g, the balanced rule the one with the larger (1 - a) g: a
# strongly attended key has nearly no say there.
turned = (0.9, 0.1), (1.0, 0.5)


def distorted_error(a, g):
    """J x = a x - a sum(a x): with a x = g it is what is wanted. So x = g / a, up to a constant.

    >>> check("5.5", distorted_error)
    Exercise 5.5: right. So it has the form J x. But see how large x is at a key that the query
    hardly looks at.
    """
    return g / a
