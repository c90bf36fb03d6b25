import ast,difflib,json,re
from dataclasses import asdict,dataclass,field,fields,replace
from math import ceil
from pathlib import Path

import yaml

from medart.core import data_dir,outputs_dir,root,stable_hash,write_atomic

@dataclass(frozen=True)
class Dataset:
    "What the paper says of a data set."
    name:str          # as in `-p dataset skin`
    modality:str      # Table 1
    features:str      # visual features the VLM is asked about, Table 1
    counts:dict       # class folder -> images, Section 3
    epochs:int        # Section 3
    interval:int      # N of Eq. 5, Section 3
    classifier:str    # hub id of the ViT behind KFD and HFD, footnote 1
    distance:str      # what the paper calls the distance measured with it
    labels:dict=field(default_factory=dict) # label of a folder or table -> class folder, where they differ

DATASETS = dict(
    kvasir=Dataset("kvasir","endoscopic","specific color, shape, surrounding mucosa, surface texture, bleeding condition, and other relevant details",
        {c:1000 for c in ("dyed-lifted-polyps","dyed-resection-margins","esophagitis","normal-cecum","normal-pylorus","normal-z-line","polyps","ulcerative-colitis")},
        epochs=15, interval=500, classifier="mmuratarat/kvasir-v2-classifier", distance="KFD"),
    skin=Dataset("skin","dermoscopic","specific color, symmetry, border, shape, texture and dermoscopic patterns",
        dict(common_nevus=4906,melanoma=1180,seborrheic_keratosis=805,carcinoma=728,lentigo_solaris=229,dermatofibroma=169,vascular_lesion=160,actinic_keratosis=140),
        epochs=10, interval=1500, classifier="Anwarkh1/Skin_Cancer-Image_Classification", distance="HFD"))
"The paper's two data sets."

def category(
    folder:str # a class folder's name
) -> str:      # its name in captions
    "`dyed-lifted-polyps` is written *dyed lifted polyps*."
    return folder.replace("-"," ").replace("_"," ").strip()

def test_count(
    n:int  # images of one class
) -> int:  # how many of them are for testing
    "A fifth, rounded up: the rounding that gives the paper's own totals."
    return ceil(.2*n)

YAML_KEYS = dict(modality=str, features=str, categories=(list,dict), epochs=(int,float), interval=int, classifier=str)
"What a dataset.yaml may say."

def class_folder(
    label # any label, e.g. "Severe NPDR (grade 3)"
) -> str: # a folder name without surprises, e.g. "severe_npdr_grade_3"
    "The class folder of a label."
    return re.sub(r"[^\w-]+","_",str(label).strip().lower()).strip("_")

def read_dataset(
    name:str, # what to call it
    path      # a dataset.yaml
) -> Dataset:
    "A data set described in YAML, every key checked."
    try: y = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as e: raise ValueError(f"{path} is not valid YAML: {e}") from e
    if not isinstance(y,dict): raise ValueError(f"{path} must hold lines like `modality: fundus`; the keys are {', '.join(YAML_KEYS)}.")
    for k,v in y.items():
        if not isinstance(v,YAML_KEYS[_oneof(f"key in {path}:",k,YAML_KEYS)]) or isinstance(v,bool): raise ValueError(f"{path}: {k}={v!r} has the wrong type.")
    for k in ("modality","features"):
        if not y.get(k,"").strip(): raise ValueError(f"{path} lacks {k!r}: write for example `{k}: {getattr(DATASETS['skin'],k)}`.")
    c = y.get("categories",[])
    labels = {str(k):class_folder(v) for k,v in c.items()} if isinstance(c,dict) else {}
    return Dataset(name,y["modality"],y["features"],dict.fromkeys(labels.values() if labels else map(str,c),0),y.get("epochs"),y.get("interval"),
                   y.get("classifier","google/vit-base-patch16-224-in21k"),"FD",labels)

