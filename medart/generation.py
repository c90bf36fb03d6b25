import io,json,shutil
from dataclasses import dataclass
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

@dataclass(frozen=True)
class Plan:
    "What to paint."
    index:tuple    # n numbers of images: the place of the caption in the test set, or a running number
    classes:tuple  # n class folders
    texts:tuple    # n captions

    def __len__(self): return len(self.index)

def generation_plan(
    r:Recipe   # gen_split says whose captions, gen_count how many
) -> Plan:
    "One caption for each test image, or for an even share of them."
    test = load_split(r,"test"); texts = list(test.texts)
    by = {c:[i for i,d in enumerate(test.classes) if d==c] for c in dict.fromkeys(test.classes)}
    if r.gen_split=="train":
        train = load_split(r,"train")
        for c,ids in by.items():
            own = [t for t,d in zip(train.texts,train.classes) if d==c]
            if not own: raise ValueError(f"class {c} has {len(ids)} test images and no training image to take captions from. Use gen_split=test, or add images to {train.folder}.")
            g = np_rng(r.seed,f"captions {c}"); drawn = [j for _ in range(-(-len(ids)//len(own))) for j in g.permutation(len(own))]
            for i,j in zip(ids,drawn): texts[i] = own[j]
    share = min(1,r.gen_count/len(test)) if r.gen_count else 1
    keep = sorted(i for ids in by.values() for i in ids[:max(1,round(share*len(ids)))])
    return Plan(tuple(keep),tuple(test.classes[i] for i in keep),tuple(texts[i] for i in keep))

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
    out,plan = samples_dir(r),generation_plan(r)
    if not (run_dir(r)/"done.json").exists():
        raise FileNotFoundError(f"{run_dir(r)} holds no finished training. Train first: papermill nbs/train.ipynb outputs/train-{r.dataset}.ipynb -p dataset {r.dataset} -p method {r.method} -p scale {r.scale}")
    key,stamp,state = samples_key(r,plan.texts),out/"key.json",PartialState()
    if state.is_main_process and stamp.exists() and json.loads(stamp.read_text())["key"]!=key: shutil.rmtree(out)
    state.wait_for_everyone()
    write_atomic(stamp,json.dumps(dict(key=key,**settings(r,"generate"))))
    names = [sample_name(c,i) for c,i in zip(plan.classes,plan.index)]
    blocks = [range(k,min(len(plan),k+r.gen_block)) for k in range(0,len(plan),r.gen_block)]
    todo = [b for b in blocks if not all((out/names[j]).exists() for j in b)][state.process_index::state.num_processes]
    if todo: _paint_blocks(r,out,plan,names,todo,state.device)
    state.wait_for_everyone()
    m = pd.DataFrame(dict(file_name=names,text=plan.texts,**{"class":plan.classes},seed=r.seed,index=plan.index))
    if state.is_main_process: write_atomic(out/"metadata.csv",m.to_csv(index=False))
    return out

def _paint_blocks(r,out,plan,names,todo,device):
    model = merge(load_model(r,adapters=run_dir(r),device=device))
    full = {b:[*b]+[b[-1]]*(r.gen_block-len(b)) for b in todo}
    with torch.no_grad(): conds = {b:cat_cond(model.encode_text([plan.texts[j] for j in full[b]]),model.encode_text([""])) for b in todo}
    model.text_encoder = None
    about = dict(seed=r.seed,recipe=recipe_hash(r,"train","generate"),model=r.model,method=r.method,scale=r.scale,note="synthetic image, not for diagnosis")
    for b in progress(todo,desc=f"painting {r.dataset} {r.method}"):
        for j,x in zip(b,to_uint8(paint(model,r,conds[b],[plan.index[j] for j in full[b]]))):
            save_png(out/names[j],x,dict(caption=plan.texts[j],index=plan.index[j],**about))

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
