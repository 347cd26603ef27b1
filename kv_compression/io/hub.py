"""The Hugging Face hub: whether it answers, downloads, and uploads of a run's folder. Its errors take one line."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from kv_compression.io.errors import RunError, UsageError, one_line

# The files of a run or an exported model that others need. Only these are uploaded.
SHARED = ("README.md", "results.json", "adapter_config.json", "adapter_model.safetensors", "config.json")
SHARED += ("generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors")
SHARED += ("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHARED += ("added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
LONGEST_NAME = 96


def check_hub(name: str, kind: str, instead: str) -> None:
    """Raise RunError unless the hub answers for a "model" or "dataset". Does nothing if the user works offline.

    It is asked once, with a short timeout: the libraries' downloads retry for a minute before they give up. `instead`
    names the flags for local files.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=10)
    except Exception as error:
        raise RunError(
            f"the {kind} {name} could not be reached on the Hugging Face hub ({one_line(error)}): use {instead}; "
            "HF_HUB_OFFLINE=1 uses what was downloaded before"
        ) from error


def fetch(repository: str, name: str, revision: str | None = None) -> Path:
    """A file of a model's repository, downloaded once. RunError if it does not exist or the hub does not answer."""
    api = huggingface_hub.HfApi()
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            api.repo_info(repository, revision=revision, timeout=10)
        return Path(api.hf_hub_download(repository, name, revision=revision))
    except Exception as error:
        raise RunError(f"there is no {name} of {repository} on the Hugging Face hub ({one_line(error)})") from error


def snapshot(repository: str, revision: str | None = None) -> str:
    """The folder with the `SHARED` files of a model's repository. RunError if the hub does not answer."""
    try:
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(SHARED))
    except Exception as error:
        raise RunError(f"{repository} could not be downloaded from the Hugging Face hub ({one_line(error)})") from error


def destination(asked: str, folder: Path) -> str:
    """The repository that `folder` is uploaded to, as owner/name; a name without an owner is the user's.

    If "" was `asked` for, it is named after the folder, in characters that the hub allows. UsageError if the name is
    invalid; RunError if there is no token that may write, or the hub does not answer.
    """
    name = asked or repository_name(folder.resolve().name)
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {name}: not the name of a repository: {one_line(error)}") from error
    try:
        user = huggingface_hub.HfApi().whoami()
        owner, role = user["name"], user.get("auth", {}).get("accessToken", {}).get("role")
    except LocalTokenNotFoundError as error:
        raise RunError("--push_to_hub needs a token: log in with hf auth login, or set HF_TOKEN") from error
    except Exception as error:
        raise RunError(f"--push_to_hub: the Hugging Face hub did not confirm the token ({one_line(error)})") from error
    if role == "read":
        raise RunError(f"--push_to_hub: the token of {owner} may only read: take one that may write")
    return name if "/" in name else f"{owner}/{name}"


def repository_name(text: str) -> str:
    """`text` in the characters of a repository's name: A-Z a-z 0-9 . _ -, no two dots or dashes in a row."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    name = re.sub(r"([.-])[.-]+", r"\1", name)[:LONGEST_NAME].strip(".-")
    return name or "run"


def push(folder: Path, repository: str, private: bool | None = None) -> str:
    """Upload the `SHARED` files of a folder to a repository, creating it if needed; returns its address.

    RunError if the hub refuses or does not answer.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        message = f"{folder.resolve().name} by kv_compression"
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(SHARED), commit_message=message)
    except Exception as error:
        raise RunError(
            f"{folder} could not be uploaded to {repository} ({one_line(error)}): it stays as it is, and the same "
            "command tries again"
        ) from error
    return str(address)
