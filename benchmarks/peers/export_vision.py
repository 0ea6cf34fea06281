"""Export vision encoders for ``python -m fusion_edge.benchmarks.peers vision``: OpenVINO models, and an INT8 bundle.

    python -m fusion_edge.benchmarks.peers.export_vision openvino-int8 --checkpoint FOLDER --output FOLDER

``openvino`` (float32) and ``openvino-int8`` also need openvino and nncf. Activation ranges are constants or come from
noise: the models are for speed only.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fusion_edge.benchmarks.vision_module import GlobalCrops, LocalCrop, read_vision
from fusion_edge.export.bundle.atomic_folder import atomic_folder
from fusion_edge.export.bundle.folder_content import FolderContent
from fusion_edge.export.bundle.weight_source import RoundToNearest
from fusion_edge.export.bundle.writer import write_bundle
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.weights import CheckpointWeights
from fusion_edge.export.lowering.linear import Linear
from fusion_edge.export.planning.options import ExportOptions
from fusion_edge.export.planning.plan import plan_export
from fusion_edge.quant.formats import ActivationQuantization
from fusion_edge.runtime.bundle.config import IMAGE_SIZE, FusionConfig
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError

QUESTION_TOKENS = 20
CONTENT = FolderContent("export", ("*.xml", "*.bin"), "local.xml")


class FixedActivations(RoundToNearest):
    """Weights rounded to nearest and one range for all activations; speed does not depend on ranges."""

    def activation_quantization(self, linear: Linear) -> ActivationQuantization:
        return ActivationQuantization(0.03, 128)


def bundle_int8(checkpoint: Path, output: Path) -> None:
    """Write a bundle with an INT8 vision encoder, the default of calibrated bundles."""
    with Checkpoint(checkpoint) as opened:
        plan = plan_export(opened, ExportOptions(vision="int8", is_calibrated=True))
        write_bundle(plan, output, False, FixedActivations(CheckpointWeights(opened, plan.parameters)))


def openvino(checkpoint: Path, output: Path, is_int8: bool) -> None:
    """Write ``global.xml`` and ``local.xml``.

    Uses torch.export, because a trace would run the model and turn sizes into constants.
    """
    peer = _import("openvino")
    if output.exists():
        raise FusionError(f"{output} exists; choose another --output.")
    config, parameters = read_vision(checkpoint, torch.float32)
    with atomic_folder(output, CONTENT) as folder, torch.inference_mode():
        for name, module, inputs in (
            ("global", GlobalCrops(config, parameters), _inputs(config, 2)[:1]),
            ("local", LocalCrop(config, parameters), _inputs(config, 1)),
        ):
            model = _converted(peer, module, inputs)
            if is_int8:
                model = _quantized(model, inputs)
            peer.save_model(model, folder / f"{name}.xml", compress_to_fp16=False)


def _inputs(config: FusionConfig, crops: int) -> tuple[torch.Tensor, ...]:
    """Return pixels, text and mask of noise. A dynamic number of crops needs at least two."""
    torch.manual_seed(0)
    text = torch.randn(1, QUESTION_TOKENS, config.language.hidden_size) * 0.02
    return torch.rand(crops, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1, text, torch.ones(text.shape[:2], dtype=torch.bool)


def _converted(peer: Any, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    """Convert a module: the number of crops is dynamic without text, the number of tokens with text."""
    count = torch.export.Dim("count", min=2, max=1024)
    sizes = {"pixels": {0: count}} if len(inputs) == 1 else {"pixels": None, "text": {1: count}, "mask": {1: count}}
    model = peer.convert_model(torch.export.export(module, inputs, dynamic_shapes=sizes, strict=False))
    for port, tensor, (name, size) in zip(model.inputs, inputs, sizes.items(), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_partial_shape(
            peer.PartialShape([-1 if axis in (size or {}) else length for axis, length in enumerate(tensor.shape)])
        )
    model.validate_nodes_and_infer_types()
    return model


def _quantized(model: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
    """Quantize weights and activations with NNCF's transformer scheme; ranges of one run suffice for speed."""
    nncf = _import("nncf")
    arrays = [tensor.numpy() for tensor in inputs]
    data = nncf.Dataset([arrays if len(arrays) > 1 else arrays[0]])
    return nncf.quantize(model, data, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise FusionError(f"{package} cannot be imported ({error}); run pip install openvino nncf.") from None


MAKERS: Mapping[str, Callable[[Path, Path], None]] = {
    "bundle-int8": bundle_int8,
    "openvino": functools.partial(openvino, is_int8=False),
    "openvino-int8": functools.partial(openvino, is_int8=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.benchmarks.peers.export_vision",
        description="Export a vision encoder for the comparison of engines.",
    )
    parser.add_argument("kind", choices=MAKERS, help="kind of model")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="FUSION checkpoint folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="new folder")
    return run_command(_main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    MAKERS[arguments.kind](arguments.checkpoint, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