def dataset_named(
    name:str,   # kvasir, skin, or a name of your own
    data:str="" # for a name of your own: the folder that holds dataset.yaml
) -> Dataset:
    "One of the paper's data sets, or one described by `dataset.yaml`."
    if name in DATASETS: return DATASETS[name]
    path = data_dir()/data/"dataset.yaml"
    if data and path.exists():
        if not re.fullmatch(r"\w[\w.-]*",name): raise ValueError(f"dataset {name!r} becomes a folder's name: use letters, digits, - and _.")
        return read_dataset(name,path)
    try: return _oneof("dataset",name,DATASETS)
    except ValueError as e: raise ValueError(f"{e} Or describe your own in a file dataset.yaml beside its images, and pass data=FOLDER"+(f" (there is no {path})." if data else ".")) from None

def dataset_of(
    r # a recipe
) -> Dataset:
    "What is known of a recipe's data set."
    return dataset_named(r.dataset,r.data)

SCALES = dict(
    paper=dict(model="PixArt-alpha/PixArt-XL-2-512x512", size=512, max_tokens=120, batch_size=1, lr=1e-4, dtype="bfloat16", data="{dataset}", extractor="{classifier}", checkpointing=True,
               vlm="llava-hf/llama3-llava-next-8b-hf", simplifier="t5-large", caption_tokens=150, caption_block=8),
    tiny=dict(model="data/tiny/pixart", size=64, max_tokens=64, batch_size=4, lr=1e-3, dtype="float32", data="phantom/{dataset}", extractor="data/tiny/vit-{dataset}", epochs=10,
              interval=50, checkpointing=False, gen_count=256, vlm="data/tiny/vlm", simplifier="data/tiny/simplifier", caption_tokens=128, caption_block=32))
"Where models come from, and how large the pictures are."

def locate(
    name:str # a hub id, or a folder relative to the repository
) -> str:    # a folder if there is one, else the id
    "Find model weights in the repository first."
    for p in (Path(name),root()/name):
        if p.is_dir(): return str(p)
    return name

DIT_TARGETS = ("to_q","to_k","to_v","to_out.0","proj_out","ff.net.0.proj","ff.net.2","proj","linear","linear_1","linear_2")
"Modules of the transformer that get a LoRA; `proj` also hits the patch embedding's convolution."
PROFILES = dict(
    paper=dict(text_targets=("q","k","v","o","wi_0","wi_1","wo"), color_reduction="sum", lowercase=True, t5_dropout=False, color_at_start=False, crop="center"),
    official=dict(text_targets=("q","k","v","o","wi","wo"), color_reduction="mean", lowercase=False, t5_dropout=True, color_at_start=True, crop="random"))
"`paper` follows the text, `official` the authors' program."

def _f(default, stage="train"): return field(default=default, metadata=dict(stage=stage))

