"""Downloads checkpoints from a hub. A download that broke off continues, also in the middle of a file.

ModelScope's library does that itself. In a new process, Hugging Face's library starts an unfinished file again.
Therefore it only lists the files and their URLs here, and `convert.download` downloads them.
"""

from __future__ import annotations

import concurrent.futures
import fnmatch
import importlib
import re
import threading
from pathlib import Path
from typing import Any

from convert import buckets, storage
from convert import download as http
from keye_jax.errors import UserError
from keye_jax.progress import PhaseProgress

# Weights, configurations, tokenizer, templates and licence; no code and no pictures.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "*.md"]

_THREADS = 4


def download(
    *,
    hf: str | None = None,
    modelscope: str | None = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    destination: Path | str | None = None,
    progress: PhaseProgress | None = None,
) -> Path:
    """Downloads the missing files of the checkpoint `hf` or `modelscope`, and returns its directory.

    Args:
      hf: an id on the Hugging Face Hub, `owner/name`. The environment variable `HF_ENDPOINT` names another server.
      modelscope: an id on ModelScope. The environment variable `MODELSCOPE_ENDPOINT` names another server.
      revision: a branch, tag or commit; None for the newest.
      cache_dir: directory for downloads; None for the default one, which docs/convert.md names.
      destination: where the checkpoint goes afterwards; its filesystem must have room for it.
      progress: called with "download", the bytes done and the bytes of all files. ModelScope's library does not call
        it, and shows its own progress.

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
            report = progress or (lambda phase, done, total: None)
            return _from_hugging_face(library, name, revision, cache_dir, destination, report)
        cache = None if cache_dir is None else str(cache_dir)
        return Path(library.snapshot_download(name, revision=revision, cache_dir=cache, allow_patterns=PATTERNS))
    except UserError:
        raise
    except Exception as error:
        # The libraries raise the exceptions of several network stacks. All of them mean the same to the user.
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
    library: Any,
    name: str,
    revision: str | None,
    cache_dir: Path | None,
    destination: Path | str | None,
    progress: PhaseProgress,
) -> Path:
    info = library.HfApi().model_info(name, revision=revision)
    files = [file.rfilename for file in info.siblings]
    wanted = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in PATTERNS) and "/" not in file]
    cache = cache_dir or Path(library.constants.HF_HOME) / "keye-jax"
    # The commit fixes the content of every file, so a partial file can be continued.
    directory = cache / name.replace("/", "--") / info.sha
    directory.mkdir(parents=True, exist_ok=True)
    missing = [file for file in wanted if not (directory / file).exists()]
    headers = library.utils.build_hf_headers()
    remotes = {file: _remote(library, name, file, info.sha, headers) for file in missing}
    parts = (http.part_of(directory / file) for file in missing)
    done = sum((directory / file).stat().st_size for file in wanted if file not in remotes)
    total = done + sum(remote.size for remote, _ in remotes.values())
    begun = sum(part.stat().st_size for part in parts if part.exists())
    _check_space(directory, total - done - begun, destination, total)
    meter = http.Meter(progress, done + begun, total)
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
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


def _check_space(cache: Path, missing: int, destination: Path | str | None, total: int) -> None:
    """Refuses a download that does not fit, or whose checkpoint does not fit where it goes afterwards."""
    storage.check_space("--cache-dir", cache, missing)
    if destination is None or buckets.parse(destination) is not None:
        return
    path = storage.resolve("DST", destination)
    there = path if path.is_dir() else storage.existing_parent(path)
    storage.check_space("DST", path, total + (missing if there.stat().st_dev == cache.stat().st_dev else 0))


def _remote(
    library: Any, name: str, file: str, commit: str, headers: dict[str, str]
) -> tuple[http.RemoteFile, dict[str, str]]:
    """A file, and the headers to send to the server that stores it."""
    page = library.hf_hub_url(name, file, revision=commit)
    metadata = library.get_hf_file_metadata(page)
    digest = metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else None

    def url() -> str:
        return library.get_hf_file_metadata(page).location

    # Another server gets a signed URL, and must not get the user's token.
    own = http.same_host(page, metadata.location)
    sent = headers if own else {key: value for key, value in headers.items() if key.lower() != "authorization"}
    return http.RemoteFile(url, metadata.size, digest), sent
