"""Solutions of 05, the verdict.

The answers that are not functions:

>>> check("5.2", doubtful)
Exercise 5.2: right. Its harm is 0.12 [-0.20, 0.49]: costly. Five such seeds leave it open whether
the rule is harmless.
>>> check("5.2", [2.1, 2.2, 2.0, 2.1, 2.2])
Exercise 5.2: not right yet. Its harm is 0.10 [0.09, 0.11]: tolerable, since all of the interval is
below 0.25. What widens an interval?
>>> check("5.2", [2.5, 2.6, 2.4, 2.5, 2.6])
Exercise 5.2: not right yet. Its harm is 0.50, and should be below 0.25.
>>> check("5.2", [2.0, 2.1, 1.9, 2.0])
Exercise 5.2: not right yet. The shape of the answer is (4,) and should be (5,).
>>> check("5.2", [2.0, 2.1, 1.9, 2.0, float("nan")])
Exercise 5.2: not right yet. There are NaNs or infinities in the answer.

>>> check("5.4", adding_up)
Exercise 5.4: right. The cosine was 0.8 at every iteration, and after 100 of them one rule has gone
astray, the other not.
>>> check("5.4", (0.8, 0.8))
Exercise 5.4: not right yet. With a random error it is not 0.8. How long is the sum of 100 such
errors?
>>> check("5.4", (0.8, 1.0))
Exercise 5.4: not right yet. With a random error the cosine is not quite 1: how long is the sum of
100 such errors?
>>> check("5.4", adding_up[::-1])
Exercise 5.4: not right yet. These are the right numbers in the wrong order: the constant error
comes first.
>>> check("5.4", 0.8)
Exercise 5.4: not right yet. The shape of the pair of cosines is () and should be (2,).
"""

import numpy as np
from scipy.stats import t

from exercises import check  # noqa: F401, used in the examples


def my_harm(rule, full, none):
    """A ratio of means.

    >>> check("5.1", my_harm)
    Exercise 5.1: right. It can be negative (better than the exact pass) and above 1 (worse than
    untrained queries and keys).
    >>> check("5.1", lambda rule, full, none: np.mean((rule - full) / (none - full)))
    Exercise 5.1: not right yet. This is the mean of the seeds' ratios. A seed with a small denominator
    would decide it all.
    >>> check("5.1", lambda rule, full, none: (full - rule).mean() / (none - full).mean())
    Exercise 5.1: not right yet. Its sign is off: a rule that is worse than full does harm.
    >>> check("5.1", lambda rule, full, none: (none - rule).mean() / (none - full).mean())
    Exercise 5.1: not right yet. This is the share of the gain that is *left*: full has harm 0, none has
    harm 1.
    >>> check("5.1", lambda rule, full, none: (rule - full).mean())
    Exercise 5.1: not right yet. On rule = [2.2, 2.5, 2.8], full = [2, 2, 2], none = [3, 3.5, 4] it
    gives 0.500, and the harm is 0.333.
    >>> check("5.1", lambda rule, full, none: (rule - full) / (none - full))
    Exercise 5.1: not right yet. The shape of harm is (3,) and should be that of a single number, ().
    """
    return (rule.mean() - full.mean()) / (none.mean() - full.mean())


# Four seeds as good as the exact pass, and one that has failed: 0.12 on average, and who knows about the next one.
doubtful = [2.0, 2.1, 1.9, 2.0, 2.7]


def is_inside(h, rule, full, none, quantile=None, ddof=1):
    """A t test of whether the mean of the differences could be zero.

    >>> check("5.3", is_inside)
    Exercise 5.3: right. All that is uncertain is the mean of one set of differences: no ratio had to be
    trusted.
    >>> check("5.3", lambda *args: is_inside(*args, quantile=1.96))
    Exercise 5.3: not right yet. The interval is a little off, as it would be with a normal's 1.96,
    where 5 seeds have a t of 2.78.
    >>> check("5.3", lambda *args: is_inside(*args, ddof=0))
    Exercise 5.3: not right yet. The interval is a little off, as it would be with a standard deviation
    that divides by n, not n - 1.
    >>> check("5.3", lambda h, *args: is_inside(h, *args, quantile=t.ppf(0.95, len(args[0]) - 1)))
    Exercise 5.3: not right yet. The interval is a little off, as it would be with a one-sided quantile:
    95 % leave 2.5 % at each side.
    >>> check("5.3", lambda h, *args: True)
    Exercise 5.3: not right yet. On rule = [2.549, 2.617, 2.659, 2.44, 2.32], full = [1.95, 1.991,
    1.832, 1.989, 1.822], none = [2.939, 2.932, 3.032, 3.052, 3.051] the interval is [0.39, 0.74], and
    you say True for 0.03.
    >>> check("5.3", lambda h, *args: h)
    Exercise 5.3: not right yet. True or False is wanted here, and for h = 0.553 it gives
    0.5534490369943535 (float).
    """
    difference = (rule - full) - h * (none - full)
    n = len(difference)
    quantile = quantile or t.ppf(0.975, n - 1)
    return abs(difference.mean()) <= quantile * difference.std(ddof=ddof) / np.sqrt(n)


# The exact part adds up to 100 in both. The constant error adds up to 75; the random ones, at right angles to each
# other on average, to 0.75 times the root of 100, which is 7.5.
adding_up = 0.8, 100 / np.hypot(100, 0.75 * np.sqrt(100))
