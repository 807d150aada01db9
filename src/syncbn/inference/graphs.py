"""Networks as graphs that run without this package: ONNX, TorchScript and torch.export."""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.preprocessing import Preprocessing

Runner = Callable[[Tensor], Tensor]
"""Images, shape (N, C, H, W), to logits, shape (N, num_classes), or to embeddings, shape (N, dimension)."""


class PixelInput(nn.Module):
    """A network that takes pixels: uint8 or float of 0..255, RGB or grey, shape (N, C, H, W).

    Args:
        network: Takes normalised images.
        preprocessing: How they are normalised; with numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        assert preprocessing.mean is not None and preprocessing.std is not None
        self.network = network
        self.is_bgr = preprocessing.colour_order == "BGR"
        self.register_buffer("mean", torch.tensor(preprocessing.mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).reshape(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise, then run the network."""
        images = pixels.flip(1) if self.is_bgr else pixels
        return self.network((images.float() - self.mean) / self.std)


class Graph(ABC):
    """One format of graphs."""

    @abstractmethod
    def write(self, network: nn.Module, images: Tensor, path: Path, output: str, notes: Mapping[str, str]) -> None:
        """Write a network.

        Args:
            network: In eval mode.
            images: An example of its input with N = 2; N stays free.
            path: The file.
            output: What the network gives, "logits" or "embeddings", in formats that name it.
            notes: Texts by their names, in formats that hold such.
        """

    @abstractmethod
    def load(self, path: Path) -> Runner:
        """Read the file again and return what it computes."""


IR_OF_OPSET = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
"""Versions of ONNX's operators that are written, with the lowest version of the file format (IR) that holds each.

18 is the lowest that torch.onnx writes. Source: onnx.helper.VERSION_TABLE.
"""

RUNTIMES = {"1.15": (18, 9), "1.16": (19, 9), "1.17": (20, 9), "1.18": (21, 10), "1.21": (22, 10), "1.23": (23, 11)}
"""Releases of onnxruntime with the highest opset and IR version of which each ran an Inception-BN; 1.15: May 2023."""


@dataclass(frozen=True)
class Onnx(Graph):
    """ONNX, of one file; runs under onnxruntime and others.

    Args:
        opset: Version of the operators.
        ir_version: Of the file format; None for the lowest that holds the opset.

    Raises:
        ValueError: They are not written, or do not go together.
    """

    opset: int = min(IR_OF_OPSET)
    ir_version: int | None = None

    def __post_init__(self) -> None:
        if self.opset not in IR_OF_OPSET:
            raise ValueError(f"--opset {self.opset} is not written: {min(IR_OF_OPSET)} to {max(IR_OF_OPSET)} are")
        lowest, highest = IR_OF_OPSET[self.opset], max(IR_OF_OPSET.values())
        if not lowest <= self.ir <= highest:
            raise ValueError(
                f"--ir_version {self.ir_version} does not go with --opset {self.opset}: {lowest} to {highest} do"
            )

    @property
    def ir(self) -> int:
        """The version of the file format."""
        return IR_OF_OPSET[self.opset] if self.ir_version is None else self.ir_version

    def describe(self) -> str:
        """The versions, and the oldest onnxruntime that runs them, in words."""
        runs = (release for release, (opset, ir) in RUNTIMES.items() if self.opset <= opset and self.ir <= ir)
        return f"ONNX opset {self.opset}, IR version {self.ir}: runs under onnxruntime {next(runs)} and later"

    def write(self, network: nn.Module, images: Tensor, path: Path, output: str, notes: Mapping[str, str]) -> None:
        """Write by torch.onnx: input ``images``, dimension ``batch`` free; the notes are the model's metadata."""
        require_packages("onnx", "onnxscript", "onnxruntime")
        import onnx_ir.passes.common

        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own deprecations
            program: Any = torch.onnx.export(
                network,
                (images,),
                input_names=["images"],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
                opset_version=self.opset,
            )
            # Files of this machine, line by line; and IR versions below 10 have no such metadata.
            onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)
            program.model.metadata_props.update(notes)
            program.model.ir_version = self.ir
            program.save(path, external_data=False)

    def load(self, path: Path) -> Runner:
        """Run it under onnxruntime, on as many threads as torch has."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


class TorchScript(Graph):
    """TorchScript, for libtorch and old servers: torch itself recommends torch.export."""

    def write(self, network: nn.Module, images: Tensor, path: Path, output: str, notes: Mapping[str, str]) -> None:
        """Trace and freeze."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation, and checks of the input's shape that become constants
            traced = torch.jit.freeze(torch.jit.trace(network, (images,), check_trace=False))
            torch.jit.save(traced, path)

    def load(self, path: Path) -> Runner:
        """Run it by torch."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location="cpu")


class Exported(Graph):
    """torch.export's program, for torch.export.load, AOTInductor and ExecuTorch."""

    def write(self, network: nn.Module, images: Tensor, path: Path, output: str, notes: Mapping[str, str]) -> None:
        """Export with dimension ``batch`` free."""
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        with path.open("wb") as file:  # by its name it would insist on a suffix
            torch.export.save(program, file)

    def load(self, path: Path) -> Runner:
        """Run it by torch."""
        with path.open("rb") as file:
            return torch.export.load(file).module()


GRAPHS: dict[str, Graph] = {"onnx": Onnx(), "torchscript": TorchScript(), "exported": Exported()}


def require_packages(*names: str) -> None:
    """Refuse to begin without packages that are installed by an extra.

    Raises:
        ValueError: One is missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ValueError(f"--format onnx needs {', '.join(missing)}: pip install 'syncbn[export]'")
