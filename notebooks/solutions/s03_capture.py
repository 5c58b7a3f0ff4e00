"""Solutions of 03, capturing attention and its gradient.

The answers that are not functions:

>>> check("3.3", effects)
Exercise 3.3: right. The last kind is the dangerous one: whoever writes to what was captured should
take a copy first.
>>> check("3.3", effects | {"attn.mul_(0)": "silent"})
Exercise 3.3: not right yet. attn.mul_(0) was tried, and is not of the kind 'silent': it writes to
the memory that the backward pass reads, and PyTorch notices.
>>> check("3.3", effects | {"attn.double().mul_(0)": "error"})
Exercise 3.3: not right yet. attn.double().mul_(0) was tried, and is not of the kind 'error': it
makes a tensor of its own and writes, if at all, there.
>>> check("3.3", effects | {"attn * 0": ...})
Exercise 3.3: not answered yet.
>>> check("3.3", effects | {"attn * 0": "fine"})
Exercise 3.3: not right yet. 'fine' is none of harmless, error, silent.
>>> check("3.3", {"attn * 0": "harmless"})
Exercise 3.3: not right yet. attn.mul_(0) is missing.
>>> check("3.3", "harmless")
Exercise 3.3: not right yet. A dict from operation to effect is wanted here, and this is 'harmless'
(str).
"""

from exercises import check  # noqa: F401, used in the examples
from helpers import capture_batch, split_softmax_gradient  # noqa: F401, used in the examples
from model_local import AttentionWeights


def lateral_sum(output, d_output, n_head):
    """Every head has its own stretch of the channels; the sum over keys is a product within it.

    >>> check("3.1", lateral_sum)
    Exercise 3.1: right. No attention weight was needed, and no other key: the query had it all.
    >>> check("3.1", lambda O, dO, n_head: (O * dO).sum(-1))
    Exercise 3.1: not right yet. That is one number a query. There are two heads, and each has a lateral
    sum of its own.
    >>> check("3.1", lambda O, dO, n_head: (O * dO).unflatten(-1, (n_head, -1)).sum(-1))
    Exercise 3.1: not right yet. The shape is (3, 5, 2), which is (B, T, H), and should be (B, H, T):
    swap the last two axes.
    >>> check("3.1", lambda O, dO, n_head: (O * dO).view(len(O), n_head, O.shape[1], -1).sum(-1))
    Exercise 3.1: not right yet. The channels are cut as if all of head 0 came first. In memory the
    heads sit side by side in every position: cut the last axis in two, then swap axes.
    >>> check("3.1", lambda O, dO, n_head: (O * dO).unflatten(-1, (-1, n_head)).sum(-2).mT)
    Exercise 3.1: not right yet. The shape is right, the numbers are not. Wanted is the inner product of
    O and dO over the channels of a head: are they this head's, and is it a sum?
    >>> check("3.1", lambda O, dO, n_head: O * dO)
    Exercise 3.1: not right yet. The shape of b is (3, 5, 8) and should be (3, 2, 5).
    """
    return (output * d_output).unflatten(-1, (n_head, -1)).sum(-1).transpose(1, 2)


def capture(model, x, y):
    """A forward hook asks the very tensor that goes on for its gradient; whatever happens, the handles are removed.

    >>> check("3.2", capture)
    Exercise 3.2: right. And no hook is left behind, not even after an error.

    A copy that asks for its gradient, handles that are lost to an error, and handles that nobody kept:

    >>> check("3.2", capture_copies)
    Exercise 3.2: not right yet. There is None in the list: the tensor that was asked is not the one
    that the forward pass used.
    >>> check("3.2", capture_unsafely)
    Exercise 3.2: not right yet. All is well until the model raises an error: then a hook is left behind
    on blocks.0.attn.attn_weights. What stands after `finally` is done in any case.
    >>> check("3.2", lambda model, x, y: capture_unsafely(model, x, y, remove=False))
    Exercise 3.2: not right yet. The gradients are right. But a hook is left behind on
    blocks.0.attn.attn_weights.
    >>> check("3.2", lambda model, x, y: capture(model, x, y)[::-1])
    Exercise 3.2: not right yet. The layers come in the order in which the backward pass meets them: the
    last one first.
    >>> check("3.2", lambda model, x, y: capture(model, x, y)[0])
    Exercise 3.2: not right yet. The model has two layers: a list of two tensors is wanted, and this is
    Tensor of shape (3, 2, 5, 5).
    >>> check("3.2", lambda model, x, y: [attn for attn, grad in attn_and_grad(model, x, y)])
    Exercise 3.2: not right yet. These are the attention weights. Their gradient is wanted.
    >>> check("3.2", lambda model, x, y: [split_softmax_gradient(*maps).full for maps in attn_and_grad(model, x, y)])
    Exercise 3.2: not right yet. This is the error at the scores, before the softmax. That at the
    attention weights is wanted.
    >>> check("3.2", lambda model, x, y: [2 * grad for grad in capture(model, x, y)])
    Exercise 3.2: not right yet. In layer 0 it is not the gradient at the attention weights that was
    captured here.
    """
    kept, handles = [], []

    def hook(module, inputs, attn):
        attn.retain_grad()
        kept.append(attn)

    try:
        for module in model.modules():
            if isinstance(module, AttentionWeights):
                handles.append(module.register_forward_hook(hook))
        model(x, y)[1].backward()
    finally:
        for handle in handles:
            handle.remove()
    return [attn.grad for attn in kept]


# What is captured shares its memory with what autograd has saved. PyTorch counts the changes made by its own
# operations, and finds in the backward pass that the count is off; of NumPy, which shares the memory too, it knows
# nothing. ``double()`` makes a copy, since the weights are in float32 (on a float64 model it would not).
effects = {
    "attn * 0": "harmless",
    "attn.mul_(0)": "error",
    "attn.clone().mul_(0)": "harmless",
    "attn.numpy().fill(0)": "silent",
    "attn.double().mul_(0)": "harmless",
}


def attn_and_grad(model, x, y):
    """What the report's own capture finds: the weights and their gradient, layer by layer. For the examples."""
    return [(layer.attn, layer.grad) for layer in capture_batch(model, x, y)]


def capture_copies(model, x, y):
    """Wrong: the copies are leaves that ask for a gradient, and nothing is computed from them."""
    copies = []

    def hook(module, inputs, attn):
        copies.append(attn.detach().clone().requires_grad_())

    for block in model.blocks:
        block.attn.attn_weights.register_forward_hook(hook)
    model(x, y)[1].backward()
    return [attn.grad for attn in copies]


def capture_unsafely(model, x, y, remove=True):
    """Wrong: an error in the model leaves the hooks behind, and with ``remove=False`` every call does."""
    gradients = {}

    def hook(module, inputs, attn):
        attn.register_hook(lambda grad: gradients.update({module: grad}))

    layers = [block.attn.attn_weights for block in model.blocks]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    model(x, y)[1].backward()
    if remove:
        for handle in handles:
            handle.remove()
    return [gradients[layer] for layer in layers]
