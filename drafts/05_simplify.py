# %% [markdown]
# # Simplification
# > 120 tokens, and not one more
#
# PixArt-alpha reads the first 120 tokens of a caption and is blind to the rest. This notebook counts, lets a T5 shorten what is too long, checks what comes back, and writes the captions that training reads. It needs
# captions (`04_vsg`), the text encoder's tokenizer, and a T5: the small one under `data/tiny/`, or `t5-large`.

# %%
#| default_exp simplify

# %%
#| export
from dataclasses import dataclass,replace

import pandas as pd
import torch
from accelerate import PartialState

from medart.core import image_grid,np_rng,stable_hash,write_atomic
from medart.data import Split,load_split
from medart.recipes import Recipe,captions_dir,locate
from medart.vsg import caption_images,fill_store,open_image,tidy,weights_key

# %%
#| hide
import tempfile
from pathlib import Path

from fastcore.test import test_eq

from medart.core import check_answer
from medart.recipes import recipe

# %% [markdown]
# ## Counting
#
# > The authors count with Llama's tokenizer. What cuts a caption off is the text encoder's own, T5's, so its tokens are the ones we count, end mark included, of the caption as `encode_text` will see it: in lower case
# > and stripped.

# %%
#| export
def load_tokenizer(
    r:Recipe  # names PixArt-alpha
):            # the tokenizer of its T5
    "The text encoder's own tokenizer."
    from transformers import AutoTokenizer
    try: return AutoTokenizer.from_pretrained(locate(r.model),subfolder="tokenizer")
    except (OSError,ValueError) as e:
        raise FileNotFoundError(f"No tokenizer at {r.model!r}. With a network it comes from the Hugging Face hub by itself; otherwise pass model=FOLDER, or scale=tiny for the embedded models. ({type(e).__name__}: {str(e)[:200]})") from e

def count_tokens(
    tokenizer,   # of the text encoder
    texts        # n captions
) -> list:       # n numbers, end mark included
    "How long captions are for T5."
    return [len(ids) for ids in tokenizer([t.lower().strip() for t in texts],verbose=False).input_ids] if len(texts) else []

# %%
r = recipe("skin",scale="tiny")
tokenizer = load_tokenizer(r)
text = "A dermoscopic image of melanoma shows a net-like patch."
tokenizer.convert_ids_to_tokens(tokenizer(text.lower()).input_ids), count_tokens(tokenizer,[text])

# %% [markdown]
# What is too long shall come back between 90 and 120 tokens (Section 2.1): short enough to be read, long enough to keep what matters. The small model has 64 tokens in all, and its limits scale with that.

# %%
#| export
def limits(
    r:Recipe  # max_tokens
) -> tuple:   # fewest and most tokens of a shortened caption
    "90 and 120 at full size, in that proportion otherwise."
    return r.max_tokens*3//4,r.max_tokens

# %%
test_eq(limits(recipe("skin",scale="paper")), (90,120))
limits(r)

# %% [markdown]
# ## Cutting at a sentence
#
# The last resort loses what comes last, but never half a sentence. Only a first sentence that is too long by itself is cut at a word.

# %%
#| export
def cut_at_sentence(
    text:str,   # too long
    tokenizer,  # of the text encoder
    most:int    # tokens
) -> str:       # as many whole sentences as fit
    "Drop sentences from the end until the rest fits."
    words = text.split(); ends = [i+1 for i,w in enumerate(words) if w.endswith((".","!","?"))]
    whole = [" ".join(words[:i]) for i in ends]; rest = [" ".join(words[:i]) for i in range(1,len(words))]
    for tries in (whole,rest):
        fits = [t for t,n in zip(tries,count_tokens(tokenizer,tries)) if n<=most]
        if fits: return fits[-1]
    return ""

# %%
long = "A dermoscopic image of melanoma shows a large dark brown irregular patch with a jagged border. It has black spots. There is a blue veil."
[cut_at_sentence(long,tokenizer,n) for n in (40,30,20,12)]

