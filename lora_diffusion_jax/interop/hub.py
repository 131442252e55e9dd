"""Weights on the Hugging Face Hub: fetched by hf://OWNER/NAME, and folders uploaded.

Of a repository only .safetensors files are fetched, into the cache of huggingface_hub; a file's own
metadata describe its network. Nothing from the Hub is ever run.
"""

import contextlib
import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_diffusion_jax import remote
from lora_diffusion_jax.errors import UserError, needs_package, printable
from lora_diffusion_jax.files import HUB
from lora_diffusion_jax.untrusted import reason

WEIGHTS = "model.safetensors"  # in a repository, where hf:// names no file
_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_URL = re.compile(rf"hf://(?P<repo>{_REPO})(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+))?")


def repo_of(path: str) -> str:
    """OWNER/NAME of hf://OWNER/NAME[@REVISION][/FILE]; '' for any other path."""
    match = _URL.fullmatch(path)
    return match["repo"] if match else ""


def local(path: str | os.PathLike, name: str = "path") -> str:
    """A path of weights as a user gives it, on this machine: hf://OWNER/NAME[@REVISION][/FILE] is fetched.

    A folder that --mode=push wrote stands for its file of weights.

    Args:
        path: see `remote.local` for those that are not on the Hub. A revision is a branch, a tag or a
            commit, with %2F for its slashes.
        name: the flag or config field that it comes from, for messages.

    Raises:
        UserError: no such repository, revision or file; no network; huggingface_hub is not installed.
    """
    if not str(path).startswith(HUB):
        found = remote.local(path, name)
        weights = Path(found) / WEIGHTS
        return str(weights) if weights.is_file() else found
    match = _URL.fullmatch(str(path))
    if match is None:
        raise UserError(
            f"{name}={path} names no file on the Hugging Face Hub; write hf://OWNER/NAME, with @REVISION or "
            "/FILE.safetensors behind it where it has several."
        )
    file = match["file"]
    if file and not file.endswith(".safetensors"):
        raise UserError(f"{name}={path}: only .safetensors files are fetched from the Hub.")
    hub = _hub(f"{name}={path}")
    revision = urllib.parse.unquote(match["revision"]) if match["revision"] else None
    with _plain_errors(f"{name}={path}"):
        try:
            return hub.hf_hub_download(match["repo"], file or WEIGHTS, revision=revision)
        except hub.errors.LocalEntryNotFoundError:
            raise
        except hub.errors.EntryNotFoundError:
            if file:
                raise
        names = hub.HfApi().list_repo_files(match["repo"], revision=revision)
        found = [n for n in names if n.endswith(".safetensors")]
        if len(found) != 1:
            listed = f"several: {', '.join(map(printable, found[:8]))}" if found else "none"
            raise UserError(
                f"{name}={path} has no {WEIGHTS}, and of other .safetensors files {listed}; name one as "
                f"hf://{match['repo']}/FILE.safetensors."
            )
        return hub.hf_hub_download(match["repo"], found[0], revision=revision)


def check_repo(repo: str) -> None:
    """Raises UserError unless this is OWNER/NAME, and huggingface_hub is installed."""
    if not re.fullmatch(_REPO, repo):
        raise UserError(
            f"--repo={repo} is no repository on the Hugging Face Hub; write OWNER/NAME."
        )
    _hub(f"--repo={repo}")


def upload(folder: Path, repo: str, message: str, *, private: bool) -> str:
    """Uploads a folder as one commit, creating the repository where it is missing; returns its address.

    Raises:
        UserError: there is no login, no right to write there, or no network.
    """
    hub = _hub(f"--repo={repo}")
    with _plain_errors(f"--repo={repo}"):
        url = hub.HfApi().create_repo(repo, private=private or None, exist_ok=True)
        hub.HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return str(url)


def _hub(wanted: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise UserError(needs_package(wanted, error.name, "train,eval,hub")) from error
    return huggingface_hub


@contextlib.contextmanager
def _plain_errors(wanted: str) -> Iterator[None]:
    """Whatever huggingface_hub raises as one sentence."""
    from huggingface_hub import errors

    # In this order: some are kinds of others.
    advice = {
        errors.GatedRepoError: "Its owner must grant access; ask there, then `hf auth login`",
        errors.RepositoryNotFoundError: "There is no such repository, or it is private; check its name, or "
        "log in with `hf auth login`",
        errors.RevisionNotFoundError: "There is no such revision; name a branch, a tag or a commit",
        errors.LocalEntryNotFoundError: "It is not in the cache, and the Hub cannot be reached; check the "
        "network",
        errors.EntryNotFoundError: "The repository has no such file; check its name",
        errors.LocalTokenNotFoundError: "Log in first, with `hf auth login` or HF_TOKEN",
    }
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = [text for kind, text in advice.items() if isinstance(error, kind)]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if not found and status in (401, 403):
            found = ["It may not be used with this login; `hf auth login` with a token that may"]
        text = found[0] if found else "Check the network and the name, and try again"
        raise UserError(
            f"{wanted} failed on the Hugging Face Hub ({reason(error)}). {text}."
        ) from error
