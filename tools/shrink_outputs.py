"""Makes the pictures that notebooks store smaller: 256 colors are enough on a page, and a clone stays light.

`python tools/shrink_outputs.py nbs/*/*.ipynb`; `make notebooks` and `make examples` call it.
"""

import base64
import io
import json
import sys
from pathlib import Path

from PIL import Image

LARGE = 12_000  # bytes of base64: smaller pictures stay as they are


def smaller(data):
    "A PNG with a palette, as base64, where that is smaller."
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    file = io.BytesIO()
    image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(
        file, "PNG", optimize=True
    )
    palette = base64.b64encode(file.getvalue()).decode("ascii")
    return palette if len(palette) < 0.8 * len(data) else data


def shrink(path):
    "Rewrite a notebook with smaller pictures, where there are any."
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture is None:
                continue
            data = "".join(picture).replace("\n", "")
            if len(data) > LARGE:
                output["data"]["image/png"] = smaller(data)
    new = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    if new != text:
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        shrink(Path(name))
