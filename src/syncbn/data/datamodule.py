"""The DataModule: images of any known layout, the same global batches on any number of ranks."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from syncbn.data.datasets.base import ImageDataset, OnReadError, numbers_classes
from syncbn.data.datasets.formats import EMBEDDED, Stage, hold_some_out, open_image_sets
from syncbn.data.datasets.selection import labels_of, origin_of
from syncbn.data.labels import by_position, match_classes, relabel_sets
from syncbn.data.loading.batches import BatchedImages, ImageBatch, keep_batch
from syncbn.data.loading.order import EpochOrder, ShuffledOrder, WindowedOrder
from syncbn.data.loading.samplers import EvaluationBatchSampler, GlobalBatchSampler
from syncbn.data.loading.window_reader import WindowReader, bytes_held
from syncbn.data.look_through import RECORD, Look, folders_of, look_for_all_ranks
from syncbn.data.transforms.augmentation import Augmentation
from syncbn.data.transforms.evaluation_crops import EvaluationCrops
from syncbn.preprocessing import Preprocessing, find_preprocessing

if TYPE_CHECKING:
    from syncbn.data.loading.dali import DaliLoader


def use_one_thread(worker: int) -> None:
    """Keep OpenCV in a worker from starting a thread for each core: the workers share the cores."""
    cv2.setNumThreads(0)


def set_up_worker(worker: int) -> None:
    """What a process that prepares batches begins with."""
    use_one_thread(worker)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to a whole job they ask the ranks to stop, which need their batch


class ResumableDataLoader(DataLoader[ImageBatch]):
    """A loader whose place is that of the trainer's own counters, which checkpoints hold.

    The two methods have nothing to do; they tell Lightning that the loader resumes within an epoch.
    """

    def state_dict(self) -> dict[str, int]:
        """Nothing: `ImageDataModule.train_dataloader` reads the place off the trainer."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore."""


