"""What programs that ran in processes of their own have printed."""

from __future__ import annotations


def said(printed: str) -> list[str]:
    """Return the lines a program printed, without those of gloo, which some torch versions print."""
    return [line for line in printed.splitlines() if not line.startswith("[Gloo]")]
