"""A job's inputs to where they are read there, and its results from there.

Both go through `storage`: what is there already is not sent again.
"""

from collections import defaultdict
from pathlib import Path, PurePosixPath

from dpo_cli import storage
from dpo_cli.errors import UserError
from dpo_cli.jobs.spec import Spec, comes_home
from dpo_cli.progress import Progress
from dpo_cli.storage import sync


def upload(spec: Spec, root: str, volume: str, progress: Progress) -> None:
    """Send a spec's inputs.

    Args:
        spec: whose.
        root: what is mounted there, as `storage` names it: `modal://nothing-gpt-vol`.
        volume: where it is mounted.
        progress: told of megabytes.

    Raises:
        UserError: as `storage.put`.
    """
    by_content: defaultdict[PurePosixPath, dict[str, storage.Source]] = defaultdict(dict)
    for one in spec.uploads:
        path = PurePosixPath(one.there).relative_to(volume)
        place = PurePosixPath(*path.parts[:2])  # uploads/<hash of the content>
        by_content[place][str(path.relative_to(place))] = Path(one.here)
    for place, files in by_content.items():
        sync.put(files, f"{root}/{place}", progress)


def fetch(spec: Spec, root: str, volume: str, into: Path, progress: Progress) -> None:
    """Bring a spec's results into the folder `into`, at the paths that they have below the volume.

    Raises:
        UserError: as `storage.get`.
    """
    for there in spec.results:
        place = PurePosixPath(there).relative_to(volume)
        folder = place.parent if place.suffix == ".jsonl" else place
        wanted = comes_home if folder == place else place.name.__eq__
        sync.get(f"{root}/{folder}", into / folder, progress, wanted)


def missing(spec: Spec, root: str, volume: str) -> list[str]:
    """Inputs that are neither here nor there, by their paths there.

    Raises:
        UserError: as `storage.connect`.
    """
    lacking = []
    for need in spec.needs:
        path = PurePosixPath(need).relative_to(volume)
        folder = path.parent if path.suffix == ".jsonl" else path
        there = storage.connect(f"{root}/{folder}").listing()
        if not there or (folder != path and path.name not in there):
            lacking.append(need)
    return lacking


def refuse_missing(spec: Spec, root: str, volume: str) -> None:
    """See that every input is there, or here and will be sent.

    Raises:
        UserError: names those that are not, and the command that sends one.
    """
    lacking = missing(spec, root, volume)
    if lacking:
        path = PurePosixPath(lacking[0]).relative_to(volume)
        kind, folder = ("data", path.parent) if path.suffix == ".jsonl" else ("adapter", path)
        raise UserError(
            f"neither here nor at {root}: {', '.join(lacking)}", hint=f"nothing-dpo push {kind} {root}/{folder}"
        )
