"""How much of a long sweep a report shows: a page that a browser opens at once, and plots that a reader can tell apart.

`docs/reports.md` lists these limits; a test compares both.
"""

from __future__ import annotations

MAX_PLOTTED_GROUPS = 40  # groups in plots and in the matrix of differences
MAX_PICTURED_GROUPS = 24  # groups of a long report whose plans and films are shown
MAX_LISTED_PAIRS = 800  # pairs of groups that are listed one by one
MAX_FULL_RESULTS = 120  # results with their config, curves and diagnostics in the page and in report.json
MAX_TERMINAL_ROWS = 60  # rows of one terminal table
MAX_NAMES = 40  # names in one sentence
MAX_LEVELS = 40  # values of one setting that are plotted
MAX_EFFECTS = 40  # settings that are plotted
MAX_CURVE_POINTS = 200  # points of one plotted curve


def join_names(names: list[str]) -> str:
    """Join names with commas, the first `MAX_NAMES` of them."""
    more = f", and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
