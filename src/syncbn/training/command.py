"""The command line of the trainer: Lightning's, with one batch knob and a folder for each run."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, WeightAveraging
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from syncbn.data import ImageDataModule
from syncbn.data.datasets.base import ReadError
from syncbn.data.datasets.formats import Stage
from syncbn.data.loading.samplers import batches_per_epoch
from syncbn.paths import expand_home
from syncbn.progress import stamped
from syncbn.run_folders import CHECKPOINTS, LAST, expand_run_folder
from syncbn.training.checkpoints.callback import BestCheckpoint, Checkpointing, LastCheckpoint
from syncbn.training.checkpoints.earlier_data import settle_data
from syncbn.training.checkpoints.files import CHECKPOINT_DEFAULTS, checkpoints_of, with_atomic_checkpoints
from syncbn.training.checkpoints.resuming import (
    RestartedJob,
    ResumePoint,
    check_config,
    point_by_hand,
    point_of_restart,
    record_end,
    record_start,
    tell_ranks,
)
from syncbn.training.checkpoints.trained_classes import compare_classes, say, settle_classes
from syncbn.training.classifier import ImageClassifier
from syncbn.training.configuration.checks import (
    MAY_BE_OFF,
    read_hyperparameters,
    refuse_dropped,
    refuse_nulls,
    refuse_other_network,
    refuse_random_layers,
    split_off,
)
from syncbn.training.configuration.lightning_support import make_writable, refuse_options
from syncbn.training.configuration.parser import TrainerParser
from syncbn.training.configuration.run_plan import (
    RunPlan,
    check_monitors,
    check_names_of_checkpoints,
    describe_plan,
    reason_of_early_end,
)
from syncbn.training.evaluated_images import KINDS, announce_images, describe_images
from syncbn.training.evaluation import check_same_task, load_ensemble
from syncbn.training.finetuning.retrieval import NEIGHBOURS
from syncbn.training.finetuning.starting_weights import choose_preprocessing, words_without_weights
from syncbn.training.launch.launchers import follow_launcher
from syncbn.training.launch.processes import is_rank_zero, stop_other_ranks, wait_for_other_ranks
from syncbn.training.launch.stopping import INTERRUPTED, STOPPED, describe_lost_rank
from syncbn.training.monitoring.finite import StopAtNonFinite
from syncbn.training.monitoring.left_out import LeftOutImages
from syncbn.training.monitoring.progress import progress_callback
from syncbn.training.monitoring.throughput import Throughput
from syncbn.training.monitoring.watchdog import Watchdog
from syncbn.training.optimization.dropout import RandomByStep
from syncbn.training.optimization.speed import default_benchmark, default_precision
from syncbn.training.run.curves import CurvesPlot
from syncbn.training.run.folder import KeptConfig, RunRecord, claim_run_folder, dump_config, hold_run_folder, run_folder
from syncbn.training.run.lightning_messages import quieten
from syncbn.training.run.logs import run_loggers
from syncbn.training.run.predictions import PredictionTable
from syncbn.training.run.summary import RunSummary
from syncbn.training.statistics import StatisticsTrainer
from syncbn.training.strategies.ddp import SynchronisedDDPStrategy

TRAINER_DEFAULTS: dict[str, Any] = {
    "use_distributed_sampler": False,  # the DataModule divides batches itself
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}


NO_CONCERN_WITHOUT_TRAINING = (
    ".*callbacks used to create the checkpoint need to be provided",
    "The dirpath has changed",
    "You are using a custom batch sampler `EvaluationBatchSampler` for prediction",  # it leaves out nothing
)
"""Warnings of Lightning's when a checkpoint is only evaluated."""


