"""Solutions of 02, training with random feedback.

>>> check("2.2", same_direction)
Exercise 2.2: right. Adam, which divides by a gradient's size, trains these alike whatever the
scale. Below, paths with one feedback matrix and with three meet: scale decides their mix.
"""

import torch

from exercises import check  # noqa: F401, used in the examples


def feedback_alignment(x, W, B, grad_y):
    """The error goes back through B; the weight learns by an outer product, summed over positions.

    >>> check("2.1", feedback_alignment)
    Exercise 2.1: right. B is in one place only: in what x is told. The weight's update is
    backpropagation's.
    """
    return grad_y @ B, grad_y.flatten(0, -2).T @ x.flatten(0, -2)


# On the way back to these there is one path only, with 0, 1, 1, 2 and 3 feedback matrices: twice
# the feedback makes the gradient 1, 2, 2, 4 and 8 times as long. From the residual stream before
# the MLP onwards the error is a sum: one part came through ``lm_head`` alone, another through
# ``down_proj`` and ``up_proj`` as well. The first doubles, the second becomes eight times as
# large: their sum turns.
same_direction = {"lm_head", "ln_f", "down_proj", "up_proj", "ln_2"}


def always_helps(W, B):
    """(dy W) . (dy B) = dy (W B^T) dy^T, positive for every dy where its symmetric part is.

    >>> check("2.3", always_helps)
    Exercise 2.3: right. Lillicrap et al. ask it of the errors that occur. B is fixed: W has to come
    to meet it.
    """
    form = W @ B.T
    return bool((torch.linalg.eigvalsh(form + form.T) > 0).all())
