"""Weights from and to Hugging Face's GPT-2 format: a folder with config.json and model.safetensors.

Its matrices are stored transposed (transformers' Conv1D), its vocabulary without padding, its tied head not at all.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flashlab.errors import UserError, replacing, write_text
from flashlab.gpt2.config import GPTConfig
from flashlab.gpt2.model import EPSILON, GPT

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}  # and its defaults
# What else decides the result: the value that it has when it is missing, and those that this model computes.
COMPUTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, ("gpt2",)),
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "layer_norm_epsilon": (EPSILON, (EPSILON,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
}
# Options of `GPTConfig` for which the format has no word, and what it always is.
GPT2_ONLY = {"position": "learned", "norm": "layernorm", "mlp": "gelu"}
TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
PADDED = ("wte.weight", "lm_head.weight")
PREFIX = "transformer."  # which the first published files do not have


def read_config(folder: Path) -> GPTConfig:
    """Read the shape of a model in Hugging Face's format.

    Raises:
        UserError: there is no such file, it is damaged, or it describes another model than GPT-2.
    """
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shape = {name: found.get(name, default) for name, default in SHAPE.items()}
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; name a folder that holds {CONFIG} and {WEIGHTS}, as `flashlab gpt2 "
            "export` makes it of a run"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: cannot read it ({_one_line(error)}); fetch it again") from error
    for name, (default, computed) in COMPUTED.items():
        if (value := found.get(name, default)) not in computed:
            wanted = " or ".join(map(str, computed))
            raise UserError(f"{path}: {name} is {value}, where GPT-2's is {wanted}; name a GPT-2 model")
    for name, value in shape.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {name} must be a whole number from 1 on; got {value!r}; fetch it again")
    config = GPTConfig(block_size=shape.pop("n_positions"), **shape, tie_weights=found.get("tie_word_embeddings", True))
    if found.get("n_inner") not in (None, config.n_inner):
        raise UserError(f"{path}: n_inner is {found['n_inner']}, where GPT-2's is 4 n_embd; name a GPT-2 model")
    return config


@torch.no_grad()
def load(model: GPT, folder: Path) -> None:
    """Replace a model's weights by those in a folder in Hugging Face's format. If that fails, they stay as they were.

    ``GPT(read_config(folder))`` makes a model that they fit.

    Raises:
        UserError: a file is missing or damaged, the model there is no GPT-2 or has another shape, or the package
            safetensors is not installed.
    """
    _package()
    there, here = read_config(folder), model.config
    for name in (*GPT2_ONLY, "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "tie_weights"):
        if (value := getattr(there, name)) != getattr(here, name):
            raise UserError(f"{folder}: {name} is {value}, and {getattr(here, name)} in the model; make them the same")
    parameters = dict(model.named_parameters())
    shapes = {name: _shape_there(here, name, list(parameter.shape)) for name, parameter in parameters.items()}
    found: dict[str, tuple[Path, str]] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                name = key.removeprefix(PREFIX)
                if name not in shapes:  # masks that old files hold
                    continue
                if (shape := file.get_slice(key).get_shape()) != shapes[name]:
                    raise UserError(f"{path}: {key} is {shape}, and {shapes[name]} by {CONFIG}; fetch both again")
                found[name] = path, key
    if missing := sorted(shapes.keys() - found.keys()):
        raise UserError(f"{folder}: {_count(missing)} missing from {WEIGHTS}; fetch it again")
    for path in {path for path, _ in found.values()}:
        with _opened(path) as file:
            for name, (source, key) in found.items():
                if source == path:
                    weight = file.get_tensor(key)
                    rows = parameters[name][: here.vocab_size] if name in PADDED else parameters[name]
                    rows.copy_(weight.T if TRANSPOSED.search(name) else weight)


@torch.no_grad()
def save(model: GPT, folder: Path) -> None:
    """Write a model in Hugging Face's GPT-2 format, for ``transformers.GPT2LMHeadModel.from_pretrained`` and `load`.

    A model without biases is written with zeros for them, which compute the same.

    Raises:
        UserError: the model is no GPT-2 (rotary positions, RMSNorm or SwiGLU), the folder cannot be written, or the
            package safetensors is not installed.
    """
    safetensors, config = _package(), model.config
    for name, value in GPT2_ONLY.items():
        if getattr(config, name) != value:
            raise UserError(
                f"Hugging Face's GPT-2 format has no {getattr(config, name)} {name}; keep the checkpoint as it is"
            )
    weights = {}
    for name, parameter in model.named_parameters():
        weight = parameter[: config.vocab_size] if name in PADDED else parameter
        weights[name] = (weight.T if TRANSPOSED.search(name) else weight).cpu().contiguous()
        if not config.bias and name.endswith(".weight") and name not in (*PADDED, "wpe.weight"):
            weights[name.replace(".weight", ".bias")] = torch.zeros(parameter.shape[0], dtype=parameter.dtype)
    named = {name if name == "lm_head.weight" else PREFIX + name: weight for name, weight in weights.items()}
    # As bytes: its save_file hides what the file system says, and makes a file that only its owner can read.
    content = safetensors.torch.save(named, metadata={"format": "pt"})  # transformers asks for this format
    with replacing(folder / WEIGHTS) as partial:
        partial.write_bytes(content)
        write_text(folder / CONFIG, json.dumps(_describe(model), indent=2) + "\n")


def _describe(model: GPT) -> dict[str, Any]:
    config = model.config
    end_of_text = config.vocab_size - 1  # of bytes as well as of GPT-2's tokenizer
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": EPSILON,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(model.wte.weight.dtype).removeprefix("torch."),
    }


def _shape_there(config: GPTConfig, name: str, shape: list[int]) -> list[int]:
    if name in PADDED:
        return [config.vocab_size, *shape[1:]]
    return shape[::-1] if TRANSPOSED.search(name) else shape


def _weight_files(folder: Path) -> list[Path]:
    """Find the files of weights: one, or those that an index names."""
    if (index := folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: cannot read it ({_one_line(error)}); fetch it again") from error
    return [folder / WEIGHTS]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = _package()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; fetch it, or save the model as safetensors") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot read it ({_one_line(error)}); fetch it again") from error


def _package() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError:
        raise UserError("the package safetensors is not installed; `pip install safetensors`") from None
    return safetensors


def _count(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors are"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
