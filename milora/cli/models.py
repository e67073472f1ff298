"""Loading a base model, its tokenizer and an adapter, with plain errors for what a user can fix."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from milora.cli.memory import check_memory
from milora.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_options(parser, *, adapter: bool, required: bool = True) -> None:
    """`--model`, `--adapter`, `--dtype`, `--device`."""
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        required=required,
        help="folder of the base model, or its id on the Hugging Face Hub. A folder is read "
        "without any network call",
    )
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="folder that `milora train` wrote")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the base model (default: its own)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: auto)")


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """The library's errors about what it was given are, on the command line, the user's."""
    try:
        yield
    except kinds as error:
        raise UserError(str(error)) from error


def is_local(model: str) -> bool:
    """Whether `model` names a folder.

    Raises:
        UserError: it looks like a path, and there is no such folder.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return True
    looks_like_path = model.startswith((".", "/", "~", "\\")) or model.count("/") > 1
    if looks_like_path or path.exists():
        raise UserError(f"no model folder at {model}")
    return False


def go_offline() -> None:
    """Forbid network calls of the Hub's client, in this process and in those that it starts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # The client reads the variable once, when it is imported.
    if (constants := sys.modules.get("huggingface_hub.constants")) is not None:
        constants.HF_HUB_OFFLINE = True


def pick_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"--device must be auto, cpu or cuda[:N], got {device!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: torch sees no GPU here")
    return device


def load_model(model: str, dtype: str = "auto", device: str = "auto"):
    """Load a causal language model and its tokenizer.

    Returns: model (in eval mode, on the device), tokenizer.

    Raises:
        UserError: no such model, not a causal language model, no safetensors weights, or too
            little memory.
    """
    local = is_local(model)
    if local:
        # Absolute, since adapters keep the name of their base, and are used from other folders.
        model = str(Path(model).expanduser().resolve())
        go_offline()
    device = pick_device(device)
    quiet()
    import transformers

    config = _load_config(model, local)
    _check_causal(model, config)
    if local:
        _check_fits(Path(model), dtype, device)
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, use_safetensors=True, local_files_only=local
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=local)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {model}: {_first_line(error)}") from error
    return loaded.to(device).eval(), tokenizer


def meta_model(model: str):
    """The causal language model in a folder without its weights: shapes alone, on the meta device.

    Raises:
        UserError: no such model, or not a causal language model.
    """
    import torch

    go_offline()
    quiet()
    import transformers

    config = _load_config(model, local=True)
    _check_causal(model, config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def load_adapter(model, adapter: str) -> None:
    """Put a saved adapter on a model.

    Raises:
        UserError: no such folder, or its files do not fit the model.
    """
    import milora

    if not Path(adapter).is_dir():
        raise UserError(f"no adapter folder at {adapter}")
    with user_errors(FileNotFoundError, ValueError):
        milora.load(model, adapter)


def max_positions(model) -> int | None:
    """Tokens that a text may have, prompt and answer together; None: the model names no limit.

    Past it a table of positions has no row (GPT-2, OPT), and rotary models were never trained.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def quiet() -> None:
    """transformers' own bars and advice would drown the command's output."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _load_config(model: str, local: bool):
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(model, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {model} as a model: {_first_line(error)}") from error


def _check_causal(model: str, config) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = config.architectures or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if config.is_encoder_decoder or (classes and not known.intersection(classes)):
        found = ", ".join(classes) or config.model_type
        raise UserError(f"{model} is not a causal language model: its class is {found}")


def _check_fits(folder: Path, dtype: str, device: str) -> None:
    """Compare the bytes of the weights, as they will be loaded, with what is free."""
    import torch
    from safetensors import SafetensorError

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} has no .safetensors weights",
            hint="convert it once: model.save_pretrained(folder); pickled weights are not loaded",
        )
    needed = sum(file.stat().st_size for file in files)
    if dtype != "auto":
        width = getattr(torch, dtype).itemsize
        with user_errors(SafetensorError):
            needed = width * sum(_num_elements(file) for file in files)
    check_memory(needed, device, f"the model in {folder}")


def _num_elements(file: Path) -> int:
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:  # reads the header alone
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return sum(torch.Size(shape).numel() for shape in shapes)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
