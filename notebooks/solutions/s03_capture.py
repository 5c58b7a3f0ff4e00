"""Solutions of 03, capturing attention and its gradient.

>>> check("3.3", effects)
Exercise 3.3: right. The last kind is the dangerous one: whoever writes to what was captured
should copy it.
"""

from exercises import check  # noqa: F401, used in the examples
from model_local import AttentionWeights


def lateral_sum(output, d_output, n_head):
    """Every head has its own stretch of the channels; the sum over keys is a product within it.

    >>> check("3.1", lateral_sum)
    Exercise 3.1: right. No attention weight was needed, and no other key: the query had it all.
    """
    return (output * d_output).unflatten(-1, (n_head, -1)).sum(-1).transpose(1, 2)


def capture(model, x, y):
    """A hook asks the very tensor that goes on for its gradient; hooks are removed in any case.

    >>> check("3.2", capture)
    Exercise 3.2: right. And no hook is left behind, not even after an error.
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


# What is captured shares its memory with what autograd has saved. PyTorch counts the changes made
# by its own operations, and finds in the backward pass that the count is off; of NumPy, which
# shares the memory too, it knows nothing. ``double()`` makes a copy, since the weights are in
# float32 (on a float64 model it would not).
effects = {
    "attn * 0": "harmless",
    "attn.mul_(0)": "error",
    "attn.clone().mul_(0)": "harmless",
    "attn.numpy().fill(0)": "silent",
    "attn.double().mul_(0)": "harmless",
}
