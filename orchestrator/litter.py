"""What other tools leave in a store: markers of folders, files of desktops, half copies. Every listing passes over it, without a word.

Owns the names. Refuses to call anything litter that osctl itself could have written, or that looks like a record of its: a copy
`000001 (1).json` that a synchronised folder made is named by whoever reads records, since two machines wrote there.
"""

from __future__ import annotations

import re

_FOLDERS = frozenset(
    {"lost+found", "$recycle.bin", "system volume information", "recycler", "__macosx", "@eadir", "#recycle", "#snapshot", "_temporary"}
)
"""Of file systems, desktops and network disks, in small letters."""
_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "_success", "_metadata", "_common_metadata", "_committed"})
_ENDINGS = re.compile(
    r"(~|\.tmp|\.temp|\.partial|\.part|\.crdownload|\.download|\.swp|\.swo|\.crc|\.rclonelink|\.filepart|_\$folder\$)$", re.I
)
"""Of files that are on their way, of editors, of Hadoop's file systems, of rclone."""


def is_litter(key: str) -> bool:
    """Of a key, or of the name of a folder or a file.

    Nothing that osctl writes has a name that begins with a dot, as .DS_Store, ._name, .nfs0001, .fuse_hidden, .Trash-0 and .stfolder do,
    nor an empty one, as the markers `folder/` that consoles of S3 make.
    """
    *folders, name = key.split("/")
    if any(is_litter_folder(folder) for folder in folders):
        return True
    return not name or name.startswith(".") or name.lower() in _FILES or _ENDINGS.search(name) is not None


def is_litter_folder(name: str) -> bool:
    return not name or name.startswith(".") or name.lower() in _FOLDERS
