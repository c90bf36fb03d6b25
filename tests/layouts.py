"Folders of empty images with tables beside them, and what is listed of them."

from collections import Counter
from medart.data.listing import list_images
from medart.recipes.datasets import Dataset, DATASETS

SKIN, KVASIR = DATASETS["skin"], DATASETS["kvasir"]
N = range(12)


def own(*classes, **labels):
    "A data set of one's own, with what its dataset.yaml says of labels."
    labels = dict.fromkeys(classes) | labels
    labels = {k: v or k for k, v in labels.items()}
    return Dataset(
        "own",
        "fundus",
        "color",
        dict.fromkeys(labels.values(), 0),
        None,
        None,
        "",
        "FD",
        labels,
    )


def lay(folder, files, **tables):
    "Empty images, and tables beside them; a name's __ is a slash, its _DOT_ a dot."
    for f in files:
        (folder / f).parent.mkdir(parents=True, exist_ok=True)
        (folder / f).touch()
    for name, content in tables.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def listed(folder, d=own()):
    _, t, how = list_images(folder, d)
    return t, how


def classes(t):
    return dict(Counter(t.cls[t.why == ""]))


def table(head, row, n=N):
    return head + "\n" + "".join(row(i) + "\n" for i in n)


def ab(i):
    return "ab"[i % 2]


FLAT = [f"img/{i}.png" for i in N]
COMMA = table("file,label", lambda i: f"{i}.png,{ab(i)}")
HALVES = dict(a=6, b=6)