@dataclass(frozen=True)
class Recipe:
    "Everything that decides what a run makes. Build it with `recipe`."
    dataset:str                          # skin, kvasir, or what a dataset.yaml describes
    method:str                           # a key of METHODS
    scale:str                            # paper or tiny
    profile:str                          # paper or official
    seed:int = _f(0)                     # of everything drawn
    data:str = _f("")                    # folder of images: absolute, or below data/
    model:str = _f("")                   # PixArt-alpha pipeline: folder or hub id
    extractor:str = _f("","evaluate")    # ViT classifier whose features are compared: folder or hub id
    size:int = _f(512)                   # pixels a side
    max_tokens:int = _f(120)             # longest caption, T5 tokens
    captions:str = _f("vsg")             # vsg, simple or empty
    lowercase:bool = _f(True)            # training captions in lower case
    crop:str = _f("center")              # center (latents encoded once) or random
    batch_size:int = _f(1)               # images a step
    epochs:float = _f(10)                # passes over the training images
    lr:float = _f(1e-4)                  # AdamW, constant
    weight_decay:float = _f(1e-2)        # AdamW
    clip:float = _f(1.)                  # gradient norm, 0 for none
    rank:int = _f(8)                     # of both LoRAs
    alpha:int = _f(8)                    # LoRA scale is alpha/rank
    lora_transformer:bool = _f(True)     # adapt the transformer
    lora_text:bool = _f(True)            # adapt T5
    dora_transformer:bool = _f(False)    # DoRA instead of LoRA there
    dora_text:bool = _f(False)           # DoRA instead of LoRA there
    text_targets:tuple = _f(())          # modules of T5 that get a LoRA
    t5_dropout:bool = _f(False)          # T5's own dropout in training
    caption_dropout:float = _f(0.)       # share of training captions emptied
    interval:int = _f(500)               # N: steps between colour losses, 0 for never
    solver_steps:int = _f(20)            # M: DPM-Solver++ steps inside training
    guidance:float = _f(4.5)             # classifier-free guidance scale
    lambda_color:float|None = _f(None)   # weight of the colour loss, None for 1/M
    color_reduction:str = _f("sum")      # over channels: sum (Eq. 4) or mean
    color_at_start:bool = _f(False)      # a colour loss at step 0 too
    backprop_last_k:int = _f(0)          # differentiate the last k solver steps, 0 for all M
    clip_color:float = _f(1.)            # norm of the colour gradient by itself, 0 to clip only the sum
    gen_steps:int = _f(20,"generate")    # DPM-Solver++ steps for images
    gen_guidance:float = _f(4.5,"generate") # guidance for images
    gen_block:int = _f(32,"generate")    # images painted at once: fixed, so that rounding never depends on how work is split
    gen_split:str = _f("test","generate")   # whose captions: test or train
    gen_count:int = _f(0,"generate")     # how many images, an even share of each class; 0 for one per test image
    dtype:str = _f("bfloat16")           # of frozen weights and activations
    checkpointing:bool = _f(True,"watch")       # recompute in HLDF's backward pass: less memory, same gradients
    checkpoint_every:int = _f(200,"watch")      # steps
    checkpoint_minutes:float = _f(10.,"watch")  # or minutes, whichever comes first
    keep_checkpoints:int = _f(2,"watch")        # the last so many stay
    log_every:int = _f(20,"watch")       # steps between readings of the loss
    tracker:str = _f("","watch")         # "tensorboard", or nothing
    vlm:str = _f("","caption")           # vision-language model that writes the captions: folder or hub id
    simplifier:str = _f("","caption")    # T5 that shortens them: folder or hub id
    caption_seed:int = _f(0,"caption")   # of the captions' sampling: apart from seed, so that runs of several seeds share their captions
    temperature:float = _f(.8,"caption") # of the captions' sampling, as are the next two
    top_k:int = _f(50,"caption")         # likeliest words to choose from
    top_p:float = _f(.9,"caption")       # and of those, the likeliest that make up this probability
    caption_tokens:int = _f(150,"caption")  # longest answer of the model, its own tokens
    caption_retries:int = _f(3,"caption")   # more tries after a caption that breaks the rules
    caption_block:int = _f(8,"caption")  # captions written at once: fixed, so that rounding never depends on how work is split
    caption_backend:str = _f("transformers","caption") # or vllm

METHODS = dict(
    medart=dict(),
    medart_k5=dict(backprop_last_k=5),
    no_hldf=dict(interval=0),
    no_t5_lora=dict(lora_text=False),
    simple_caption=dict(captions="simple"),
    empty_caption=dict(captions="empty"),
    dora=dict(dora_text=True),
    base=dict(epochs=0, interval=0))
"Rows of Tables 2 and 3 as the settings they change. `no_hldf` is the paper's PixArt-alpha row; `medart_k5` and `base` (the model before any fine-tuning) are ours."

def _oneof(what, value, allowed):
    if value in allowed: return value
    near = difflib.get_close_matches(str(value), list(allowed), 1)
    raise ValueError(f"{what} {value!r} is unknown. Choose one of: {', '.join(allowed)}."+(f" Did you mean {near[0]!r}?" if near else ""))

def detect_scale(
) -> str: # paper or tiny
    "`paper` where a CUDA device of 24 GB or more is found. NVML is asked, so CUDA stays untouched and processes can still be launched."
    import pynvml
    try:
        pynvml.nvmlInit()
        sizes = [pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(i)).total for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError: return "tiny"
    return "paper" if max(sizes,default=0)>=24e9 else "tiny"

