import io,json,shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from accelerate import PartialState
from PIL import Image,PngImagePlugin
from torch import Tensor

from medart.core import file_hash,image_grid,np_rng,progress,rng,stable_hash,write_atomic
from medart.data import Split,crop,load_split,read_pixels,unit
from medart.model import PARTS,Cond,Model,cat_cond,load_base,load_model,merge
from medart.recipes import Recipe,category,recipe_hash,run_dir,samples_dir,settings
from medart.sampler import sample

def generation_captions(
    r:Recipe   # gen_split says whose captions
) -> tuple:    # n captions and their n classes
    "What to paint: one caption for each test image."
    test = load_split(r,"test")
    if r.gen_split=="test": return test.texts,test.classes
    train = load_split(r,"train"); texts,classes = [],[]
    for c in dict.fromkeys(test.classes):
        own,k = [t for t,d in zip(train.texts,train.classes) if d==c],test.classes.count(c)
        if not own: raise ValueError(f"class {c} has {k} test images and no training image to take captions from. Use gen_split=test, or add images to {train.folder}.")
        g = np_rng(r.seed,f"captions {c}"); pick = [j for _ in range(-(-k//len(own))) for j in g.permutation(len(own))][:k]
        texts += [own[j] for j in pick]; classes += [c]*k
    return tuple(texts),tuple(classes)

def starting_noise(
    model:Model,  # the latents' shape
    seed:int,     # the run's
    indices       # of the images
) -> Tensor:      # (n,4,h,w)
    "Where the images start, each from its own generator."
    return torch.stack([torch.randn(model.latent_shape,generator=rng(seed,"image",i)) for i in indices])

@torch.no_grad()
def paint(
    model:Model,  # trained or not
    r:Recipe,     # steps, guidance, seed
    texts,        # n captions, or a Cond with the empty caption last
    indices=None  # of the images, 0..n-1 by default
) -> Tensor:      # (n,3,h,w), about -1..1
    "Images for captions, all at once."
    both = texts if isinstance(texts,Cond) else cat_cond(model.encode_text(list(texts)),model.encode_text([""]))
    cond,null = both[:-1],both[-1:]
    z = starting_noise(model,r.seed,range(len(cond)) if indices is None else indices).to(model.device)
    return model.decode(sample(model,z,cond,null,r.gen_steps,r.gen_guidance)).float()

def to_uint8(x): return ((x.clamp(-1,1)+1)*127.5).round().byte().cpu()  # (n,3,h,w)

def sample_name(
    cls:str, # class folder
    i:int    # index
) -> str:
    "An image's file name below the samples folder."
    return f"{cls}/{i:05d}.png"

def save_png(
    path,          # where to
    x:Tensor,      # uint8 (3,h,w)
    about:dict     # what is written into the file
) -> None:
    "One image with its caption, seed and origin inside."
    info = PngImagePlugin.PngInfo()
    for k,v in about.items(): info.add_itxt(k,str(v))
    buf = io.BytesIO(); Image.fromarray(x.permute(1,2,0).numpy()).save(buf,"PNG",pnginfo=info)
    write_atomic(path,buf.getvalue())

def samples_key(
    r:Recipe,   # the run
    texts:tuple # its captions
) -> str:
    "A hash of everything the images depend on, the adapters' bytes among it."
    files = [run_dir(r)/n/"adapter_model.safetensors" for n in PARTS.values()]
    return stable_hash([recipe_hash(r,"train","generate"),texts,[file_hash(f) for f in files if f.exists()]])

def generate(
    r:Recipe       # a trained run and generation settings
) -> Path:         # the samples folder, with metadata.csv
    "Paint one image for every caption; run again to paint only what is missing."
    out,(texts,classes) = samples_dir(r),generation_captions(r)
    if not (run_dir(r)/"done.json").exists():
        raise FileNotFoundError(f"{run_dir(r)} holds no finished training. Train first: papermill nbs/train.ipynb outputs/train-{r.dataset}.ipynb -p dataset {r.dataset} -p method {r.method} -p scale {r.scale}")
    key,stamp,state = samples_key(r,texts),out/"key.json",PartialState()
    if state.is_main_process and stamp.exists() and json.loads(stamp.read_text())["key"]!=key: shutil.rmtree(out)
    state.wait_for_everyone()
    write_atomic(stamp,json.dumps(dict(key=key,**settings(r,"generate"))))
    n,b = len(texts),r.gen_block
    todo = [k for k in range(-(-n//b)) if not all((out/sample_name(classes[i],i)).exists() for i in range(k*b,min(n,k*b+b)))]
    todo = todo[state.process_index::state.num_processes]
    if todo: _paint_blocks(r,out,texts,classes,todo,state.device)
    state.wait_for_everyone()
    m = pd.DataFrame(dict(file_name=[sample_name(c,i) for i,c in enumerate(classes)],text=texts,**{"class":classes},seed=r.seed,index=range(n)))
    if state.is_main_process: write_atomic(out/"metadata.csv",m.to_csv(index=False))
    return out

def _paint_blocks(r,out,texts,classes,todo,device):
    model,b,n = merge(load_model(r,adapters=run_dir(r),device=device)),r.gen_block,len(texts)
    block = lambda k: [min(i,n-1) for i in range(k*b,k*b+b)]
    with torch.no_grad(): conds = {k:cat_cond(model.encode_text([texts[i] for i in block(k)]),model.encode_text([""])) for k in todo}
    model.text_encoder = None
    about = dict(seed=r.seed,recipe=recipe_hash(r,"train","generate"),model=r.model,method=r.method,scale=r.scale,note="synthetic image, not for diagnosis")
    for k in progress(todo,desc=f"painting {r.dataset} {r.method}"):
        for i,x in zip(range(k*b,min(n,k*b+b)),to_uint8(paint(model,r,conds[k],block(k)))):
            save_png(out/sample_name(classes[i],i),x,dict(caption=texts[i],index=i,**about))

def load_samples(
    folder # as written by `generate`
) -> tuple: # uint8 (n,3,h,w), and its metadata
    "Read generated images back."
    m = pd.read_csv(Path(folder)/"metadata.csv",keep_default_na=False)
    s = Split(Path(folder),tuple(m.file_name),tuple(m["class"]),tuple(m.text))
    with Image.open(s.folder/s.files[0]) as im: size = min(im.size)
    return torch.stack(read_pixels(s,size)),m

def one_of_each(
    s:Split,    # images
    k:int=1,    # of each class
    seed:int=0  # which ones
) -> Split:
    "A few images of every class, in the order of the classes' first appearance."
    by = {c:[i for i,d in enumerate(s.classes) if d==c] for c in dict.fromkeys(s.classes)}
    return s[[i for c,ids in by.items() for i in np_rng(seed,f"show {c}").permutation(ids)[:k]]]

def real_beside_generated(
    r:Recipe,   # a run whose images are painted
    k:int=4     # of each kind and class
):              # figure
    "For each class k real test images, then k generated ones."
    x,m = load_samples(samples_dir(r)); test = load_split(r,"test")
    shown = one_of_each(test,k); real = [unit(crop(p,r.size)) for p in read_pixels(shown,r.size)]
    images,rows = [],list(dict.fromkeys(shown.classes))
    for c in rows:
        images += [p for p,d in zip(real,shown.classes) if d==c][:k]+[unit(x[i]) for i in m.index[m["class"]==c][:k]]
    fig = image_grid(images,ncol=2*k,cell=.8,rows=[category(c) for c in rows])
    fig.suptitle(f"{k} real test images{' ('+r.data+')' if r.data.startswith('phantom') else ''}, then {k} generated ({r.method}, {r.scale} scale)",fontsize=8)
    return fig

def before_and_after(
    r:Recipe,    # a trained run
    k:int=4,     # images of each class
    device="cpu" # where to paint
) -> dict:       # "real", "before", "after": (n,3,h,w) in -1..1, and "texts"
    "Real test images, and their captions painted by the untouched and by the fine-tuned model."
    s = one_of_each(load_split(r,"test"),k)
    def all_blocks(model): return torch.cat([paint(model,r,s.texts[i:i+r.gen_block],range(i,min(len(s),i+r.gen_block))) for i in progress(range(0,len(s),r.gen_block),desc="painting")])
    return dict(real=unit(torch.stack([crop(p,r.size) for p in read_pixels(s,r.size)])), before=all_blocks(load_base(r,device)).cpu(), after=all_blocks(merge(load_model(r,adapters=run_dir(r),device=device))).cpu(),
                texts=s.texts, classes=s.classes)

def color_histograms(
    sets:dict    # name -> images (n,3,h,w) in -1..1
):               # figure
    "How often each channel takes each value, a panel a channel."
    fig,axs = plt.subplots(1,3,figsize=(8,2.1),layout="constrained",sharey=True)
    styles = dict(zip(sets,[("black","-"),("#d55e00","--"),("#0072b2","-"),("#009e73",":")]))
    for c,(ax,name) in enumerate(zip(axs,("red","green","blue"))):
        for k,x in sets.items():
            v = x[:,c].flatten(); h = torch.histc(v.clamp(-1,1),48,-1,1)/len(v)*24
            ax.plot(torch.linspace(-1,1,48),h,color=styles[k][0],ls=styles[k][1],label=k,lw=1.4)
        ax.set(xlabel=f"{name} channel, -1..1",ylabel="density" if c==0 else "")
    axs[-1].legend(frameon=False,fontsize=7); sns.despine(fig); plt.close(fig)
    return fig
