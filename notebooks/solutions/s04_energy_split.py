"""Solutions of 04, how much of the gradient is lateral.

The answers that are not functions:

>>> check("4.2", low_temperature)
Exercise 4.2: right. Both d and f vanish, but not their angle: it hangs on the errors of two keys,
common mode included.
>>> check("4.2", 0)
Exercise 4.2: not right yet. It is another number. Which two keys still have a say when all others
have lost theirs?
>>> check("4.2", 0.816)
Exercise 4.2: not right yet. That is the cosine at scores times 1. It goes on changing from there.
>>> check("4.2", 2)
Exercise 4.2: not right yet. A cosine lies between -1 and 1, and this is 2.
"""

from exercises import check  # noqa: F401, used in the examples
from helpers import split_softmax_gradient


def energy_ratios(a, g):
    """Energies first, over the whole batch, then ratios. (A sum over sequences will do: their number cancels.)

    >>> check("4.1", energy_ratios)
    Exercise 4.1: right. They sum to 1, and the largest sequence has most of the say: here r_diag is
    0.93.
    >>> check("4.1", lambda a, g: [sum(r) / len(a) for r in zip(*map(energy_ratios, a, g))])
    Exercise 4.1: not right yet. This is the mean of the sequences' ratios. Average the energies first,
    then divide.
    >>> check("4.1", lambda a, g: (energy_ratios(a, g)[0], 1 - energy_ratios(a, g)[0], 0.0))
    Exercise 4.1: not right yet. Your r_offdiag is 1 - r_diag, which takes in the cross term and is no
    energy.
    >>> check("4.1", lambda a, g: (*energy_ratios(a, g)[:2], energy_ratios(a, g)[2] / 2))
    Exercise 4.1: not right yet. r_cross is -0.219 on this case and should be -0.439. It is half of
    that.
    >>> check("4.1", lambda a, g: [abs(ratio) ** 0.5 for ratio in energy_ratios(a, g)])
    Exercise 4.1: not right yet. r_diag is 0.963 on this case and should be 0.928. It is the root of
    that: an energy is a square.
    >>> check("4.1", lambda a, g: energy_ratios(a, g)[0])
    Exercise 4.1: not right yet. The shape of the triple of ratios is () and should be (3,).
    """
    f, d, o = split_softmax_gradient(a, g)
    energy = (f * f).sum()
    return (d * d).sum() / energy, (o * o).sum() / energy, 2 * (d * o).sum() / energy


# With a = (1 - e, e, 0, 0) and e going to zero, d = e (3, 1) and f = e (3 - 1) (1, -1) at the two best keys: e drops
# out. The cosine is 1 for opposite errors and 0 for equal ones.
low_temperature = (3 - 1) / (2 * (3**2 + 1**2)) ** 0.5


def local_rule(a, g, mean):
    """The diagonal rule, without what all errors of the row have in common. Without the slope it would be worse.

    >>> check("4.3", local_rule)
    Exercise 4.3: right. Its mean cosine with f is 0.91, where that of the diagonal part is 0.39.
    >>> check("4.3", lambda a, g, mean: a * (1 - a) * g)
    Exercise 4.3: not right yet. Its mean cosine with f is 0.39 here, and should be at least 0.85.
    >>> check("4.3", lambda a, g, mean: a * (g - mean))
    Exercise 4.3: not right yet. Its mean cosine with f is 0.78 here, and should be at least 0.85.
    >>> check("4.3", lambda a, g, mean: a * (g - (a * g).sum(-1, keepdim=True)))
    Exercise 4.3: not right yet. It looks at other keys: when half of them are taken away, it sends
    something else to the rest.
    >>> check("4.3", lambda a, g, mean: 0 * a)
    Exercise 4.3: not right yet. It sends nothing.
    >>> check("4.3", lambda a, g, mean: a / 0)
    Exercise 4.3: not right yet. There are NaNs or infinities in the result for 50 sequences of 78
    visible pairs.
    """
    return a * (1 - a) * (g - mean)
