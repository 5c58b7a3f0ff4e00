"""Solutions of 07, how we know.

>>> check("7.1", adding_up)
Exercise 7.1: right. It was 0.8 at every iteration, and after 100 of them only one rule has gone
astray.
"""

import numpy as np

from exercises import check  # noqa: F401, used in the examples

# The exact part adds up to 100 in both. The constant error adds up to 75; the random ones, at
# right angles to each other on average, to 0.75 times the root of 100, which is 7.5.
adding_up = 0.8, 100 / np.hypot(100, 0.75 * np.sqrt(100))
