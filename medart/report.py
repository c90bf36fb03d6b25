import gc

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from medart.core import image_grid
from medart.data import crop,load_split,read_pixels,unit
from medart.generation import generate,load_samples
from medart.hldf import read_losses,train
from medart.metrics import evaluate
from medart.recipes import Recipe,samples_dir

def run_row(
    r:Recipe        # a row
) -> pd.DataFrame:  # its measures: dataset, method, seed, measure, value, floor
    "One row of a table, from training to numbers."
    train(r); generate(r)
    rows = evaluate(r)[["measure","value","floor"]]; gc.collect()
    return rows.assign(dataset=r.dataset,scale=r.scale,method=r.method,seed=r.seed)

def closed(
    d,       # measured
    base,    # of the untouched model
    real     # of real images against real images
):           # 0 at the untouched model, 1 at real images
    "The share of the way from the untouched model to real images."
    return (base-d)/(base-real)

def add_closed(
    rows:pd.DataFrame  # of several methods, `base` among them
) -> pd.DataFrame:     # with a column `closed`
    "Put each value on the scale from the untouched model to real images, by data set, measure and seed."
    keys = ["dataset","scale","measure","seed"]
    base = rows[rows.method=="base"].set_index(keys).value.rename("base")
    out = rows.join(base,on=keys)
    return out.assign(closed=closed(out.value,out.base,out.floor))

def over_seeds(
    rows:pd.DataFrame,     # as from `add_closed`
    measures,              # which measures, in order
    column:str="value"     # or "closed"
) -> pd.DataFrame:         # one row a data set and method, "mean ± standard deviation" over seeds
    "Mean and spread over seeds."
    g = rows[rows.measure.isin(measures)].groupby(["dataset","method","measure"],sort=False)[column].agg(["mean","std","size"])
    text = g.apply(lambda x: f"{x['mean']:.3f} ± {x['std']:.3f}" if x["size"]>1 else f"{x['mean']:.3f}",axis=1)
    return text.unstack("measure")[list(measures)]

def side_by_side(
    recipes:list,  # rows whose images are painted, one dataset and seed
    k:int=1        # captions of each class
):                 # figure
    "A column a caption; the real image on top, then one row a method."
    test,(_,m) = load_split(recipes[0],"test"),load_samples(samples_dir(recipes[0]))
    at = [i for c in dict.fromkeys(m["class"]) for i in m.index[m["class"]==c][:k]]; shown = test[[m["index"][i] for i in at]]
    images = [unit(crop(p,recipes[0].size)) for p in read_pixels(shown,recipes[0].size)]
    for r in recipes:
        x,_ = load_samples(samples_dir(r)); images += [unit(x[i]) for i in at]
    return image_grid(images,[""]*(len(images)-len(at))+list(shown.texts),ncol=len(at),cell=1.2,width=22,rows=["real"]+[r.method for r in recipes])

def color_paths(
    recipes:list  # trained rows with colour losses
):                # figure
    "Colour gap and its gradient's norm over training, a line a run."
    fig,axs = plt.subplots(1,2,figsize=(8,2.4),layout="constrained")
    palette = dict(zip(dict.fromkeys(r.method for r in recipes),sns.color_palette("colorblind")))
    for r in recipes:
        d = read_losses(r).dropna(subset=["color"]); first = r is next(q for q in recipes if q.method==r.method)
        kw = dict(color=palette[r.method],lw=1,alpha=.8,label=r.method if first else None)
        axs[0].plot(d.step,d.color,**kw); axs[1].semilogy(d.step,d.color_grad_norm,**kw)
    for ax,y in zip(axs,("colour loss (Eq. 4)","gradient norm before clipping")): ax.set(xlabel="step",ylabel=y)
    axs[1].legend(frameon=False,fontsize=7); sns.despine(fig); plt.close(fig)
    return fig
