"""Talking to the Hugging Face hub: whether it answers, who asks, and a folder's way there.

Knows repositories and names of files; what a folder holds is its maker's business. Whatever goes wrong takes one line.
"""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from kv_compression.io.errors import RunError, UsageError, one_line

# What others need of a run or an exported model, by its very names: whatever else lies there stays here.
SHARED = ("README.md", "results.json", "adapter_config.json", "adapter_model.safetensors", "config.json")
SHARED += ("generation_config.json", "model.safetensors", "model-?????-of-?????.safetensors")
SHARED += ("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHARED += ("added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
LONGEST_NAME = 96


def check_hub(name: str, kind: str, instead: str) -> None:
    """Raise RunError unless the hub answers for a "model" or "dataset"; says nothing where the user works offline.

    Asked once and briefly: the libraries' own downloads try again for a minute before they give up. `instead` says
    which flags take something local.
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
    """A file of a model's repository, downloaded once. RunError if it is not there or the hub cannot be reached."""
    api = huggingface_hub.HfApi()
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            api.repo_info(repository, revision=revision, timeout=10)
        return Path(api.hf_hub_download(repository, name, revision=revision))
    except Exception as error:
        raise RunError(f"there is no {name} of {repository} on the Hugging Face hub ({one_line(error)})") from error


def snapshot(repository: str, revision: str | None = None) -> str:
    """The folder with what `SHARED` names of a model's repository. RunError if the hub cannot be reached."""
    try:
        return huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(SHARED))
    except Exception as error:
        raise RunError(f"{repository} cannot be had from the Hugging Face hub ({one_line(error)})") from error


def destination(asked: str, folder: Path) -> str:
    """The repository that `folder` goes to, as owner/name: the one `asked` for, or the user's own of that name.

    With "" the folder's name is taken, in letters that the hub allows. UsageError if the name cannot be one; RunError
    if there is no token, or none that may write, or the hub does not answer.
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
        raise RunError(f"--push_to_hub: the Hugging Face hub does not know who asks ({one_line(error)})") from error
    if role == "read":
        raise RunError(f"--push_to_hub: the token of {owner} may only read: take one that may write")
    return name if "/" in name else f"{owner}/{name}"


def repository_name(text: str) -> str:
    """`text` in the letters that a repository's name may have: A-Z a-z 0-9 . _ -, no two dots or dashes in a row."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    name = re.sub(r"([.-])[.-]+", r"\1", name)[:LONGEST_NAME].strip(".-")
    return name or "run"


def push(folder: Path, repository: str, private: bool | None = None) -> str:
    """Upload what others need of a folder, into a repository that is made if there is none; returns its address.

    RunError if the hub refuses, or cannot be reached.
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
