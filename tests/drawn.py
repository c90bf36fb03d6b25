"Pictures that tests draw, each unlike any other, as files and out of them."

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image


def picture(i, size=(80, 64)):
    "A picture unlike any other."
    g = np.random.default_rng(i)

    def waves(n):
        small = Image.fromarray(g.standard_normal((n, n)).astype(np.float32))
        return np.asarray(small.resize(size, Image.BICUBIC))

    light = 30 * waves(4) + 22 * waves(9) + 16 * waves(18)
    return Image.fromarray(
        np.uint8(
            np.clip(128 + np.stack([light + 12 * waves(3) for _ in "rgb"], -1), 0, 255)
        )
    )


def put(folder, name, i, size=(80, 64), **k):
    "Picture `i`, or a picture given, under a name."
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (i if isinstance(i, Image.Image) else picture(i, size)).save(path, **k)
    return path


def saved(im, kind, **k):
    "The bytes of a file of that kind."
    b = io.BytesIO()
    im.save(b, kind, **k)
    return b.getvalue()


def opened(b):
    return Image.open(io.BytesIO(b))


def report(out, name):
    "A report of a prepared folder, all cells as text or numbers."
    return pd.read_csv(out / name, keep_default_na=False)