# %% [markdown]
# ## T5
#
# T5 turns text into text. It was told what to do by a word in front, here `simplify:`, with four beams and early stopping.

# %%
#| export
@dataclass
class Simplifier:
    "A T5 and its tokenizer."
    model:object     # T5ForConditionalGeneration
    tokenizer:object # its own
    least:int        # tokens of its answer
    most:int

    @torch.no_grad()
    def shorten(self,
        texts:list # n captions
    ) -> list:     # n shorter ones, it is hoped
        "Simplify n captions at once."
        tok = self.tokenizer([f"simplify: {t}" for t in texts],padding=True,return_tensors="pt").to(self.model.device)
        out = self.model.generate(**tok,min_new_tokens=self.least,max_new_tokens=self.most,num_beams=4,early_stopping=True,do_sample=False)
        return [tidy(t) for t in self.tokenizer.batch_decode(out,skip_special_tokens=True)]

def load_simplifier(
    r:Recipe,     # names the T5
    device="cpu"  # where to
) -> Simplifier:
    "The T5 that a recipe asks for."
    from transformers import AutoTokenizer,T5ForConditionalGeneration
    try: model,tok = T5ForConditionalGeneration.from_pretrained(locate(r.simplifier),dtype=getattr(torch,r.dtype)),AutoTokenizer.from_pretrained(locate(r.simplifier))
    except (OSError,ValueError) as e:
        raise FileNotFoundError(f"No T5 at {r.simplifier!r}. With a network it comes from the Hugging Face hub by itself (t5-large: 3 GB); on another machine run `hf download {r.simplifier}` and copy the cache, "
            f"or pass simplifier=FOLDER. The small embedded model is simplifier=data/tiny/simplifier. ({type(e).__name__}: {str(e)[:200]})") from e
    return Simplifier(model.to(device).eval(),tok,*limits(r))

# %% [markdown]
# Nobody has trained T5 on a task named *simplify*, so its answers are believed only after a look: the length must be within the limits, and the opening, which carries modality and class, unchanged.

# %%
#| export
def shortening_fault(
    short:str,   # what T5 made
    simple:str,  # the simple caption: how it has to begin
    tokens:int,  # its length
    r:Recipe     # for the limits
) -> str:        # opening, short or long; empty when there is none
    "What is wrong with a shortened caption."
    least,most = limits(r)
    if not short.lower().startswith(simple.lower()): return "opening"
    return "short" if tokens<least else "long" if tokens>most else ""

# %%
simplifier = load_simplifier(r)
wordy = ("A dermoscopic image of melanoma shows an asymmetric large dark brown irregular patch with a jagged border and a speckled texture. It has black areas and a blue veil. The background is pale pink skin with thin black hairs. "
         "There is no ring around it and there are no lines. The surface is not shiny. The edges of the image are dark.")
short = simplifier.shorten([wordy])[0]
n = count_tokens(tokenizer,[wordy,short])
pd.DataFrame(dict(caption=[wordy,short],tokens=n,fault=["long",shortening_fault(short,"A dermoscopic image of melanoma",n[1],r)])).style.hide()

# %% [markdown]
# ## Every caption takes one of three paths
#
# `kept` as it is, shortened by `t5`, or `cut` at a sentence, with the reason why T5's answer would not do.

