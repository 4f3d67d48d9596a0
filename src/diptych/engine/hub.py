"""Where a checkpoint lies: a directory here, or a model of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from diptych.core.errors import CheckpointError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
WANTED_FILES = ["*.json", "*.jinja", "*.safetensors"]


def resolve_checkpoint(path: str | Path) -> Path:
    """The local directory of a checkpoint: `path` itself, or else a hub id, fetched (or found in the hub's cache).

    Raises CheckpointError if it is neither."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if not HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"{path} is no directory here, and no hub id (ORGANISATION/MODEL) either")
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=WANTED_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{path} is no directory here, and the hub does not give it: {error}") from error
