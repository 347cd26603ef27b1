"""The model of a run: before training, and afterwards with its adapter merged in."""

import os
from dataclasses import fields, replace
from pathlib import Path

import huggingface_hub
import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_utils import load_state_dict

from kv_compression.data import embedded
from kv_compression.data.reading import OFFLINE
from kv_compression.io.errors import RunError, UsageError, one_line
from kv_compression.io.hub import check_hub
from kv_compression.io.results import ADAPTER_FILE, results_of_run
from kv_compression.methods import METHODS
from kv_compression.model.architectures import positions_of
from kv_compression.model.attention import FLEX, SORTED_FLEX
from kv_compression.model.vocabulary import add_sentinels
from kv_compression.settings import EMBEDDED, OPTIONS_OF_METHODS, Settings

ADAPTER = ("adapter_config.json", ADAPTER_FILE)


def load_model(
    settings: Settings, as_stored: bool = False
) -> tuple[transformers.PreTrainedTokenizerBase, nn.Module, str | None]:
    """The tokenizer, the model (with bf16 weights under bf16 autocast) and the model's revision.

    `as_stored` keeps the precision in which the weights are stored (`stored_dtype`). UsageError if settings do not fit
    the model or the machine, RunError if the model cannot be loaded.
    """
    name = settings.model_name_or_path
    local = embedded.embedded_model() if name == EMBEDDED else name
    dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else torch.float32
    for flag, place in (("model_name_or_path", local), ("tokenizer_name", settings.tokenizer_name or local)):
        if place.startswith(("/", ".", "~")) and not os.path.isdir(place):
            raise UsageError(f"--{flag} {place}: no such folder")
        if not os.path.isdir(place):
            check_hub(place, "model", f"{OFFLINE} with --{flag}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            settings.tokenizer_name or local, trust_remote_code=False
        )
        if as_stored:
            dtype = stored_dtype(Path(local) if os.path.isdir(local) else _snapshot(name))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            local, dtype=dtype, attn_implementation=settings.attn_implementation, trust_remote_code=False
        )
    except Exception as error:  # loaders raise whatever their parsers do
        raise RunError(f"the model {local} cannot be loaded: {one_line(error)}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if settings.tokenizer_name and len(tokenizer) > rows:
        raise UsageError(f"--tokenizer_name {settings.tokenizer_name}: {len(tokenizer)} tokens, the model has {rows}")
    attention = settings.attn_implementation
    if attention in (FLEX, SORTED_FLEX) and not torch.cuda.is_available() and not settings.eval_only:
        raise UsageError(f"{attention} cannot train on a CPU: use --attn_implementation sdpa")
    if name == EMBEDDED:
        return tokenizer, model, embedded.embedded_revision()
    snapshot = None if os.path.isdir(local) else _snapshot(name)
    return tokenizer, model, snapshot and snapshot.name


def _snapshot(name: str) -> Path | None:
    """The folder of a hub model in the hub's cache, which is named by its commit; None if it is not there."""
    path = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(path).parent if isinstance(path, str) else None


def check_length(model: nn.Module, block_size: int) -> None:
    """Raise UsageError if the model has fewer positions than a block has tokens."""
    positions = positions_of(model.config)
    if positions is not None and block_size > positions:
        raise UsageError(f"--block_size {block_size} is longer than the model's {positions} positions")


def load_run(
    folder: str, mixed_precision: str, adapter: Path | None = None
) -> tuple[transformers.PreTrainedTokenizerBase, nn.Module, Settings]:
    """The tokenizer, the merged model and the settings of a finished run of run_clm.py.

    With `adapter`, a folder, the adapter there takes the place of the run's last.

    The adapter is merged in fp32, layer by layer; under bf16 the merged weights are rounded once. UsageError if
    `folder` holds no run, RunError if the run is damaged or its model cannot be loaded.
    """
    settings = recorded_settings(results_of_run(folder), folder)
    exact = replace(settings, mixed_precision="no", eval_only=True)
    tokenizer, model, _ = load_model(exact, as_stored=True)
    if any(buffer.is_floating_point() and buffer.dtype != torch.float32 for buffer in model.buffers()):
        del model  # buffers take part in the computation: they must stay exact
        tokenizer, model, _ = load_model(exact)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embedding is not None:
            cast(embedding, torch.float32)  # new rows are means
    if METHODS[settings.method].uses_sentinels:
        add_sentinels(tokenizer, model)
    folder = folder if adapter is None else str(adapter)
    # If one is missing, peft would look for another file, which may be pickled, and then on the hub.
    for name in ADAPTER:
        if not (Path(folder) / name).is_file():
            raise RunError(f"the adapter in {folder} cannot be loaded: there is no {name}")
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if type(config) is not peft.LoraConfig or config.megatron_config:  # which names a module to import
            raise ValueError("run_clm.py did not write it")
        model = peft.PeftModel.from_pretrained(model, folder, config=config)
        model = merge_adapter(model, torch.bfloat16 if mixed_precision == "bf16" else torch.float32).eval()
    except Exception as error:  # the loader raises whatever its parsers do
        raise RunError(f"the adapter in {folder} cannot be loaded: {one_line(error)}") from error
    return tokenizer, model, settings


def load_adapter(model: peft.PeftModel, folder: str) -> None:
    """Put the adapter of a finished run into a model of `add_lora`. RunError if it is damaged or another model's."""
    try:
        weights = load_file(Path(folder) / ADAPTER_FILE)
        found = peft.set_peft_model_state_dict(model, weights)
        # Parameters that are shared, as the rows of a tied output embedding are, stand in the file once.
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        if found.unexpected_keys or trained & set(found.missing_keys):
            raise ValueError("it is of another model")
    except Exception as error:  # the loader raises whatever its parsers do
        raise RunError(f"the adapter in {folder} cannot be loaded: {one_line(error)}") from error


def recorded_settings(results: dict, folder: str) -> Settings:
    """The settings in a run's results; RunError if no run can have them."""
    names = {field.name for field in fields(Settings)}
    recorded = {name: value for name, value in results["settings"].items() if name in names}
    try:
        settings = Settings(**recorded)
        settings.check()
    except (TypeError, ValueError) as error:
        raise RunError(f"the settings in {folder}/results.json are damaged: {one_line(error)}") from error
    return settings


def under_method(trained: Settings, method: str) -> Settings:
    """A run's settings under a method; another than the run's has none of the run's options."""
    others = {} if method == trained.method else {name: getattr(Settings, name) for name in OPTIONS_OF_METHODS}
    return replace(trained, **others | {"method": method})


HALVES = {torch.float16, torch.bfloat16}


def stored_dtype(folder: Path | None) -> torch.dtype:
    """fp16 or bf16 if all floating-point weights in `folder` are stored so, else fp32, which holds either exactly."""
    found: set[torch.dtype] = set()
    try:
        files = [] if folder is None else [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
        for path in files:
            weights = load_state_dict(path, map_location="meta")  # shapes and dtypes alone
            found |= {weight.dtype for weight in weights.values() if weight.is_floating_point()}
    except Exception:  # readers raise whatever their parsers do, and loading says what is wrong
        found = set()
    return found.pop() if len(found) == 1 and found <= HALVES else torch.float32


def merge_adapter(model: peft.PeftModel, dtype: torch.dtype) -> nn.Module:
    """The base model with the adapter merged in, its parameters in `dtype`.

    Each layer is merged in fp32 and rounded once, one after another: never is more than one of them held in fp32.
    Buffers stay as they are: the angles of rotary embeddings stay exact.
    """
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        cast(base, torch.float32, copy=True)  # a weight may be a mapped file, which would keep what is written to it
        layer.merge()
        cast(base, dtype)
    merged = model.unload()
    cast(merged, dtype)
    merged.config.dtype = dtype
    return merged


def cast(module: nn.Module, dtype: torch.dtype, copy: bool = False) -> None:
    """Put a module's parameters, and no buffers, into `dtype`, in memory of their own with `copy`."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype, copy=copy)
