"""Export the LLM of a FUSION-Phi checkpoint for other engines.

    python -m fusion_edge.benchmarks.peers.export_llm hugging-face fusion-3b -o phi-3b
    python -m fusion_edge.benchmarks.peers.export_llm gguf fusion-3b -o phi-3b-gguf --format Q4_0 --format Q4_K_M

The first writes a Phi-3 folder for onnxruntime-genai's model builder and optimum-intel; its weights are links. The
second needs the packages gguf and llama-cpp-python (for its quantizer; not for the format BF16), and temporary disk
space for the LLM in bfloat16.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion_edge.benchmarks.full_size_checkpoint import TOKENIZER_FILES
from fusion_edge.benchmarks.json_file import write_json
from fusion_edge.export.bundle.atomic_folder import atomic_folder
from fusion_edge.export.bundle.folder_content import FolderContent
from fusion_edge.export.checkpoint.config import read_config
from fusion_edge.export.checkpoint.input_files import read_json_object
from fusion_edge.export.checkpoint.safetensors_reader import Checkpoint
from fusion_edge.export.checkpoint.sentencepiece_model import read_pieces
from fusion_edge.runtime.bundle.config import LanguageConfig
from fusion_edge.runtime.cli.command import run_command
from fusion_edge.runtime.errors import FusionError, UsageError

LLM_TENSOR = re.compile(r"(model\.(embed_tokens|layers\.\d+|norm)|lm_head)\.")
PHI_3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
PLAIN = "BF16"
FORMATS = ("Q4_0", "Q4_K_M")
INDEX = "model.safetensors.index.json"
CONTENT = FolderContent("write", ("*.json", "*.safetensors", "*.model", "*.gguf"), INDEX)


def write_hugging_face(source: Path, output: Path) -> None:
    """Write a Phi-3 folder whose weights are links to the checkpoint's files; its index lists the LLM's tensors.

    Raises:
        FusionError: ``source`` is not a FUSION-Phi checkpoint, or ``output`` cannot be written.
    """
    with Checkpoint(source) as checkpoint, atomic_folder(output, CONTENT) as folder:
        _language(checkpoint)
        tensors = {name: info for name, info in checkpoint.tensors.items() if LLM_TENSOR.match(name)}
        for file in {info.file for info in tensors.values()}:
            (folder / file.name).symlink_to(file.resolve())
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (folder / name).symlink_to((source / name).resolve())
        write_json(folder / "config.json", read_json_object(source / "config.json") | PHI_3)
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in tensors.values())},
            "weight_map": {name: info.file.name for name, info in tensors.items()},
        }
        write_json(folder / INDEX, index)


def write_gguf(source: Path, output: Path, formats: Sequence[str]) -> None:
    """Write a folder with ``FORMAT.gguf`` for each of llama.cpp's formats.

    Raises:
        FusionError: As in :func:`write_hugging_face`; gguf or llama-cpp-python is missing or fails.
        UsageError: llama.cpp does not know a format.
    """
    with Checkpoint(source) as checkpoint:
        language = _language(checkpoint)
        gguf = _import("gguf", "gguf")
        quantized = [name for name in formats if name != PLAIN]
        llama_cpp = _import("llama_cpp", "llama-cpp-python") if quantized else None
        file_types = {name: _file_type(llama_cpp, name) for name in quantized}
        with atomic_folder(output, CONTENT) as folder:
            plain = folder / f"{PLAIN}.gguf"
            write_bfloat16(gguf, checkpoint, language, plain)
            for name, file_type in file_types.items():
                _quantize(llama_cpp, plain, folder / f"{name}.gguf", file_type)
            if PLAIN not in formats:
                plain.unlink()


def _language(checkpoint: Checkpoint) -> LanguageConfig:
    config = read_config(checkpoint)
    if config.template != "phi_3":
        raise FusionError(f"{checkpoint.folder} has a Llama LLM; expected a FUSION-Phi checkpoint.")
    return config.language


def write_bfloat16(gguf: Any, checkpoint: Checkpoint, language: LanguageConfig, path: Path) -> None:
    """Write llama.cpp's ``phi3``, tensor by tensor: matrices in bfloat16, the rest in float32."""
    config = read_json_object(checkpoint.folder / "config.json")
    writer: Any = gguf.GGUFWriter(path, "phi3")
    _add_vocabulary(gguf, writer, checkpoint, language.vocab_size)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(language.hidden_size)
    writer.add_feed_forward_length(language.mlp_width)
    writer.add_block_count(language.layers)
    writer.add_head_count(language.heads)
    writer.add_head_count_kv(language.kv_heads)
    writer.add_layer_norm_rms_eps(language.norm_eps)
    writer.add_rope_dimension_count(language.head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    extra = {}
    if config.get("rope_scaling") is not None:  # longrope, the only scaling that read_config accepts for Phi
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(language.rotary_scale)
        for kind in ("long", "short"):
            factors = np.array(config["rope_scaling"][f"{kind}_factor"], np.float32)
            extra[f"rope_factors_{kind}.weight"] = factors
            writer.add_tensor_info(f"rope_factors_{kind}.weight", factors.shape, factors.dtype, factors.nbytes)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, language.layers)
    tensors = [info for name, info in checkpoint.tensors.items() if LLM_TENSOR.match(name)]
    bfloat16 = gguf.GGMLQuantizationType.BF16
    for info in tensors:
        count = int(np.prod(info.shape))
        is_matrix = len(info.shape) == 2
        kind, item_size = (bfloat16, 2) if is_matrix else (gguf.GGMLQuantizationType.F32, 4)
        name = names.get_name(info.name, try_suffixes=(".weight",))
        writer.add_tensor_info(name, info.shape, np.dtype(np.float32), count * item_size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for factors in extra.values():
        writer.write_tensor_data(factors)
    for info in tensors:
        values = checkpoint.read(info.name)
        writer.write_tensor_data(gguf.quants.quantize(values, bfloat16) if values.ndim == 2 else values)
    writer.close()


def _add_vocabulary(gguf: Any, writer: Any, checkpoint: Checkpoint, size: int) -> None:
    """Add the checkpoint's tokenizer. Ids without a token are unused."""
    kinds = gguf.TokenType
    tokens = {i: (f"[{i}]", 0.0, kinds.UNUSED) for i in range(size)}
    pieces = read_pieces(checkpoint.folder / "tokenizer.model")
    tokens |= {i: (piece.text, piece.score, kinds(piece.type)) for i, piece in enumerate(pieces)}
    added = read_json_object(checkpoint.folder / "added_tokens.json")
    tokens |= {i: (text, 0.0, kinds.CONTROL) for text, i in added.items()}
    texts, scores, types = zip(*(tokens[i] for i in range(size)), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_vocab_size(size)
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(read_json_object(checkpoint.folder / "config.json")["bos_token_id"])
    writer.add_eos_token_id(added["<|endoftext|>"])
    writer.add_add_bos_token(False)


def _file_type(llama_cpp: Any, name: str) -> int:
    """Return llama.cpp's number of a format."""
    number = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}", None)
    if number is None:
        raise UsageError(f"llama.cpp has no format {name}; choose one such as {' or '.join(FORMATS)}.")
    return int(number)


def _quantize(llama_cpp: Any, source: Path, output: Path, file_type: int) -> None:
    """Quantize with llama.cpp's mixture for the format, which gives some tensors more bits than its name says."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), ctypes.byref(parameters)):
        raise FusionError(f"llama.cpp failed to write {output.name}; see its output above.")


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise FusionError(f"{package} is not installed; run pip install {package}.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fusion_edge.benchmarks.peers.export_llm",
        description="Export the LLM of a FUSION-Phi checkpoint for another engine.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("hugging-face", "write a Phi-3 folder of links"), ("gguf", "write GGUF files for llama.cpp")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("checkpoint", type=Path, help="FUSION-Phi checkpoint folder")
        command.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
        if name == "gguf":
            text = f"llama.cpp format or {PLAIN}, repeatable (default: {', '.join(FORMATS)})"
            command.add_argument("--format", action="append", help=text)
    return run_command(_main, parser.parse_args(argv))


def _main(arguments: argparse.Namespace) -> int:
    if arguments.command == "hugging-face":
        write_hugging_face(arguments.checkpoint, arguments.output)
    else:
        write_gguf(arguments.checkpoint, arguments.output, arguments.format or FORMATS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