# %%
#| export
def shorten_captions(
    r:Recipe,           # limits and T5
    table:pd.DataFrame, # file_name, class, simple, text
    store               # folder that keeps what is done
) -> pd.DataFrame:      # text within the limit; new columns vsg, path, fault, tokens_before, tokens
    "Bring every caption within the limit and record how."
    tok = load_tokenizer(r); before = count_tokens(tok,table.text)
    t = table.assign(vsg=table.text,path="kept",fault="",tokens_before=before)
    long = t[t.tokens_before>r.max_tokens].set_index("file_name"); base = weights_key(r.simplifier) if len(long) else ""
    keys = {f:stable_hash([base,r.dtype,limits(r),text,simple]) for f,text,simple in zip(long.index,long.text,long.simple)}
    done = fill_store(store,keys,r.caption_block,lambda device: load_simplifier(r,device),lambda t5,names: [dict(text=x) for x in t5.shorten([long.text[n] for n in names])],f"shortening {r.dataset}")
    short = {f:d["text"] for f,d in done.items()}; n = dict(zip(short,count_tokens(tok,list(short.values()))))
    fault = {f:shortening_fault(short[f],long.simple[f],n[f],r) for f in short}
    final = {f:cut_at_sentence(long.text[f],tok,r.max_tokens) if fault[f] else short[f] for f in short}
    t = t.assign(text=[final.get(f,x) for f,x in zip(t.file_name,t.text)],fault=[fault.get(f,"") for f in t.file_name],path=[p if f not in fault else "cut" if fault[f] else "t5" for f,p in zip(t.file_name,t.path)])
    return t.assign(tokens=count_tokens(tok,t.text))

# %%
rows = pd.DataFrame([("a.png","melanoma","A dermoscopic image of melanoma",long),("b.png","melanoma","A dermoscopic image of melanoma",wordy),("c.png","melanoma","A dermoscopic image of melanoma",wordy.replace(". ",", "))],
                    columns=["file_name","class","simple","text"])
with tempfile.TemporaryDirectory() as d: done = shorten_captions(r,rows,d)
assert (done.tokens<=r.max_tokens).all() and done.path[0]=="kept"
done[["path","fault","tokens_before","tokens","text"]]

# %% [markdown]
# ## What training reads
#
# The finished captions of a split lie in a `metadata.csv` with the columns `file_name` and `text`, the convention of the `datasets` library, and all that is known about their making. They lie beside the runs, not in
# the data set: `outputs/{dataset}-{scale}/captions/{vlm}/{train,test}/metadata.csv`. So the captions of two VLMs stand side by side, and the data set's own stay what they were.

# %%
#| export
def write_captions(
    r:Recipe,    # everything
    split:str    # train or test
) -> pd.DataFrame: # the split's captions
    "Caption the images of a split, bring the captions within the limit, and write metadata.csv. Run again to continue, or to find the work done."
    folder = captions_dir(r)/split
    table = shorten_captions(r,caption_images(r,split),folder/"shortened")
    if PartialState().is_main_process: write_atomic(folder/"metadata.csv",table.to_csv(index=False))
    PartialState().wait_for_everyone()
    return table

def read_captions(
    r:Recipe,    # names the captions
    split:str    # train or test
) -> pd.DataFrame: # as written, or None when there are none
    "The table of finished captions."
    f = captions_dir(r)/split/"metadata.csv"
    return pd.read_csv(f,keep_default_na=False) if f.exists() else None

# %% [markdown]
# All kinds of captions come from one door. `simple` and `empty`, the ablations of Table 3, need no model. `vsg` are the VLM's where they have been written, else those that came with the data set, else simple ones.

# %%
#| export
def captions_for(
    r:Recipe,    # captions: vsg, simple or empty
    split:str    # train or test
) -> Split:      # the images of the split with these captions
    "What training and generation read."
    s = load_split(r,split); m = read_captions(r,split) if r.captions=="vsg" else None
    if m is None: return s
    text = dict(zip(m.file_name,m.text)); lacking = [f for f in s.files if f not in text]
    if lacking:
        raise ValueError(f"{captions_dir(r)/split/'metadata.csv'} has no caption for {len(lacking)} of {len(s)} images, {lacking[0]} for one: the images have changed since. "
                         f"Caption the new ones: papermill nbs/caption.ipynb outputs/caption-{r.dataset}.ipynb -p dataset {r.dataset} -p scale {r.scale}")
    return replace(s,texts=tuple(text[f] for f in s.files))

