"""Preparation of the data files. Here: the download that both preparations share."""

import shutil
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from tqdm import tqdm

import utils


def download(url: str, path: Path) -> None:
    """Download `url` to `path`, whole or not at all. Raises UserError."""
    print(f"Downloading {url}")
    utils.write_file(path, lambda part: _fetch(url, part))


def _fetch(url: str, path: Path) -> None:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "hw2"})
        with urllib.request.urlopen(request, timeout=60) as response, open(path, "wb") as output:
            size = int(response.headers.get("Content-Length", 0)) or None
            bar = {"total": size, "desc": "download", "leave": False, "disable": None}
            with tqdm.wrapattr(output, "write", **bar) as output:
                shutil.copyfileobj(response, output)
        if size not in (None, path.stat().st_size):
            raise ConnectionError(f"only {path.stat().st_size:,} of {size:,} bytes arrived")
    except (URLError, ConnectionError, TimeoutError, HTTPException, ValueError) as error:
        raise utils.UserError(f"{url}: {utils.one_line(error)}; data/README.md names other ways")