class ImageDataModule(LightningDataModule):
    """Training, validation and test images, in batches that do not depend on the number of ranks.

    Args:
        global_batch_size: Images of one optimiser step, over all ranks.
        root: 'fashion-mnist' (comes with the package), a folder of shards (index.json), of Hugging Face's parquet
            files, of MNIST idx files, with train/<class>/ and val/<class>/ of images, or with <class>/ alone.
        image_size: Side of the square that the network sees, in pixels. Null keeps the size of the images,
            where all have one size.
        augmentation: Random changes to the training images. Null for none.
        resize: Pixels of the shorter side to which an image is resized in evaluation, before its centre is cut out.
            Null for image_size.
        evaluation_crops: Parts of an image over whose probabilities evaluation averages: 1, its centre; 10, corners,
            centre and mirror images; 144, GoogLeNet's, whose four scales take the place of ``resize``. A batch then
            holds fewer images, and at least one for each rank.
        preprocessing: The order of the colours and the normalisation, by the variant of the network: "paper" (RGB,
            the data's own mean and standard deviation), "cadene" or "slim"; or as numbers.
        decoder: Of the training images: "opencv", or "dali" for NVIDIA's (the extra syncbn[dali]), which decodes on
            the GPU where the trainer has one.
        validation_images: Training images held out for validation. 0 holds out none: validation then takes the data's
            own validation set; or the test set, where nothing is chosen by it.
        num_workers: Processes for each rank that prepare batches (threads, of DALI's training images). 0 prepares
            them in the training process.
        seed: Decides the order of the samples and their random changes.
        shuffle_window: Shards whose samples are shuffled together, of data in shards. Each process that reads holds
            the compressed bytes of about one window / (ranks x num_workers), besides the batches under way. 0 shuffles
            the shards alone.
        drop_last: Whether to leave out the last global batch of an epoch where it is incomplete.
        on_read_error: What an image that cannot be read does. "look", of images in folders: before a fit rank 0 looks
            all through, and what cannot be read is listed and left out; one that fails later is left out of its batch
            with a warning, and many in a row end the run. Of other data it is "stop", which ends the run at the first.
            "skip" leaves it out of its batch. How many were is printed at the end of the epoch.
        own_evaluation_classes: Whether validation and test images may be of other classes than the training images, as
            in retrieval.
        exif_orientation: Whether photos are turned as their EXIF says. Null turns those of folders and parquet files,
            but not those of ImageNet, known by the names of its classes (n01440764 ...); shards are as they were made.
        suffixes: Endings of the names of the files in folders that are images. Null takes those of all kinds that can
            be read.
        validate_on_test: Whether validation takes the test images, even where a checkpoint is chosen by them.
        test_images: Training images held out for the test, apart from those for validation. 0 holds out none: the test
            then takes the data's own test set; or, where there is none, the validation images, and its figures are
            called validation.
        classes_by_name: Whether labels follow the names of the classes where a checkpoint is evaluated or gone on with:
            the same names in another order are told apart by it, and names that it does not know are refused. False
            takes the classes by position, whatever they are called.
        checkpoint_classes: Names of the classes of a network that is evaluated, in the order of its outputs; the data
            may have fewer. The command takes them from the checkpoint.

    Attributes:
        remark_on_classes: What a user should know of the comparison with a checkpoint's classes, in words.
        run_folder: Where rank 0 keeps what could not be read at the start of a fit; None keeps it nowhere.

    Raises:
        ValueError: The data are missing, broken or of unknown layout; an argument is out of range; or a class is none
            of ``checkpoint_classes``.
    """

    def __init__(
        self,
        global_batch_size: int,
        root: str = EMBEDDED,
        image_size: int | None = None,
        augmentation: Augmentation | None = Augmentation(),  # noqa: B008 (frozen)
        resize: int | None = None,
        evaluation_crops: int = 1,
        preprocessing: str | Preprocessing = "paper",
        decoder: Literal["opencv", "dali"] = "opencv",
        validation_images: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        shuffle_window: int = 16,
        drop_last: bool = True,
        on_read_error: OnReadError = "look",
        own_evaluation_classes: bool = False,
        exif_orientation: bool | None = None,
        suffixes: list[str] | None = None,
        validate_on_test: bool = False,
        test_images: int = 0,
        classes_by_name: bool = True,
        checkpoint_classes: list[str] | None = None,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.global_batch_size = global_batch_size
        self.root = root
        self.augmentation = augmentation
        self.num_workers = num_workers
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.drop_last = drop_last
        self.on_read_error: OnReadError = on_read_error
        self.run_folder: Path | None = None
        self._look: Look | None = None
        self.validate_on_test = validate_on_test
        self.sets = open_image_sets(
            root,
            validation_images,
            own_evaluation_classes,
            on_read_error,
            exif_orientation=exif_orientation,
            suffixes=suffixes,
            validate_on_test=validate_on_test or None,
            test_images=test_images,
        )
        self.classes_by_name = classes_by_name
        self.order = self._order()
        self._saved_division: dict[str, Any] | None = None
        self.image_size = self._native_size() if image_size is None else image_size
        if self.image_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 1")
        self.crops = EvaluationCrops(self.image_size, resize, evaluation_crops)
        self.preprocessing = find_preprocessing(preprocessing)
        self.decoder = decoder
        if decoder == "dali":
            self._require_dali()
        self.remark_on_classes = "" if checkpoint_classes is None else self.follow_classes(checkpoint_classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return tuple(self.sets.train.classes)

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.sets.train.classes)

    def follow_classes(self, trained: Sequence[str], whole: bool = False) -> str:
        """Let the labels be those of a checkpoint's classes, by their names, unless ``classes_by_name`` is false.

        Args:
            trained: Names of the checkpoint's classes, in the order of its outputs.
            whole: Whether the data must have each of them: training goes on.

        Returns:
            What a user should know of it, in words; "" where the classes are the same in the same order.

        Raises:
            ValueError: A class of the data is none of the checkpoint's; or, with ``whole``, the other way round.
        """
        if not self.classes_by_name:
            return by_position(self.classes, trained)
        match = match_classes(self.classes, trained, whole=whole, numbered=numbers_classes(self.sets.train))
        if match is None:
            return ""
        self.sets = relabel_sets(self.sets, trained, match.labels)
        return match.remark

    def class_counts(self) -> list[int]:
        """Training images of each class, without those that cannot be read."""
        labels = np.delete(labels_of(self.sets.train), list(self._left_out(self.sets.train)))
        return np.bincount(labels, minlength=self.num_classes).tolist()

    @property
    def exif_orientation(self) -> bool:
        """Whether photos are turned as their EXIF says, or were when shards were made of them."""
        return self.sets.exif_orientation

    @property
    def test_images(self) -> ImageDataset:
        """The test images; the validation images where there are no others."""
        return self.sets.validation if self.sets.test is None else self.sets.test

    @property
    def stage_of_test(self) -> Stage:
        """What figures on the images of `test_dataloader` are called: "val" where there are no test images."""
        return "val" if self.sets.test is None else "test"

    @property
    def channels(self) -> int:
        """Channels of an image, 1 or 3."""
        return self.sets.train.channels

    @property
    def training_images(self) -> int:
        """Images of the training set, without those held out."""
        return len(self.sets.train)

    def setup(self, stage: str) -> None:
        """Refuse a trainer that would replace the samplers by its own, or choose by the test images; look for files.

        Before a fit rank 0 looks through images in folders, as ``on_read_error`` says, and tells all ranks.

        Raises:
            ValueError: ``Trainer(use_distributed_sampler=True)``, Lightning's default, on several ranks; or a fit
                chooses a checkpoint, or when to stop, by test images, and ``validate_on_test`` does not say so; or no
                image of a class, or of a set, can be read.
        """
        trainer = self.trainer
        if trainer and trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "ImageDataModule divides each batch among the ranks itself:"
                " pass Trainer(use_distributed_sampler=False) (config key trainer.use_distributed_sampler)"
            )
        if trainer and stage == "fit" and self.sets.validation_from == "test" and not self.validate_on_test:
            self._refuse_to_choose(trainer)
        if trainer and stage == "fit" and self._look is None and self._policy == "look":
            self._look = look_for_all_ranks(trainer, self.sets, Path(self.root).expanduser(), self.run_folder)

    @property
    def _policy(self) -> OnReadError:
        """What ``on_read_error`` comes to with these images."""
        return "stop" if self.on_read_error == "look" and not folders_of([self.sets.train]) else self.on_read_error

    @property
    def way_around_unreadable(self) -> str:
        """How a fit that an image has ended goes on without it, in words."""
        if self.decoder == "dali":
            return f"replace the file, or add its path to `unreadable` in {RECORD} of the run folder"
        return "--data.on_read_error skip leaves such images out"

    def _left_out(self, dataset: ImageDataset) -> frozenset[int]:
        """Numbers of the images of a set that could not be read at the start."""
        return self._look.places_in(dataset) if self._look else frozenset()

    def _refuse_to_choose(self, trainer: Trainer) -> None:
        """Refuse a trainer that chooses by the validation images, which are the test images here."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            chooses = getattr(callback, "save_top_k", 1) != 0 and monitor is not None and "train" not in monitor
            if chooses and trainer.limit_val_batches:
                raise ValueError(
                    f"{self.root} has training and test images, but none for validation, and {type(callback).__name__}"
                    f" chooses by {monitor}: {hold_some_out(self.sets.train)}, or let it choose by none"
                    " (data.validate_on_test=true chooses by the test images all the same)"
                )

    def describe(self) -> str:
        """The images and what the loader holds of them in memory, in words, one line."""
        return "; ".join([self.sets.describe(), *self._shuffling()])

    def _shuffling(self) -> list[str]:
        """How shards are shuffled, in words; nothing of other data."""
        if not isinstance(self.order, WindowedOrder):
            return []
        workers = 0 if self.decoder == "dali" else self.num_workers
        held = bytes_held(self.order, self.trainer.world_size if self.trainer else 1, workers)
        reader = "worker" if workers else "rank"
        shards = self.order.layout.num_shards
        window = min(self.shuffle_window, shards)
        shuffled = (
            f"samples shuffled within {window} of {shards} shards"
            if window
            else f"{shards} shards shuffled, each in its own order"
        )
        return [f"{shuffled}, of which each {reader} holds about {held / 1e6:,.1f} MB"]

    def train_dataloader(self) -> "ResumableDataLoader | DaliLoader":
        """Shuffled, augmented training batches of this rank, from the trainer's present place onwards.

        With the trainer's ``overfit_batches`` every epoch has the same batches, images changed as in the first.
        """
        trainer = self.trainer
        sampler = GlobalBatchSampler(
            self.training_images,
            self.global_batch_size,
            rank=trainer.global_rank if trainer else 0,
            num_ranks=trainer.world_size if trainer else 1,
            accumulate_grad_batches=trainer.accumulate_grad_batches if trainer else 1,
            drop_last=self.drop_last,
            order=self.order,
            repeat_first_epoch=bool(getattr(trainer, "overfit_batches", 0)),
            left_out=self._left_out(self.sets.train),
        )
        if trainer and trainer.state.fn == TrainerFn.FITTING:
            epoch, batch = self._place_of_trainer(len(sampler))
            if batch:
                self._check_division()
            sampler.set_position(epoch, batch)
        order = self.order
        reader = WindowReader(self.sets.train, sampler, order) if isinstance(order, WindowedOrder) else None
        if self.decoder == "dali":
            return self._dali_loader(sampler, reader)
        images = BatchedImages(
            self.sets.train,
            self.image_size,
            self.augmentation,
            self.seed,
            preprocessing=self.preprocessing,
            reader=reader,
            on_read_error=self._policy,
        )
        return ResumableDataLoader(images, batch_sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        """All validation images in order, each once over the ranks."""
        return self._evaluation_loader(self.sets.validation)

    def test_dataloader(self) -> DataLoader[ImageBatch]:
        """All test images in order, each once over the ranks; the validation images where there are no others."""
        return self._evaluation_loader(self.test_images)

    def predict_dataloader(self) -> DataLoader[ImageBatch]:
        """The test images, as `test_dataloader` gives them."""
        return self.test_dataloader()

    def _require_dali(self) -> None:
        from syncbn.data.loading.dali import require_decodable

        if self.on_read_error == "skip":
            raise ValueError("on_read_error=skip needs decoder=opencv: DALI stops at a broken image")
        require_decodable(self.sets.train, self.augmentation)

    def _dali_loader(self, sampler: GlobalBatchSampler, reader: WindowReader | None) -> "DaliLoader":
        from syncbn.data.loading.dali import DaliLoader

        if not self.drop_last and self.trainer and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "drop_last=false with accumulate_grad_batches needs decoder=opencv: DALI knows no empty batch"
            )
        device = self.trainer.strategy.root_device if self.trainer else None
        return DaliLoader(
            self.sets.train,
            sampler,
            self.image_size,
            self.augmentation,
            self.seed,
            preprocessing=self.preprocessing,
            reader=reader,
            num_threads=max(1, self.num_workers),
            device_id=device.index if device and device.type == "cuda" else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """How an epoch is divided into batches: what a place within it depends on."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "training_images": self.training_images,
            "shuffle_window": self.shuffle_window if isinstance(self.order, WindowedOrder) else None,
            "drop_last": self.drop_last,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches if self.trainer else 1,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note how the epoch of a checkpoint was divided; it matters if training goes on within it."""
        self._saved_division = state_dict

    def _check_division(self) -> None:
        """Refuse to go on in the middle of an epoch that was divided into other batches.

        Raises:
            ValueError: A setting differs; the message names it and both values.
        """
        for name, value in self.state_dict().items():
            saved = (self._saved_division or {}).get(name, value)
            if saved != value:
                raise ValueError(
                    f"{name}={value}, but the checkpoint lies in the middle of an epoch with {name}={saved}:"
                    " go on with that value, or from a checkpoint at the end of an epoch"
                )

    def _order(self) -> EpochOrder:
        layout = self.sets.train.layout
        if layout is None:
            return ShuffledOrder(self.training_images, self.seed)
        return WindowedOrder(layout, self.shuffle_window, self.seed)

    def _evaluation_loader(self, dataset: ImageDataset) -> DataLoader[ImageBatch]:
        images = BatchedImages(
            dataset,
            self.image_size,
            crops=self.crops,
            preprocessing=self.preprocessing,
            on_read_error=self._policy,
        )
        trainer = self.trainer
        num_ranks = trainer.world_size if trainer else 1
        # Counted in crops, so that more crops take no more memory, once there is an image for each rank.
        images_at_a_time = max(num_ranks, self.global_batch_size // self.crops.count)
        sampler = EvaluationBatchSampler(
            len(images),
            images_at_a_time,
            rank=trainer.global_rank if trainer else 0,
            num_ranks=num_ranks,
            left_out=self._left_out(dataset),
        )
        return DataLoader(images, batch_sampler=sampler, **self._loader_options())

    def _loader_options(self) -> dict[str, Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return {
            "collate_fn": keep_batch,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": set_up_worker,
            "pin_memory": on_gpu,
        }

    def _native_size(self) -> int:
        dataset = self.test_images
        images = getattr(origin_of(dataset), "images", None)
        if images is None or images.shape[1] != images.shape[2]:
            raise ValueError(f"image_size is needed for {self.root!r}: its images are not squares of one size")
        return int(images.shape[1])

    def _place_of_trainer(self, batches_per_epoch: int) -> tuple[int, int]:
        """Epoch and batch at which a trainer, fresh or restored from a checkpoint, goes on.

        A checkpoint may lie within an epoch, at the validation that ends it, or after its end, where the
        batch counter still shows the epoch that is over.
        """
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        batches: Any = loop.epoch_loop.batch_progress.current
        limit = self.trainer.limit_train_batches or 0
        last = min(limit, batches_per_epoch) if isinstance(limit, int) else int(batches_per_epoch * limit)
        if epochs.ready == epochs.processed and 0 < batches.processed < last:
            _reopen_epoch(loop)
        if epochs.ready == epochs.processed:  # between two epochs
            if loop.restarting:
                _close_epoch(loop)
            return epochs.processed, 0
        if batches.processed >= last:  # all trained, validation not yet over
            return epochs.processed + 1, 0
        return epochs.processed, batches.processed


def _close_epoch(loop: Any) -> None:
    """Begin with an epoch's first batch: with max_steps Lightning takes any checkpoint for one within an epoch."""
    for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
        progress.completed = progress.processed
    loop.epoch_loop.batch_progress.reset_on_run()


def _reopen_epoch(loop: Any) -> None:
    """Go on within an epoch that a run stopped in, by max_steps or otherwise, and that Lightning counts as over.

    Its counters are made those of a checkpoint within an epoch.
    """
    batches = loop.epoch_loop.batch_progress
    for progress in (loop.epoch_progress.current, loop.epoch_progress.total):
        progress.processed -= 1
        progress.completed = progress.processed
    for progress in (batches.current, batches.total):
        progress.completed = progress.processed - 1
    loop.restarting = True
