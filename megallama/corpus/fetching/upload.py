"""A build whose output is a URL: made in the cache folder of this node, then put there, the index last."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

from megallama.data.node_cache import CACHE, cache_folder
from megallama.errors import UserError
from megallama.system.lock import output_lock
from megallama.system.remote import is_url, remote_exists, remove_remote, upload


@contextmanager
def local_output(output: str, *, force: bool) -> Iterator[str]:
    """The prefix under which to build: `output`, or for a URL one on this node, which is uploaded in the end.

    What was built or begun stays on the node until it is uploaded, so the same command continues. UserError if a
    dataset is there, unless `force`, or the storage refuses.
    """
    if not is_url(output):
        yield output
        return
    folder = cache_folder() / "builds" / hashlib.sha256(output.encode()).hexdigest()[:32]
    prefix = folder / PurePosixPath(output).name
    try:
        _check_free(output, force)
        made_in, other = f"--output {output}, built in {folder},", f"--output, or set {CACHE} to another folder"
        with output_lock(folder / ".lock", made_in, other):
            yield str(prefix)
            _check_free(output, force)  # another node may have been faster
            remove_remote(f"{output}.idx")  # the index vouches for the two other files: it goes first, comes last
            for suffix in (".bin", ".json", ".idx"):
                upload(prefix.with_name(prefix.name + suffix), output + suffix)
            shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"the dataset cannot be uploaded to --output {output} ({error.strerror}); it is in {folder}, mend that and "
            "repeat the command, or choose another --output"
        ) from None


def _check_free(output: str, force: bool) -> None:
    if not force and remote_exists(f"{output}.idx"):
        raise UserError(f"{output}.idx exists; add --force to replace that dataset or choose another --output")


def check_on_disk(option: str, output: str) -> None:
    """UserError if the output is a URL: parts are joined where they are."""
    if is_url(output):
        raise UserError(
            f"{option} {output} is a URL, and parts are built and merged on a disk that the nodes share; name a prefix "
            "there, and upload what is merged"
        )