class SyncBNCLI(LightningCLI):
    """LightningCLI for `ImageClassifier` and `ImageDataModule`."""

    checkpoint_hparams: Mapping[str, Any] = {}  # of ckpt_path
    resume_point: ResumePoint | None = None  # of rank 0
    plan: RunPlan | None = None  # of a fit, but for a fast_dev_run
    parts_off: Sequence[str] = ()  # of `MAY_BE_OFF`

    def __init__(self) -> None:
        quieten()
        self.run_summary = RunSummary()
        super().__init__(
            ImageClassifier,
            ImageDataModule,
            trainer_class=StatisticsTrainer,
            parser_class=TrainerParser,
            seed_everything_default=0,
            trainer_defaults=TRAINER_DEFAULTS,
            auto_configure_optimizers=False,
            save_config_callback=KeptConfig,
            save_config_kwargs={"save_to_log_dir": False},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and one that estimates population statistics; with the arguments that are not options.

        Where the command line names one first, it alone: each takes its time to set up.
        """
        known = {**LightningCLI.subcommands(), "statistics": {"model", "datamodule"}}
        named = sys.argv[1] if len(sys.argv) > 1 else ""
        return {named: known[named]} if named in known else known

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that raises its errors rather than print the usage and exit."""
        return super().init_parser(**kwargs | {"exit_on_error": False})

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed: a number, so that every rank has the same."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="Seed of the initial weights, the order of the samples and the augmentation.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The arguments of a run, and the links that make ``global_batch_size`` the only batch knob."""
        parser.add_argument(
            "--global_batch_size", type=int, default=128, help="Images of one optimiser step, over all ranks."
        )
        parser.add_argument("--runs_folder", type=str, default="runs", help="Where the folders of runs go.")
        parser.add_argument(
            "--name", type=str, default="unnamed", help="Of the experiment: runs go to runs_folder/name."
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="Whether fit ends with the test of the best checkpoint; without test images, with its validation.",
        )
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Checkpointing, "checkpointing")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.set_defaults({f"checkpoint.{key}": value for key, value in CHECKPOINT_DEFAULTS.items()})
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments(
            "model.embedding_dimension",
            "data.own_evaluation_classes",
            compute_fn=lambda dimension: dimension is not None,
        )
        parser.link_arguments(
            ("model.variant", "model.weights", "model.preprocessing"), "data.preprocessing", choose_preprocessing
        )
        for target in ("data.global_batch_size", "model.global_batch_size"):
            parser.link_arguments("global_batch_size", target)
        parser.link_arguments("data.drop_last", "model.drop_last")
        for source, target in (
            ("data.num_classes", "model.num_classes"),
            ("data.classes", "model.classes"),
            ("data.channels", "model.in_channels"),
            ("data.training_images", "model.training_images"),
        ):
            parser.link_arguments(source, target, apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        assert isinstance(parser, TrainerParser)
        parser.describe(subcommand)
        parser.set_defaults({"weights_only": True})  # a checkpoint may come from anywhere: run no code of it
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                type=str | None,
                default=None,
                help="Folder of a run to go on with, from its newest whole checkpoint. Restarts do so by themselves.",
            )
        if subcommand not in ("fit", "statistics"):
            parser.add_argument(
                "--checkpoints",
                type=list[str],
                default=[],
                help="Several networks, whose class probabilities are averaged; instead of ckpt_path.",
            )
        if subcommand == "predict":
            parser.add_argument("--predictions", type=str, default="predictions.csv", help="The file to write.")
            parser.set_defaults({"return_predictions": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; ``--data PATH`` is short for ``--data.root PATH``, a run folder for its config and checkpoint."""
        words = sys.argv[1:]
        if words[:1] != ["fit"]:
            words = expand_run_folder(words, speaks=is_rank_zero())
        words = expand_data_shorthand(words)
        refuse_other_network(words)
        words, off = split_off(words)
        self.config = expand_home(parser.parse_args(words_without_weights(words)))
        verb = self.config["subcommand"]
        config = self.config[verb]
        for name in off:
            config[name] = None
        self.parts_off = [name for name in MAY_BE_OFF if name in config and config[name] is None]
        refuse_nulls(self._parser(verb), config)
        self.checkpoint_hparams = read_hyperparameters(config.get("ckpt_path"))
        if self.checkpoint_hparams:
            refuse_dropped(self._parser(verb), config, words, self.checkpoint_hparams)
        settle_data(config)
        settle_classes(config)

    def before_instantiate_classes(self) -> None:
        """Only a fit has a run folder, in which its config is saved."""
        if self.subcommand != "fit":
            self.save_config_callback = None
            for message in NO_CONCERN_WITHOUT_TRAINING:
                warnings.filterwarnings("ignore", message)
            return
        options = self._get(self.config, "trainer")
        refuse_options(options, self._get(self.config, "global_batch_size"))
        make_writable(options["callbacks"])
        refuse_random_layers(self.config[self.subcommand])
        options["precision"] = default_precision(options)
        options["benchmark"] = default_benchmark(options)

    def instantiate_classes(self) -> None:
        """Several checkpoints become one model, the mean of their class probabilities."""
        config = self.config[self.subcommand]
        for name in self.parts_off:  # jsonargparse makes no object of null
            del config[name]
        super().instantiate_classes()
        for name in self.parts_off:
            config[name] = None
        if self.trainer.precision == "64-true":
            self.model.double()  # Lightning would after it has restored a checkpoint, in single precision
        checkpoints, ckpt_path = self._get(self.config, "checkpoints", []), self._get(self.config, "ckpt_path")
        check_same_task(f"--ckpt_path {ckpt_path}", self.checkpoint_hparams, self.model.hparams)
        if checkpoints:
            if ckpt_path:
                raise ValueError("--ckpt_path and --checkpoints exclude each other: leave one out")
            self.model = load_ensemble(checkpoints, self.model, self.datamodule.classes_by_name)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the loggers, the callbacks and the strategy of a run."""
        say(self.datamodule.remark_on_classes)
        if self.subcommand == "fit":
            compare_classes(self.datamodule, self._get(self.config, "ckpt_path"))
        # As a restart will find it in the run's config, whatever the defaults are then.
        self._get(self.config, "data")["exif_orientation"] = self.datamodule.exif_orientation
        kwargs |= follow_launcher(sys.argv, os.environ)
        for name in self.parts_off:
            self.config_init[self.subcommand][name] = None
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        callbacks: list[Any] = []
        if self.subcommand == "fit" and not config.get("fast_dev_run"):
            kwargs["logger"] = self._loggers(config.get("logger"))
            kwargs["plugins"] = with_atomic_checkpoints(config.get("plugins"))
            seed = self._get(self.config, "seed_everything")
            self.run_summary.keeper = self._get(self.config_init, "checkpoint")
            callbacks = [
                Throughput(),
                self.run_summary,
                RunRecord(),
                CurvesPlot(),
                LastCheckpoint(),
                StopAtNonFinite(),
                RandomByStep(seed),
            ]
        elif self.subcommand != "fit":
            kwargs["logger"] = False
        if self.subcommand == "predict":
            callbacks = [PredictionTable(Path(self._get(self.config, "predictions")))]
        callbacks.append(LeftOutImages())
        own = config.get("callbacks") or []
        if config.get("enable_progress_bar") is not False and not any(isinstance(each, ProgressBar) for each in own):
            callbacks.append(progress_callback())
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        if config.get("strategy") == "auto" and (str(config.get("devices")) != "1" or config.get("num_nodes") != 1):
            kwargs["strategy"] = SynchronisedDDPStrategy.strategy_name
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The trainer; parts of a run that are null are left out."""
        return super()._instantiate_trainer(config, [callback for callback in callbacks if callback is not None])

    def _loggers(self, configured: Any) -> list[Any]:
        added = [] if configured in (None, True) else configured if isinstance(configured, list) else [configured]
        parent = Path(self._get(self.config, "runs_folder"), self._get(self.config, "name"))
        folder = self._choose_run_folder(parent) if is_rank_zero() else parent / "version_0"
        self.datamodule.run_folder = folder if is_rank_zero() else None
        return [*run_loggers(folder, self.resume_point.step if self.resume_point else None), *added]

    def _choose_run_folder(self, parent: Path) -> Path:
        """On rank 0: the folder of the run, and whether and where it goes on."""
        by_hand = self._get(self.config, "resume")
        job = RestartedJob.from_environment(os.environ, sys.argv[1:])
        self.resume_point = point_by_hand(by_hand) if by_hand else point_of_restart(parent, job)
        folder = claim_run_folder(parent) if self.resume_point is None else self.resume_point.folder
        hold_run_folder(folder, is_restart=self.resume_point is not None and not by_hand)
        if self.resume_point is not None:
            config = dump_config(self._parser(self.subcommand), self.config[self.config["subcommand"]])
            check_config(folder, yaml.safe_load(config))
            compare_classes(self.datamodule, self.resume_point.checkpoint)  # other ranks as they load it
            where = self.resume_point.checkpoint or "the beginning, there is no whole checkpoint yet"
            print(f"syncbn: goes on in {folder} from {where}", file=sys.stderr, flush=True)
        record_start(folder, job, self.resume_point)
        return folder

    def _run_subcommand(self, subcommand: str) -> None:
        launcher = self.trainer.strategy.launcher
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if isinstance(error, SystemExit) and error.code in (STOPPED, INTERRUPTED):
                wait_for_other_ranks(launcher)
                raise
            stop_other_ranks(launcher, error)
            if isinstance(error, RuntimeError) and (lost := describe_lost_rank(error)):
                raise ValueError(lost) from error
            if isinstance(error, RuntimeError) and "in loading state_dict" in str(error):
                path = self._get(self.config, "ckpt_path")
                _, first, *more = str(error).splitlines()
                raise ValueError(
                    f"--ckpt_path {path} is of another network than the configured one: {first.strip()}"
                    f" ({len(more)} further differences)"
                ) from error
            raise

    def before_fit(self) -> None:
        """Check the batch arithmetic before any other process starts, and print it."""
        arithmetic = self.model.batch_arithmetic(self.trainer)
        remarks = self._plan() if not self.trainer.fast_dev_run else []  # type: ignore[attr-defined]
        if self.trainer.is_global_zero:
            parameters = sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
            print(arithmetic.describe())
            print("\n".join([self.datamodule.describe(), *remarks]))
            print(f"{parameters:,} trainable parameters, device {self.trainer.strategy.root_device.type}")
            if folder := run_folder(self.trainer):
                print(stamped(f"run folder {folder}"))
            sys.stdout.flush()

    def _plan(self) -> list[str]:
        """Work out what the run will do; what of it may surprise, each in a line."""
        data, trainer = self.datamodule, self.trainer
        steps = batches_per_epoch(data.training_images, data.global_batch_size, data.drop_last)
        begun_at = self.resume_point.step if self.resume_point else 0
        self.plan = RunPlan.of(trainer, steps, begun_at)
        check_names_of_checkpoints(trainer)
        remarks = [describe_plan(self.plan, trainer), *check_monitors(self.plan, trainer, self.model.logged)]
        return [remark for remark in remarks if remark]

    def fit(self, **arguments: Any) -> None:
        """Train, from the newest checkpoint where the run is gone on with; name the run folder also when stopped."""
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            arguments["ckpt_path"] = tell_ranks(self.trainer, self.resume_point) or arguments.get("ckpt_path")
        try:
            self.trainer.fit(**arguments)
        except ReadError as error:
            raise ReadError("; ".join([str(error).rstrip(), *self._ways_on()])) from error
        except SystemExit as stop:
            self._print_run_folder()
            if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's answer to it is 1
                raise SystemExit(INTERRUPTED) from None
            raise

    def _ways_on(self) -> list[str]:
        """How to go on after an image could not be read, in words."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        keepers = [callback for callback in callbacks if isinstance(callback, Checkpointing)]
        ways = [keeper.how_to_go_on() for keeper in keepers]
        return [self.datamodule.way_around_unreadable, *(way for way in ways if way)]

    def after_fit(self) -> None:
        """Test the best checkpoint; print the accuracy, where everything is and, last, the run folder.

        Where there are no test images the accuracy is the best checkpoint's on those of validation.
        """
        self._explain_early_end()
        if (folder := run_folder(self.trainer)) and self.trainer.is_global_zero:
            record_end(folder, self.trainer.global_step)
        keeper = self._get(self.config_init, "checkpoint")
        best = (keeper.best_model_path or None) if keeper else None
        if self._get(self.config, "test_after_fit"):
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # which would bring back the weights that were not averaged
                    callback._average_model = None
            # Of validation, the logs hold a curve, in which the best checkpoint has its place.
            self.model.logs_tests = self.datamodule.stage_of_test == "test"
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False, weights_only=True)
            weights = self._name_weights([best] if best else [])
            self.run_summary.evaluated = weights
            self._print_accuracy(self.datamodule.stage_of_test, weights)
        wait_for_other_ranks(self.trainer.strategy.launcher)
        if self.run_summary in self.trainer.callbacks:  # type: ignore[attr-defined]  # not in a fast_dev_run
            self.run_summary.finish(self.trainer)
        self._print_what_there_is(best)
        self._print_run_folder()

    def _explain_early_end(self) -> None:
        reason = reason_of_early_end(self.plan, self.trainer) if self.plan else ""
        self.run_summary.ended_early = reason or None
        if reason and self.trainer.is_global_zero:
            print(f"training ended early, after step {self.trainer.global_step:,}: {reason}", flush=True)

    def before_validate(self) -> None:
        """Say which images are taken."""
        self._announce_images("val")

    def before_test(self) -> None:
        """Say which images are taken."""
        self._announce_images(self.datamodule.stage_of_test)
        if self.datamodule.stage_of_test != "test":
            self.config_init["test"]["verbose"] = False  # Lightning's table calls every figure a test's

    def before_predict(self) -> None:
        """Say which images are taken."""
        self._announce_images(self.datamodule.stage_of_test)

    def _announce_images(self, stage: Stage) -> None:
        members = [member.hparams for member in getattr(self.model, "members", ())]
        hparams = [hparams for hparams in (self.checkpoint_hparams, *members) if "training_images" in hparams]
        images = announce_images(self.datamodule, stage, [each["training_images"] for each in hparams])
        if self.trainer.is_global_zero:
            print(f"syncbn: takes {images}", file=sys.stderr, flush=True)

    def after_test(self) -> None:
        """Print the accuracy."""
        self._print_accuracy(
            self.datamodule.stage_of_test, self._name_weights(checkpoints_of(self.config[self.subcommand]))
        )

    def after_validate(self) -> None:
        """Print the accuracy."""
        self._print_accuracy("val", self._name_weights(checkpoints_of(self.config[self.subcommand])))

    def after_predict(self) -> None:
        """Name the file written."""
        if self.trainer.is_global_zero:
            print(self._get(self.config, "predictions"))

    def _name_weights(self, checkpoints: list[str]) -> str:
        weights = " + ".join(Path(path).name for path in checkpoints) or "the weights as they are"
        crops = self.datamodule.crops.count
        return f"{weights}, {crops} crops" if crops > 1 else weights

    def _print_accuracy(self, stage: Stage, weights: str) -> None:
        if not self.trainer.is_global_zero:
            return
        metrics, kind = self.trainer.callback_metrics, KINDS[stage]
        if f"{stage}_top1" in metrics:
            top1, top5 = (100 * float(metrics[f"{stage}_{name}"]) for name in ("top1", "top5"))
            figures = f"accuracy {top1:.2f} % (top-5 {top5:.2f} %)"
        elif f"{stage}_recall_at_1" in metrics:
            recalls = (f"@{k} {100 * float(metrics[f'{stage}_recall_at_{k}']):.2f} %" for k in NEIGHBOURS)
            figures = f"recall {', '.join(recalls)}"
        else:
            return
        print(f"{kind} {figures} on {describe_images(self.trainer, stage)} with {weights}")

    def _print_what_there_is(self, best: str | None) -> None:
        folder = run_folder(self.trainer)
        if not self.trainer.is_global_zero or folder is None:
            return
        checkpoint = Path(best) if best else folder / CHECKPOINTS / LAST
        for what, where in (
            ("best checkpoint" if best else "checkpoint", os.path.relpath(checkpoint)),
            ("curves", folder / "curves.png"),
            ("predict with", f"syncbn predict {folder} IMAGES"),
        ):
            print(f"{what:<16} {where}")

    def _print_run_folder(self) -> None:
        folder = run_folder(self.trainer)
        if self.trainer.is_global_zero and folder:
            print(folder, flush=True)


def expand_data_shorthand(words: list[str]) -> list[str]:
    """Replace ``--data PATH`` by ``--data.root PATH``; a YAML file stays what it is, a config of the data."""
    expanded = list(words)
    for place, word in enumerate(words):
        option, separator, value = word.partition("=")
        value = value if separator else "".join(words[place + 1 : place + 2])
        if option == "--data" and not value.endswith((".yaml", ".yml", ".json")) and not value.startswith("{"):
            expanded[place] = f"--data.root{separator}{value}" if separator else "--data.root"
    return expanded
