"""What a person is given at the end of a run: a contact sheet, a dataset card, a report, and a summary in a few lines.

All is read back from the output's folder, so that it can be made again at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from latentmill.dataset import Dataset
from latentmill.progress import Pace
from latentmill.report import card, contact_sheet, html
from latentmill.report.files import MARK
from latentmill.report.material import Material
from latentmill.report.summary import summary
from latentmill.text import one_line
from latentmill.usage import History

__all__ = ["MARK", "finish", "summary"]

logger = logging.getLogger("latentmill")


def finish(there: Dataset, pace: Pace | None = None, history: History | None = None) -> None:
    """Make ``contact_sheet.png``, the card ``README.md``, which Hugging Face reads, and ``report.html`` of a dataset.

    ``pace`` brings the rates of the run that just ended, ``history`` what its workers used. A file of one of these names that we did not make stays as it is.
    What can't be made is a line in the log: the rows are there.
    """
    with _logged("contact sheet, card and report"):
        dataset = Material(there)
        with _logged("contact_sheet.png"):
            contact_sheet.make(dataset)
        with _logged("README.md"):
            card.make(dataset)
        with _logged("report.html"):
            html.make(dataset, pace, history)


@contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a font, a picture, a disk: whatever drawing and writing come upon
        said = one_line(f"{type(error).__name__}: {error}")
        logger.warning(f"{what} could not be made, and the dataset is complete without: {said}")
