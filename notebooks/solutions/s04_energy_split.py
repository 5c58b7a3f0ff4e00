"""Solutions of 04, how much of the gradient is lateral.

>>> check("4.2", low_temperature)
Exercise 4.2: right. Both d and f vanish, but not their angle: it hangs on two errors, common
mode included.
"""

from exercises import check  # noqa: F401, used in the examples
from helpers import split_softmax_gradient


def energy_ratios(a, g):
    """Energies first, over the batch, then ratios. (A sum will do: the number cancels.)

    >>> check("4.1", energy_ratios)
    Exercise 4.1: right. They sum to 1, and the largest sequence has most of the say.
    """
    f, d, o = split_softmax_gradient(a, g)
    energy = (f * f).sum()
    return (d * d).sum() / energy, (o * o).sum() / energy, 2 * (d * o).sum() / energy


# With a = (1 - e, e, 0, 0) and e going to zero, d = e (3, 1) and f = e (3 - 1) (1, -1) at the two
# best keys: e drops out. The cosine is 1 for opposite errors and falls towards 0 as they become
# equal.
low_temperature = (3 - 1) / (2 * (3**2 + 1**2)) ** 0.5


def local_rule(a, g, mean):
    """The diagonal rule, without what all errors of the row share. Without the slope it were worse.

    >>> check("4.3", local_rule)
    Exercise 4.3: right. Its mean cosine with f is 0.91, where that of the diagonal part is 0.39.
    """
    return a * (1 - a) * (g - mean)
