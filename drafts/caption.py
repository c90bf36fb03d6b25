# %% [markdown]
# # Caption
# > Let a vision-language model describe every image
#
# `papermill nbs/caption.ipynb outputs/caption-skin.ipynb -p dataset skin` runs this notebook from a shell. It is the first stage: training and generation read the captions that it writes. Interrupted and run again, it
# captions only what is missing.

# %% tags=parameters
dataset = "skin"    # skin or kvasir
scale = "auto"      # paper (published weights, a GPU of 24 GB or more), tiny (embedded models, any CPU), or auto
vlm = ""            # who writes: empty for LLaVA-NeXT (its small sister at tiny scale), or a folder or hub id, such as thisisiron/Ovis2-2B-hf
caption_seed = 0    # of the captions' sampling
data = ""           # a folder of class folders; empty for the data set's own, phantoms at tiny scale

# %%
import pandas as pd

from medart.core import save_figure,save_table
from medart.recipes import captions_dir,dataset_of,recipe_from,settings
from medart.simplify import length_figure,paths,samples_figure,write_captions
from medart.vsg import fault_counts,question,telling_words,validity,words_figure

r = recipe_from(globals())
out = captions_dir(r)
settings(r,"caption")

# %% [markdown]
# ## The question
#
# Asked about every image of the first class; the others differ in the class's name only.

# %%
question(dataset_of(r),next(iter(dataset_of(r).counts)))

# %% [markdown]
# ## The captions

# %%
tables = {split:write_captions(r,split) for split in ("train","test")}
both = pd.concat(tables,names=["split"]).reset_index(level=0).reset_index(drop=True)

# %%
save_figure(samples_figure(r,"test",tables["test"]), out/"samples.png")

# %% [markdown]
# ## Are they fit for use?
#
# Captions accepted at once, accepted after asking again, and replaced by the simple caption; then what was wrong with the rejected drafts.

# %%
save_table(validity(both), out/"validity.csv")

# %%
fault_counts(both)

# %% [markdown]
# ## Do they fit the text encoder?
#
# What lies beyond the line would never reach the picture, so longer captions are shortened by T5, or, where its answer does not pass, cut at the end of a sentence.

# %%
save_figure(length_figure(tables,r), out/"lengths.png")

# %%
save_table(paths(tables), out/"paths.csv")

# %% [markdown]
# ## Which words distinguish the classes?

# %%
words = save_table(telling_words(tables["train"]), out/"words.csv")
save_figure(words_figure(words), out/"words.png")
