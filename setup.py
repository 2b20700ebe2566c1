"""What setup.cfg cannot say: on a package index the README must name its pictures in full."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def absolute(readme: str, url: str | None) -> str:
    """Return the README with addresses that begin with that of the repository; without a `url` as it is."""

    def link(match: re.Match[str]) -> str:
        mark, words, file = match.groups()
        return f"{mark}[{words}]({url}/{'raw' if mark else 'blob'}/HEAD/{file})"

    return readme if url is None else re.sub(r"(!?)\[([^\]]*)\]\(([\w./-]+)\)", link, readme)


if __name__ == "__main__":
    about = ConfigParser()
    about.read(ROOT / "setup.cfg", "utf-8")
    url = about["metadata"].get("url")
    setup(long_description=absolute((ROOT / "README.md").read_text("utf-8"), url))
