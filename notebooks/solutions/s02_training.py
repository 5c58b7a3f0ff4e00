"""Solutions of 02, training with local rules.

The answers that are not functions:

>>> check("2.2", same_direction)
Exercise 2.2: right. Adam, which divides by a gradient's size, trains these alike whatever the
scale. Further down, paths with one feedback matrix and with three meet in the residual stream, and
the scale decides how they mix.
>>> check("2.2", ["lm_head.weight", "ln_f.weight", "mlp.down_proj", "mlp.up_proj", "ln_2"])
Exercise 2.2: right. Adam, which divides by a gradient's size, trains these alike whatever the
scale. Further down, paths with one feedback matrix and with three meet in the residual stream, and
the scale decides how they mix.
>>> check("2.2", {"lm_head"})
Exercise 2.2: not right yet. Nothing in it is wrong, but it is not complete: 4 more keep their
direction.
>>> check("2.2", {"lm_head", "o_proj"})
Exercise 2.2: not right yet. The gradient of o_proj does turn. Errors reach it on several paths: how
many feedback matrices are on each?
>>> check("2.2", {"lm_head", "mlp"})
Exercise 2.2: not right yet. 'mlp' is none of lm_head, ln_f, down_proj, up_proj, ln_2, o_proj,
v_proj, token_embedding.
"""

import torch

from exercises import check  # noqa: F401, used in the examples


def feedback_alignment(x, W, B, grad_y):
    """The error goes back through B; the weight is corrected by the outer product, summed over all positions.

    >>> check("2.1", feedback_alignment)
    Exercise 2.1: right. B appears in one place only: in what x is told. The weight's own update is that
    of backpropagation.
    >>> check("2.1", lambda x, W, B, grad_y: (grad_y @ W, torch.einsum("bto,bti->oi", grad_y, x)))
    Exercise 2.1: not right yet. grad_x is backpropagation's: it has travelled through W, which is what
    feedback alignment avoids.
    >>> check("2.1", lambda x, W, B, grad_y: (grad_y @ B, torch.einsum("bto,bti->io", grad_y, x)))
    Exercise 2.1: not right yet. grad_W has the shape (4, 5), and should have that of W, which is (5,
    4).
    >>> check("2.1", lambda x, W, B, grad_y: (grad_y @ B, grad_y.mT @ x))
    Exercise 2.1: not right yet. The shape of grad_W for W of shape (5, 4) is (2, 5, 4) and should be
    (5, 4).
    >>> check("2.1", lambda x, W, B, grad_y: (grad_y @ B, (grad_y.mT @ x).mean(0)))
    Exercise 2.1: not right yet. grad_W is a mean over the sequences. All of them pull at the weight
    together: it is a sum.
    >>> check("2.1", lambda x, W, B, grad_y: (x, grad_y))
    Exercise 2.1: not right yet. grad_x is not right: which matrix carries the error back, and along
    which of its axes?
    >>> check("2.1", lambda x, W, B, grad_y: (grad_y @ B, B))
    Exercise 2.1: not right yet. grad_W is not right. It is the same in all rules: an outer product,
    summed over all positions.
    >>> check("2.1", lambda x, W, B, grad_y: grad_y @ B)
    Exercise 2.1: not right yet. Two things are wanted here, grad_x and grad_W, and this is Tensor of
    shape (2, 3, 4).
    >>> check("2.1", lambda x, W, B: (grad_y @ B, grad_y))
    Exercise 2.1: not right yet. It raised TypeError: <lambda>() takes 3 positional arguments but 4 were
    given, on x = Tensor of shape (2, 3, 4), W = Tensor of shape (5, 4), B = Tensor of shape (5, 4),
    grad_y = Tensor of shape (2, 3, 5).
    """
    return grad_y @ B, grad_y.flatten(0, -2).T @ x.flatten(0, -2)


# On the way back to these there is one path only, with 0, 1, 1, 2 and 3 feedback matrices: twice the feedback makes
# the gradient 1, 2, 2, 4 and 8 times as long. From the residual stream before the MLP onwards the error is a sum: one
# part came through ``lm_head`` alone, another through ``down_proj`` and ``up_proj`` as well. The first doubles, the
# second becomes eight times as large, and their sum turns.
same_direction = {"lm_head", "ln_f", "down_proj", "up_proj", "ln_2"}


def always_helps(W, B):
    """(dy W) . (dy B) = dy (W B^T) dy^T, a quadratic form: positive for every dy where its symmetric part is.

    >>> check("2.3", always_helps)
    Exercise 2.3: right. Lillicrap et al. ask it of the errors that occur. B is fixed, so W has to come
    to meet it.

    A positive cosine of the two matrices does not do, and neither do the eigenvalues of W B^T itself:

    >>> check("2.3", lambda W, B: (W * B).sum() > 0)
    Exercise 2.3: not right yet. You say True for W = [[1, 0], [0, 1]] and B = [[1, 0], [0, -0.1]]. But
    dy = [-0.092, -1] sends back dy W = [-0.092, -1] and dy B = [-0.092, 0.1]: more than 90 degrees
    apart.
    >>> check("2.3", lambda W, B: (torch.linalg.eigvals(W @ B.T).real > 0).all())
    Exercise 2.3: not right yet. You say True for W = [[1, 0], [0, 1]] and B = [[1, 10], [0, 1]]. But dy
    = [-0.804, 1] sends back dy W = [-0.804, 1] and dy B = [-0.804, -7.036]: more than 90 degrees apart.
    >>> check("2.3", lambda W, B: (W == B).all())
    Exercise 2.3: not right yet. You say False for W = [[1, 0], [0, 1]] and B = [[0.5, -0.866], [0.866,
    0.5]]. But of 20,000 random dy none has dy B more than 90 degrees from dy W.
    >>> check("2.3", lambda W, B: W @ B.T)
    Exercise 2.3: not right yet. True or False is wanted here, and for W = [[0.126, -0.132, 0.64],
    [0.105, -0.536, 0.362]] and B = [[0.126, -0.132, 0.64], [0.105, -0.536, 0.362]] it gives [[0.443,
    0.316], [0.316, 0.429]].
    """
    form = W @ B.T
    return bool((torch.linalg.eigvalsh(form + form.T) > 0).all())
