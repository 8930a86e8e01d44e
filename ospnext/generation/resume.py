"""Which videos of a run are still to be made, judged by the files and the manifest in its output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ospnext.errors import ConfigError
from ospnext.generation.jobs import Run, VideoJob
from ospnext.generation.manifest import read_manifest, sha256_of


def unfinished(run: Run, *, resume: bool) -> list[VideoJob]:
    """The jobs whose video does not exist yet.

    Raises:
        ConfigError: a video exists and `resume` is false, or it exists but was made otherwise than the manifest and the
            present settings say.
    """
    existing = [job for job in run.jobs if (run.directory / job.name).exists()]
    if existing and not resume:
        first, count = run.directory / existing[0].name, len(existing)
        raise ConfigError(
            f"{first} already exists ({count} of {len(run.jobs)} videos do); add --resume to keep finished videos and "
            "make the rest, or choose another --output"
        )
    entries = read_manifest(run.directory) if existing else {}
    for job in existing:
        _require_same(run.directory / job.name, entries.get(job.name), run.settings(job))
    made = {job.name for job in existing}
    return [job for job in run.jobs if job.name not in made]


def _require_same(path: Path, entry: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    advice = "delete the file to make it again, or choose another --output"
    if entry is None:
        raise ConfigError(f"--resume: {path} exists but the manifest does not know it; {advice}")
    differing = [key for key, value in settings.items() if not _same(entry.get(key), value)]
    if differing:
        what = "; ".join(f"{key} was {entry.get(key)!r} and is now {settings[key]!r}" for key in differing)
        raise ConfigError(f"--resume: {path} was made with other settings: {what}. Use those again, {advice}")
    if sha256_of(path) != entry.get("sha256"):
        raise ConfigError(f"--resume: {path} is not the file in the manifest (another sha256); {advice}")


def _same(was: Any, now: Any) -> bool:
    """Equal; a key that an older version did not write yet counts as null, the default."""
    if isinstance(was, dict) and isinstance(now, dict):
        return dict.fromkeys(now) | was == now
    return bool(was == now)