# %%
table = write_captions(r,"test")
kinds = {k:captions_for(recipe("skin",scale="tiny",captions=k),"test") for k in ("vsg","simple","empty")}
test_eq(set(kinds["empty"].texts), {""}); test_eq(len(set(kinds["simple"].texts)), 8); test_eq(kinds["vsg"].texts, tuple(table.text))
pd.DataFrame({k:s.texts[::64] for k,s in kinds.items()})

# %% [markdown]
# ## Pictures of it
#
# Lengths before and after. What lies right of the line would never have reached the picture.

# %%
#| export
def length_figure(
    tables:dict, # name -> table of finished captions
    r:Recipe     # for the limit
):               # figure
    "How many tokens captions have, before and after, against the limit."
    import matplotlib.pyplot as plt
    import seaborn as sns
    d = pd.concat(tables.values()); bins = range(0,int(max(d.tokens_before.max(),r.max_tokens))+4,2)
    fig,axs = plt.subplots(2,1,figsize=(5,3.2),layout="constrained",sharex=True,sharey=True)
    for ax,n,word,color in zip(axs,(d.tokens_before,d.tokens),("as the VLM wrote them","after simplification"),("#d55e00","#0072b2")):
        sns.histplot(x=n,bins=bins,ax=ax,color=color,lw=0); ax.axvline(r.max_tokens+.5,c="k",ls="--",lw=1)
        ax.set(ylabel="captions",xlabel="T5 tokens"); ax.set_title(f"{word}: {(n>r.max_tokens).mean():.1%} beyond {r.max_tokens}",fontsize=9)
    sns.despine(fig); plt.close(fig)
    return fig

def paths(
    tables:dict # name -> table of finished captions
) -> pd.DataFrame: # one row a table
    "How many captions were kept, shortened by T5, or cut, and why T5's answer would not do."
    rows = [dict(split=k,captions=len(t),**{p:int((t.path==p).sum()) for p in ("kept","t5","cut")},**{f"cut: {f}":int(((t.path=="cut")&(t.fault==f)).sum()) for f in ("opening","short","long")},
                 **{"longest before":t.tokens_before.max(),"longest after":t.tokens.max()}) for k,t in tables.items()]
    return pd.DataFrame(rows)

# %%
length_figure(dict(test=table),r)

# %%
paths(dict(test=table))

# %%
#| export
def samples_figure(
    r:Recipe,           # for the images
    split:str,          # train or test
    table:pd.DataFrame, # of finished captions
    k:int=1,            # images of each class
    seed:int=0          # which ones
):                      # figure
    "Images with their simple caption and what the VLM made of it."
    s = load_split(r,split); at = dict(zip(s.files,range(len(s))))
    rows = [i for c,g in table.groupby("class",sort=False) for i in g.index[np_rng(seed,f"show {c}").permutation(len(g))[:k]]]
    shown = table.loc[rows]
    return image_grid([open_image(s.folder/s.files[at[f]]) for f in shown.file_name],[f"[{a}] {b if b!=a else '(the same)'}" for a,b in zip(shown.simple,shown.text)],ncol=4,cell=2.1,width=44)

# %%
samples_figure(r,"test",table)

# %% [markdown]
# ## Try it
#
# 1. How many tokens of `wordy` would the text encoder never have seen, had it been used as it is?

# %%
check_answer(count_tokens(tokenizer,[wordy])[0]-r.max_tokens, len(tokenizer(wordy.lower()).input_ids)-64, "its length, minus the 64 that are read")

# %% [markdown]
# 2. Repeat a sentence of `wordy` three times and simplify again. What does T5 drop now, and which path does the caption take? Then give it a class it has never read of.

# %%
again = wordy.replace("It has black areas and a blue veil. ","It has black areas and a blue veil. "*3); wart = wordy.replace("melanoma","plantar wart")
list(zip([limits(r)]*2,count_tokens(tokenizer,simplifier.shorten([again,wart])),simplifier.shorten([again,wart])))
