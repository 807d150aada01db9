"""Random numbers as a function of (seed, epoch, index) and what they are for, never of the rank or the order of calls.

The generator is Philox, which is made for this (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): the seed and the epoch are its key, the index and the purpose parts of its counter, so no streams overlap.
"""

import numpy as np

ORDER_STREAM, AUGMENTATION_STREAM, DROPOUT_STREAM = 0, 1, 2
"""The highest word of Philox's counter tells what the random numbers are for."""


def random_stream(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch.

    Args:
        seed: Of the run, in 0..2**64 - 1.
        epoch: Number of the epoch, from 0.
        index: Number of the sample in its data set, from 0.
        purpose: `ORDER_STREAM`, `AUGMENTATION_STREAM` or `DROPOUT_STREAM`.

    Returns:
        A generator that depends on the four arguments and on nothing else.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, index, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