def recipe(
    dataset:str,           # skin, kvasir, or a name of your own together with data=FOLDER
    method:str="medart",   # a key of METHODS
    scale:str="auto",      # paper, tiny, or auto: paper where a GPU of 24 GB is found
    profile:str="paper",   # paper or official
    **changes              # any field of Recipe
) -> Recipe:
    "One frozen recipe: the data set's settings, the scale's, the profile's, the method's, then `changes`."
    d = dataset_named(dataset,changes.get("data","")); paper = dataset in DATASETS
    row = METHODS[_oneof("method",method,METHODS)]
    scale = detect_scale() if scale=="auto" else _oneof("scale",scale,SCALES)
    known = {f.name:f for f in fields(Recipe)}
    for k in changes: _oneof("setting",k,known)
    told = {k:getattr(d,k) for k in ("epochs","interval") if getattr(d,k) is not None}
    s = told|{k:v.format(dataset=dataset if paper else "skin",classifier=d.classifier) if isinstance(v,str) else v for k,v in SCALES[scale].items()}
    if not paper: s |= told
    s |= PROFILES[_oneof("profile",profile,PROFILES)]|row
    changes = {k:_typed(known[k],v) for k,v in changes.items()}
    return _check(Recipe(dataset=dataset,method=method,scale=scale,profile=profile,**(s|changes)))

def _typed(f, v):
    want = dict(int=int,float=(int,float),bool=bool,str=str,tuple=(tuple,list)).get(str(f.type).split("|")[0] if isinstance(f.type,str) else getattr(f.type,"__name__",str(f.type)), object)
    if v is None and f.default is None: return v
    if not isinstance(v,want) or (isinstance(v,bool) and want is not bool and want is not object):
        raise ValueError(f"setting {f.name}={v!r} has the wrong type: it takes {f.type if isinstance(f.type,str) else getattr(f.type,'__name__',f.type)}, for example {f.name}={f.default!r}.")
    return tuple(v) if isinstance(v,list) else v

def _check(r):
    _oneof("captions",r.captions,("vsg","simple","empty")); _oneof("crop",r.crop,("center","random"))
    _oneof("color_reduction",r.color_reduction,("sum","mean")); _oneof("gen_split",r.gen_split,("train","test"))
    _oneof("dtype",r.dtype,("float32","bfloat16","float64")); _oneof("caption_backend",r.caption_backend,("transformers","vllm"))
    for k in ("size","batch_size","rank","alpha","solver_steps","gen_steps","gen_block","log_every","checkpoint_every","keep_checkpoints","max_tokens","top_k","caption_tokens","caption_block"):
        if getattr(r,k)<1: raise ValueError(f"setting {k}={getattr(r,k)} must be 1 or more.")
    for k in ("epochs","interval","backprop_last_k","clip","clip_color","weight_decay","lr","caption_dropout","seed","caption_seed","caption_retries"):
        if getattr(r,k)<0: raise ValueError(f"setting {k}={getattr(r,k)} must not be negative.")
    if r.temperature<=0 or not 0<r.top_p<=1: raise ValueError(f"temperature={r.temperature} must be above 0, and top_p={r.top_p} above 0 and at most 1.")
    if r.backprop_last_k>r.solver_steps: raise ValueError(f"setting backprop_last_k={r.backprop_last_k} is more than solver_steps={r.solver_steps}: there are no more steps to differentiate.")
    if not (r.lora_transformer or r.lora_text): raise ValueError("lora_transformer=False and lora_text=False leave nothing to train. Switch one on, or use method='base'.")
    return r

def settings(
    r:Recipe,             # a recipe
    *stages               # train, generate, evaluate, watch; all when none is given
) -> dict:                # name -> value
    "The settings of some stages."
    return {f.name:getattr(r,f.name) for f in fields(r) if not stages or f.metadata.get("stage","train") in stages}

def _plain(r, profile="paper"): return recipe(r.dataset,r.method,r.scale,profile,**({} if r.dataset in DATASETS else dict(data=r.data)))

