"""In which form an adapter was trained: a chat template, an instruction's frame, or bare prompts.

Few adapters answer in another form, so they are chosen less readily there. Knows no files and no models.
"""

import numpy as np
from numpy.typing import NDArray

from router.routing.gate import FLOOR, Array

FORMS = ("bare prompts", "Alpaca's frame", "the chat template")
EVERY = 8  # the step between generic prompts that tell
LEAST = 2  # adapters in either of two groups
GAP = 0.12  # least nats between the means of two groups of adapters
CLEAR = 4.0  # least deviations within the groups between their means
AWAY = 5.0  # standard deviations that a score loses in another form


def trained_in(framed: NDArray[np.float32], bare: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which adapters were trained in a form, (adapters,): those that respond more to text in it (equation 8).

    None, unless the library falls into two groups of at least LEAST adapters each: in a library of one form
    the differences between adapters are small, and say something else.

    Args:
        framed, bare: (prompts, adapters, modules) responses of the same prompts in the form and without; NaN
            without a prototype.

    Example:
        >>> trained_in(np.full((1, 4, 1), 0.2), np.array([[[0.1], [0.1], [0.2], [0.2]]])).tolist()
        [True, True, False, False]
    """
    gains = (np.log(framed.clip(FLOOR)) - np.log(bare.clip(FLOOR))).mean(0)  # (adapters, modules)
    gains = np.ma.masked_invalid(gains)
    gain = np.asarray((gains - gains.mean(0)).mean(1))  # (adapters,)
    low = np.sort(gain)
    size = np.arange(1, len(low))  # of the lower group
    lower, upper = (low.cumsum()[:-1] / size for low in (low, low[::-1]))
    fit = slice(LEAST - 1, 1 - LEAST)  # the cuts that leave enough on either side
    gap = (upper[::-1] - lower)[fit]
    if not len(gap):
        return np.zeros(len(gain), bool)
    share = (size * size[::-1] / len(low) ** 2)[fit]
    within: Array = np.sqrt((low.var() - share * gap**2).clip(0))  # what two means leave of the variance
    cut = int(within.argmin())
    parted = gap[cut] >= max(GAP, CLEAR * within[cut])
    return np.asarray(parted & (gain >= low[cut + LEAST]))


def handicaps(homes: NDArray[np.int64], form: int) -> Array:
    """The loss of the adapters' scores in a form, (adapters,), in standard deviations of generic text.

    Args:
        homes: (adapters,) the form that each was trained in; 0 is none that is known.
        form: of the queries. If no adapter was trained in it, those of no known form lose nothing.
    """
    away = (homes != form) & ((homes > 0) | (homes == form).any())
    return np.where(away, AWAY, 0.0)
