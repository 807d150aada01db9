"""What follows from the global batch size: each rank's share, the learning rate, who normalises together."""

from dataclasses import dataclass

from syncbn.data.loading.samplers import split_global_batch

REFERENCE_BATCH_SIZE = 32
"""The mini-batch of the paper (section 4.2), for which learning rates are given."""


@dataclass(frozen=True)
class BatchArithmetic:
    """The batch sizes and the learning rate of a run.

    Args:
        global_batch_size: Images of one optimiser step, over all ranks.
        num_ranks: Processes that train together.
        accumulate_grad_batches: Forward and backward passes of one optimiser step.
        learning_rate_per_32_images: Learning rate for a batch of 32 images.
        normalization_batch_size: Images that normalise as one batch, on consecutive ranks. None for all that
            pass through the network at a time.

    Raises:
        ValueError: The batch does not divide among the ranks, or the normalisation batch is not made up of
            whole ranks; the message names sizes that fit.
    """

    global_batch_size: int
    num_ranks: int
    accumulate_grad_batches: int
    learning_rate_per_32_images: float
    normalization_batch_size: int | None = None

    def __post_init__(self) -> None:
        per_rank = self.images_per_rank
        fitting = [per_rank * ranks for ranks in range(1, self.num_ranks + 1) if self.num_ranks % ranks == 0]
        if self.normalization_batch_size not in (None, *fitting):
            raise ValueError(
                f"normalization_batch_size={self.normalization_batch_size} is not made up of whole ranks:"
                f" each of the {self.num_ranks} ranks processes {per_rank} images at a time;"
                f" what fits: {', '.join(map(str, fitting))}"
            )

    @property
    def images_per_rank(self) -> int:
        """Images that one rank processes at a time."""
        return split_global_batch(self.global_batch_size, self.num_ranks, self.accumulate_grad_batches)

    @property
    def ranks_per_normalization(self) -> int:
        """Consecutive ranks that normalise as one batch."""
        if self.normalization_batch_size is None:
            return self.num_ranks
        return self.normalization_batch_size // self.images_per_rank

    @property
    def learning_rate(self) -> float:
        """Learning rate of the global batch: proportional to its size."""
        return scale_learning_rate(self.learning_rate_per_32_images, self.global_batch_size)

    def describe(self) -> str:
        """The arithmetic in words, two lines."""
        accumulated = f" x {self.accumulate_grad_batches} passes" if self.accumulate_grad_batches > 1 else ""
        ranks = count_ranks(self.num_ranks)
        together = self.ranks_per_normalization
        return (
            f"global batch {self.global_batch_size} = {ranks}{accumulated} x {self.images_per_rank} images;"
            f" BatchNorm normalises over {together * self.images_per_rank} images ({count_ranks(together)})\n"
            f"learning rate {self.learning_rate_per_32_images:g} per {REFERENCE_BATCH_SIZE} images"
            f" -> {self.learning_rate:g} per {self.global_batch_size}"
        )


def count_ranks(number: int) -> str:
    """The words 1 rank, 2 ranks and so on."""
    return f"{number} rank" if number == 1 else f"{number} ranks"


def scale_learning_rate(learning_rate_per_32_images: float, global_batch_size: int) -> float:
    """Learning rate of a batch, proportional to its size (Goyal et al. 2017, arXiv 1706.02677)."""
    return learning_rate_per_32_images * global_batch_size / REFERENCE_BATCH_SIZE