def _suffix(r, *stages):
    base = _plain(r)
    diff = {k:v for k,v in settings(r,*stages).items() if v!=getattr(base,k) or (k=="data" and r.dataset not in DATASETS and v!=r.dataset)}
    if "profile" in diff: # what the profile changes goes without saying
        base = _plain(r,r.profile); diff = {k:v for k,v in diff.items() if k in ("profile","data") or v!=getattr(base,k)}
    def word(k,v):
        if k in ("data","model","vlm","simplifier"): v = f"{Path(v).name}~{stable_hash(str(v))[:4]}"
        return f"+{k}={v:g}" if isinstance(v,float) else f"+{k}={'-'.join(map(str,v)) if isinstance(v,tuple) else v}"
    return "".join(word(k,v) for k,v in sorted(diff.items()))

def run_dir(
    r:Recipe  # a recipe
) -> Path:    # outputs/{dataset}-{scale}/{method}{+changes}
    "The folder that holds everything one training run makes."
    return outputs_dir()/f"{r.dataset}-{r.scale}"/(r.method+_suffix(r,"train","caption"))

def samples_dir(
    r:Recipe  # a recipe
) -> Path:    # {run_dir}/samples{+changes}
    "The folder of the images that one run generates with one set of generation settings."
    return run_dir(r)/("samples"+_suffix(r,"generate"))

def captions_dir(
    r:Recipe  # a recipe
) -> Path:    # outputs/{dataset}-{scale}/captions/{vlm}{+changes}
    "The folder of the captions that one model writes with one set of caption settings: shared by all runs that train on them."
    plain = _plain(r); same = dict(vlm=plain.vlm,data=r.data,max_tokens=r.max_tokens)
    return outputs_dir()/f"{r.dataset}-{r.scale}"/"captions"/(Path(r.vlm).name+_suffix(replace(plain,**settings(r,"caption")|same),"train","caption"))

def recipe_hash(
    r:Recipe, # a recipe
    *stages   # train and caption by default
) -> str:     # 16 hexadecimal digits
    "A hash of the settings that decide a stage's result."
    return stable_hash(settings(r,*(stages or ("train","caption"))))

def save_recipe(
    r:Recipe, # a recipe
    folder    # where config.json goes
) -> Path:
    "Write `config.json`."
    return write_atomic(Path(folder)/"config.json", json.dumps(asdict(r)|dict(hash=recipe_hash(r)), indent=1)+"\n")

def load_recipe(
    folder    # a run's folder
) -> Recipe:
    "Read `config.json` back."
    d = json.loads((Path(folder)/"config.json").read_text()); d.pop("hash",None)
    for k in d: _oneof(f"setting in {folder}/config.json:",k,[f.name for f in fields(Recipe)])
    return Recipe(**{k:tuple(v) if isinstance(v,list) else v for k,v in d.items()})

def injected_names(
    ns:dict # a notebook's globals
) -> list:  # names that papermill set
    "What papermill's `-p` put into the notebook: the names assigned in the cell that begins with `# Parameters`."
    cells = [c for c in ns.get("In",[]) if c.lstrip().startswith("# Parameters")]
    return [t.id for n in ast.parse(cells[-1]).body if isinstance(n,ast.Assign) for t in n.targets] if cells else []

def recipe_from(
    ns:dict,  # a notebook's globals
    *extra    # names of further parameters this notebook takes
) -> Recipe:
    "The recipe that a notebook's parameters ask for."
    known = [f.name for f in fields(Recipe)]
    for k in injected_names(ns): _oneof("parameter",k,[*known,*extra])
    given = {k:ns[k] for k in known if k in ns and not callable(ns[k])}
    return recipe(**{k:v for k,v in given.items() if not (isinstance(v,str) and v=="" and k!="tracker")})

def describe(
    r:Recipe # a recipe
):           # pandas DataFrame, one row a setting
    "A recipe as a table to read."
    import pandas as pd
    return pd.DataFrame([(f.metadata.get("stage","train"), f.name, str(getattr(r,f.name))) for f in fields(r)], columns=["stage","setting","value"]).set_index("setting")
