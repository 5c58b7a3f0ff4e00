"""Solutions of 05, the verdict.

>>> check("5.2", doubtful)
Exercise 5.2: right. Its harm is 0.12 [-0.20, 0.49]: costly. Five such seeds leave it open
whether the rule is harmless.
>>> check("5.4", adding_up)
Exercise 5.4: right. It was 0.8 at every iteration, and after 100 of them only one rule has gone
astray.
"""

import numpy as np
from scipy.stats import t

from exercises import check  # noqa: F401, used in the examples


def my_harm(rule, full, none):
    """A ratio of means.

    >>> check("5.1", my_harm)
    Exercise 5.1: right. It can be negative (better than the exact pass) and above 1 (worse than
    untrained queries and keys).
    """
    return (rule.mean() - full.mean()) / (none.mean() - full.mean())


# Four seeds as good as the exact pass, and one that has failed: 0.12 on average, and who knows
# about the next one.
doubtful = [2.0, 2.1, 1.9, 2.0, 2.7]


def is_inside(h, rule, full, none):
    """A t test of whether the mean of the differences could be zero.

    >>> check("5.3", is_inside)
    Exercise 5.3: right. All that is uncertain is a mean of differences: no ratio had to be trusted.
    """
    difference = (rule - full) - h * (none - full)
    n = len(difference)
    return abs(difference.mean()) <= t.ppf(0.975, n - 1) * difference.std(ddof=1) / np.sqrt(n)


# The exact part adds up to 100 in both. The constant error adds up to 75; the random ones, at
# right angles to each other on average, to 0.75 times the root of 100, which is 7.5.
adding_up = 0.8, 100 / np.hypot(100, 0.75 * np.sqrt(100))
