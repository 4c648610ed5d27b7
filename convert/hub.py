"""Checkpoints from a hub. A download that broke off goes on where it ended, in the middle of a file too.

ModelScope's own library does that. Hugging Face's begins an unfinished file again in a new process, so here it only
says what the files are and where; `convert.download` fetches them.
"""

from __future__ import annotations

import concurrent.futures
import fnmatch
import importlib
import re
import threading
from pathlib import Path
from typing import Any

from convert import download as http
from keye_jax.errors import UserError
from keye_jax.progress import PhaseProgress

# Weights, configurations, tokenizer and templates; neither code nor pictures.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "*.md"]

_PARALLEL = 4


def download(
    *,
    hf: str | None = None,
    modelscope: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: PhaseProgress | None = None,
) -> Path:
    """Fetches the checkpoint `hf` or `modelscope`, or what is still missing of it, and returns its directory.

    Args:
      hf: an id on the Hugging Face Hub, `owner/name`. `HF_ENDPOINT` in the environment names another server.
      modelscope: an id on ModelScope; `MODELSCOPE_ENDPOINT` does the same.
      revision: a branch, tag or commit; the newest without it.
      cache_dir: where to keep it, in place of the hub's own cache directory.
      progress: called with "download", bytes done and bytes in all; ModelScope's library shows its own progress.

    Raises:
      UserError: the library is not installed, there is no such checkpoint or revision, or the hub cannot be reached.
    """
    option, name = ("--hf", hf) if hf is not None else ("--modelscope", modelscope)
    assert name is not None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{option} is {name!r}; it must be an id such as owner/name")
    library = _library("huggingface_hub" if option == "--hf" else "modelscope", option)
    try:
        if option == "--hf":
            return _from_hugging_face(library, name, revision, cache_dir, progress or (lambda phase, done, total: None))
        cache = None if cache_dir is None else str(cache_dir)
        return Path(library.snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=PATTERNS))
    except Exception as error:
        # The libraries raise whatever their network stacks do; all of it means the same to the user.
        at = "" if revision is None else f" at revision {revision!r}"
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"{option} {name}{at} could not be downloaded: {reason} (the same command continues the download)"
        ) from error


def _library(name: str, option: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{option} needs the package {name}; install it with: pip install 'keye-jax[hub]'") from error


def _from_hugging_face(
    library: Any, name: str, revision: str | None, cache_dir: Path | None, progress: PhaseProgress
) -> Path:
    info = library.HfApi().model_info(name, revision=revision)
    files = [file.rfilename for file in info.siblings]
    wanted = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in PATTERNS) and "/" not in file]
    cache = cache_dir or Path(library.constants.HF_HOME) / "keye-jax"
    # The commit fixes every file's content, so parts of files can be trusted.
    directory = cache / name.replace("/", "--") / info.sha
    directory.mkdir(parents=True, exist_ok=True)
    missing = [file for file in wanted if not (directory / file).exists()]
    headers = library.utils.build_hf_headers()
    remotes = {file: _remote(library, name, file, info.sha, headers) for file in missing}
    parts = (http.part_of(directory / file) for file in missing)
    done = sum((directory / file).stat().st_size for file in wanted if file not in remotes)
    total = done + sum(remote.size for remote, _ in remotes.values())
    meter = http.Meter(progress, done + sum(part.stat().st_size for part in parts if part.exists()), total)
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(_PARALLEL) as pool:
        try:
            jobs = [
                pool.submit(http.fetch, remote, directory / file, headers=sent, advance=meter.advance, stop=stop)
                for file, (remote, sent) in remotes.items()
            ]
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return directory


def _remote(
    library: Any, name: str, file: str, commit: str, headers: dict[str, str]
) -> tuple[http.RemoteFile, dict[str, str]]:
    """A file, and the headers that may be sent to the server that has it."""
    page = library.hf_hub_url(name, file, revision=commit)
    metadata = library.get_hf_file_metadata(page)
    digest = metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else None

    def url() -> str:
        return library.get_hf_file_metadata(page).location

    # Storage elsewhere is addressed by signed URLs: the user's token is not for it.
    own = http.same_host(page, metadata.location)
    sent = headers if own else {key: value for key, value in headers.items() if key.lower() != "authorization"}
    return http.RemoteFile(url, metadata.size, digest), sent
