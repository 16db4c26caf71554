"""Which files of a dataset on the Hugging Face hub are meant, where they are, and what they must hash to.

`huggingface_hub` lists them, with its settings: HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE. The bytes
are brought by `download`: the library begins a file that was cut off again, and these have gigabytes. What it has in
its cache already is taken from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from megallama.corpus.fetching.download import Digest, Wanted
from megallama.errors import UserError

_KIND = "dataset"
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class HubPath:
    """hf://datasets/OWNER/NAME[@REVISION][/PATH]: a file, a folder or a pattern in a dataset of the hub."""

    repository: str
    revision: str
    path: str

    @classmethod
    def parse(cls, url: str) -> HubPath:
        """UserError if the URL is of another form."""
        form = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", url)
        if form is None:
            raise UserError(f"{url} names no dataset; write hf://datasets/OWNER/NAME or hf://datasets/OWNER/NAME/PATH")
        repository, revision, path = form.groups()
        return cls(repository, (revision or constants.DEFAULT_REVISION).replace("%2F", "/"), (path or "").strip("/"))

    @property
    def is_pattern(self) -> bool:
        """Whether the path has `*`, `?` or `[`."""
        return any(character in self.path for character in "*?[")

    @property
    def folder(self) -> str:
        """The longest path that all that is meant is below."""
        return re.split(r"[*?[]", self.path)[0].rpartition("/")[0]


def hub_files(place: HubPath, suffixes: tuple[str, ...]) -> list[Wanted]:
    """The files that `place` means, ordered by path; of a folder, those with one of the suffixes.

    UserError if there is none, or the hub refuses or cannot be reached. Without a network (HF_HUB_OFFLINE) those of
    its cache.
    """
    with _sentences(place):
        found = _cached(place, suffixes) if constants.HF_HUB_OFFLINE else _listed(place, suffixes)
    if not found:
        raise UserError(
            f"the dataset {place.repository} holds no {place.path or 'file that ends in ' + ', '.join(suffixes)}; look "
            f"at {constants.ENDPOINT}/datasets/{place.repository}/tree/{place.revision}"
        )
    return sorted(found, key=lambda file: file.name)


def _listed(place: HubPath, suffixes: tuple[str, ...]) -> list[Wanted]:
    api = HfApi()
    # The commit first: what is listed and what is fetched is of one state, whatever is pushed meanwhile.
    commit = api.dataset_info(place.repository, revision=place.revision).sha
    assert commit is not None
    files: Sequence[object] = []
    if place.path and not place.is_pattern:
        files = api.get_paths_info(place.repository, [place.path], revision=commit, repo_type=_KIND)
        if files and not isinstance(files[0], RepoFile):
            files = []
            place = HubPath(place.repository, place.revision, f"{place.path}/")
        elif not files:
            return []
    if not files:
        tree = api.list_repo_tree(
            place.repository, place.folder or None, recursive=True, revision=commit, repo_type=_KIND
        )
        files = [entry for entry in tree if isinstance(entry, RepoFile) and _meant(entry.path, place, suffixes)]
    authorization = build_hf_headers().get("authorization")
    return [_wanted(file, place.repository, commit, authorization) for file in files if isinstance(file, RepoFile)]


def _meant(path: str, place: HubPath, suffixes: tuple[str, ...]) -> bool:
    return fnmatchcase(path, place.path) if place.is_pattern else path.endswith(suffixes)


def _wanted(file: RepoFile, repository: str, commit: str, authorization: str | None) -> Wanted:
    url = hf_hub_url(repository, file.path, repo_type=_KIND, revision=commit, endpoint=constants.ENDPOINT)
    digest = Digest("sha256", file.lfs.sha256) if file.lfs else Digest("git", file.blob_id)
    cached = try_to_load_from_cache(repository, file.path, revision=commit, repo_type=_KIND)
    there = Path(cached) if isinstance(cached, str) else None
    return Wanted(url, file.path, file.size, digest, authorization, there)


def _cached(place: HubPath, suffixes: tuple[str, ...]) -> list[Wanted]:
    """Files of the cache; there, a name links to a file that has its hash as its name."""
    patterns = place.path if place.is_pattern else [place.path, f"{place.path}/*".removeprefix("/")]
    folder = Path(
        snapshot_download(
            place.repository,
            repo_type=_KIND,
            revision=place.revision,
            local_files_only=True,
            allow_patterns=patterns if place.path else [f"*{suffix}" for suffix in suffixes],
        )
    )
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        exact = not place.is_pattern and name == place.path
        below = place.is_pattern or not place.path or name.startswith(f"{place.path}/")
        if path.is_file() and (exact or (below and _meant(name, place, suffixes))):
            blob = path.resolve().name
            digest = Digest("git" if len(blob) == 40 else "sha256", blob) if _BLOB.fullmatch(blob) else None
            url = hf_hub_url(place.repository, name, repo_type=_KIND, revision=place.revision)
            found.append(Wanted(url, name, path.stat().st_size, digest, None, path))
    return found


@contextmanager
def _sentences(place: HubPath) -> Iterator[None]:
    """UserError for what the hub, and its library, can refuse."""
    name, hub = place.repository, constants.ENDPOINT
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"the dataset {name} is given to those only who accepted its terms; accept them at {hub}/datasets/{name}, "
            "then set HF_TOKEN to a token of yours"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{hub} knows no dataset {name}, or it is a private one; check the name, or set HF_TOKEN to a token that "
            "may read it"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError):
        raise UserError(
            f"the dataset {name} is not in the cache {constants.HF_HUB_CACHE}, or not all that is wanted of it, and "
            "HF_HUB_OFFLINE forbids to ask the hub; unset it, or fetch where there is a network"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"the dataset {name} has no revision {place.revision}; leave @{place.revision} out") from None
    except EntryNotFoundError:
        raise UserError(f"the dataset {name} has no {place.path}; look at {hub}/datasets/{name}/tree/main") from None
    except HFValidationError as error:
        raise UserError(f"{name} is no name of a dataset ({str(error).splitlines()[0]})") from None
    except HfHubHTTPError as error:
        raise UserError(
            f"{hub} refuses to list the dataset {name} ({_short(error)}); try again later, or check HF_TOKEN"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{hub} does not answer as the hub does ({_short(error)}): a proxy or a login may answer in its place, or "
            "HF_ENDPOINT or HF_TOKEN are mistyped; mend that and repeat the command"
        ) from None
    except HTTPError as error:
        raise UserError(
            f"{hub} cannot be reached ({_short(error)}); fetch where there is a network and copy the folder, or set "
            "HF_ENDPOINT to a mirror"
        ) from None


def _short(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
