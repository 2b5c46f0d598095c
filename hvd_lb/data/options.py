"""Names and limits that data, recipe and command line share; imports nothing."""

from __future__ import annotations

from typing import Literal

LoaderKind = Literal["dali", "torchvision"]
OnBadImage = Literal["fail", "skip"]
CacheKind = Literal["none", "memory", "disk"]

# A header may promise more pixels than any memory holds. Beyond MOST_PIXELS PIL does not open a file.
MAX_PIXELS, MOST_PIXELS = 100_000_000, 178_956_970

#: Data sets that come by a name; the last one also with a number of images.
NAMED = ("digits", "fashion-mnist", "synthetic")

#: The folder in which a data set is made before it is moved to its place: where it is, the data set is not whole.
UNFINISHED = ".unfinished"
