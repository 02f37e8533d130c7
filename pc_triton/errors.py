"""Where a message is explained at more length than it has room for."""

PAGE = "docs/errors.md"


def see(heading: str) -> str:
    """What such a message ends in. heading: one of the page's, in lower case with hyphens, as its link is."""
    return f" ({PAGE}#{heading})"
