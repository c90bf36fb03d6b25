"Rows of a table on few phantoms, for tests of sweeps."

from medart.recipes.datasets import DATASETS
from medart.recipes.methods import METHODS
from medart.recipes.recipe import recipe

CLASSES = [*DATASETS["skin"].counts][:2]
FEW = dict(train=dict.fromkeys(CLASSES, 8), test=dict.fromkeys(CLASSES, 8))


def row_of(settings, method, changes):
    "A row as the run notebook makes it: what makes it this row stays."
    kept = {k: v for k, v in settings.items() if k not in METHODS[method]}
    return recipe("skin", method, **(kept | changes))
