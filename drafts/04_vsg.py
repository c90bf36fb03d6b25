# %% [markdown]
# # The Visual Symptom Generator
# > A vision-language model says what is seen, one image at a time
#
# Labels such as *melanoma* are all that most medical data sets have. This notebook asks a vision-language model (VLM) to describe every image, checks what it says, and keeps the answers where a kill cannot lose
# them. It needs images (`03_data`) and a VLM: the small one under `data/tiny/`, or LLaVA-NeXT or Ovis2.

# %%
#| default_exp vsg

# %%
#| export
import json,os,re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from PIL import Image,ImageOps
from torch import Tensor
from transformers import LogitsProcessor

from medart.core import file_hash,progress,seed_of,stable_hash
from medart.data import Split,load_split
from medart.phantom import simple_caption
from medart.recipes import Dataset,Recipe,captions_dir,category,dataset_of,locate,settings

# %%
#| hide
import tempfile

import seaborn as sns
from fastcore.test import test_close,test_eq,test_fail

from medart.core import check_answer,image_grid
from medart.phantom import FEATURE_SEED,phantom
from medart.recipes import DATASETS,recipe

# %% [markdown]
# ## What the model is asked
#
# Section 2.1 gives the question, Table 1 what is filled in. The answer has to begin like the simple caption, so that every caption names modality and class, whatever else it says.

# %%
#| export
TEMPLATE = ("{simple}. Please describe the {modality} image of {category} using the following visual features: {features}. "
            "Start with '{simple}' and ensure the description does not exceed 100 words.")
"The question of Section 2.1."

def question(
    d:Dataset,  # modality and visual features
    cls:str     # class folder
) -> str:       # what the VLM is asked about an image of that class
    "The template, filled in from Table 1."
    c = category(cls)
    return TEMPLATE.format(simple=simple_caption(d.modality,c),modality=d.modality,category=c,features=d.features)

# %%
skin,kvasir = DATASETS["skin"],DATASETS["kvasir"]
assert question(kvasir,"dyed-lifted-polyps").startswith("An endoscopic image of dyed lifted polyps. Please describe the endoscopic image")
[question(kvasir,"dyed-lifted-polyps"), question(skin,"melanoma")]

# %% [markdown]
# ## Chance that can be repeated
#
# The authors sample their captions: temperature 0.8, the 50 likeliest words, of those the likeliest that make up 90%. Transformers would draw from global randomness, so that an image's caption depended on which
# others share its batch. Instead we use that adding Gumbel noise $g=-\log(-\log u)$ to logits $\ell$ and taking the largest is the same as sampling:
#
# $$\Pr\left[\arg\max_k(\ell_k+g_k)=j\right]=\frac{e^{\ell_j}}{\sum_k e^{\ell_k}}$$
#
# Every image brings its own noise, drawn in advance from a seed of its own: one number for each word it may write and each of the 50 candidates, in order of their likelihood.

# %%
#| export
def gumbel(
    seed:int,   # of one caption
    tokens:int, # longest caption
    k:int       # candidates at each place
) -> Tensor:    # (tokens,k)
    "A caption's noise."
    return -torch.empty(tokens,k).exponential_(generator=torch.Generator().manual_seed(seed)).log()

class SeededSampler(LogitsProcessor):
    "Temperature, top-k, top-p and one draw a row. What is drawn is the only word left, so greedy decoding takes it."
    def __init__(self,
        noise:Tensor,      # (n,tokens,k), row i belongs to image i
        temperature:float, # below 1: surer
        top_p:float        # probability that the candidates must make up
    ): self.noise,self.temperature,self.top_p,self.place = noise,temperature,top_p,0

    def __call__(self, input_ids, scores):
        noise = self.noise[:,self.place,:scores.shape[-1]].to(scores.device); self.place += 1
        top,ids = (scores.float()/self.temperature).topk(noise.shape[-1])
        p = top.softmax(-1)
        noisy = (top+noise).masked_fill(p.cumsum(-1)-p>=self.top_p,-torch.inf)
        return torch.full_like(scores,-torch.inf).scatter(-1,ids.gather(-1,noisy.argmax(-1,keepdim=True)),0.)

# %% [markdown]
# Ten thousand draws against the probabilities they should follow. The last two of these six words are beyond 90%, and never come:

# %%
logits = torch.tensor([2.,1.5,1.,.5,-1.,-2.]); n = 10_000
draw = SeededSampler(torch.stack([gumbel(i,1,50) for i in range(n)]),.8,.9)(None,logits.expand(n,-1)).argmax(-1)
kept = (logits/.8).softmax(-1)[:4]; want = kept/kept.sum()
seen = torch.bincount(draw,minlength=6)/n
test_close(seen[:4].numpy(),want.numpy(),eps=.02); test_eq(seen[4:].sum().item(),0)
pd.DataFrame(dict(wanted=want,drawn=seen[:4])).round(3).T

# %% [markdown]
# ## A model that writes
#
# LLaVA-NeXT, Ovis2 and the small model are asked in the same way: `AutoModelForImageTextToText` finds the native class, the processor's chat template wraps the question, and prompts are padded on the left, so
# that all answers start at the same place.

# %%
#| export
def chat(
    question:str,   # in words
    image=None      # PIL image, or None for a mere placeholder
) -> list:          # a conversation of one message
    "A question about an image, in the chat format of transformers."
    return [dict(role="user",content=[dict(type="image",**({} if image is None else dict(image=image))),dict(type="text",text=question)])]

@dataclass
class Vlm:
    "A vision-language model of transformers and how it samples."
    model:object       # LlavaNextForConditionalGeneration, Ovis2ForConditionalGeneration, ...
    processor:object   # its processor, padding on the left
    tokens:int=150     # longest answer
    temperature:float=.8
    top_k:int=50
    top_p:float=.9

    @torch.no_grad()
    def write(self,
        images:list,    # n PIL images
        questions:list, # n strings
        seeds:list      # n numbers, one a caption
    ) -> list:          # n answers
        "Describe n images at once; what image i is called depends on seed i only."
        inputs = self.processor.apply_chat_template([chat(q,im) for q,im in zip(questions,images)],add_generation_prompt=True,tokenize=True,return_dict=True,return_tensors="pt",
                                                    processor_kwargs=dict(padding=True)).to(self.model.device,self.model.dtype)
        sampler = SeededSampler(torch.stack([gumbel(s,self.tokens,self.top_k) for s in seeds]),self.temperature,self.top_p)
        out = self.model.generate(**inputs,max_new_tokens=self.tokens,do_sample=False,temperature=None,top_k=None,top_p=None,logits_processor=[sampler])
        return self.processor.batch_decode(out[:,inputs["input_ids"].shape[1]:],skip_special_tokens=True)

# %%
#| export
def load_vlm(
    r:Recipe,     # names the model, its precision and its sampling
    device="cpu"  # where to
):                # something that can `write`
    "The VLM that a recipe asks for."
    how = dict(tokens=r.caption_tokens,temperature=r.temperature,top_k=r.top_k,top_p=r.top_p)
    if r.caption_backend=="vllm": return load_vllm(r.vlm,r.dtype,how)
    from transformers import AutoModelForImageTextToText,AutoProcessor
    try:
        processor = AutoProcessor.from_pretrained(locate(r.vlm),padding_side="left")
        model = AutoModelForImageTextToText.from_pretrained(locate(r.vlm),dtype=getattr(torch,r.dtype))
    except (OSError,ValueError) as e:
        raise FileNotFoundError(f"No vision-language model at {r.vlm!r}. With a network it comes from the Hugging Face hub by itself (llava-hf/llama3-llava-next-8b-hf: about 17 GB); on another machine run "
            f"`hf download {r.vlm}` and copy the cache, or pass vlm=FOLDER. The small embedded model is vlm=data/tiny/vlm, or scale=tiny. ({type(e).__name__}: {str(e)[:200]})") from e
    return Vlm(model.to(device).eval(),processor,**how)

# %% [markdown]
# At full size, captioning thousands of images goes faster with [vLLM](https://docs.vllm.ai), which keeps a GPU busy by its own scheduling. It is an optional extra (`pip install -e '.[vllm]'`, in an environment of
# its own, since it asks for one exact version of torch), chosen by `caption_backend="vllm"`. Its draws are seeded per image too; but its batches form as requests come, and rounding with them, so the promise of
# equal bytes holds for the other backend only.

# %%
#| export
@dataclass
class VllmVlm:
    "The same verb on vLLM's engine."
    engine:object      # vllm.LLM
    processor:object   # for the chat template
    params:type        # vllm.SamplingParams
    tokens:int=150     # longest answer
    temperature:float=.8
    top_k:int=50
    top_p:float=.9

    def write(self, images:list, questions:list, seeds:list) -> list:
        "Describe n images; vLLM batches them as it likes."
        prompts = self.processor.apply_chat_template([chat(q) for q in questions],add_generation_prompt=True)
        asked = [dict(prompt=p,multi_modal_data=dict(image=im)) for p,im in zip(prompts,images)]
        how = [self.params(max_tokens=self.tokens,temperature=self.temperature,top_k=self.top_k,top_p=self.top_p,seed=s) for s in seeds]
        return [o.outputs[0].text for o in self.engine.generate(asked,how,use_tqdm=False)]

def load_vllm(
    name:str,  # hub id or folder
    dtype:str, # of weights and activations
    how:dict   # tokens, temperature, top_k, top_p
) -> VllmVlm:
    "A VLM behind vLLM. One process: the engine spreads over GPUs itself."
    try: from vllm import LLM,SamplingParams
    except ImportError as e: raise ImportError("caption_backend='vllm' needs vLLM: pip install -e '.[vllm]' in an environment of its own, or use caption_backend='transformers'.") from e
    if PartialState().num_processes>1: raise ValueError("vLLM spreads over GPUs by itself: start one process, without `accelerate launch`.")
    from transformers import AutoProcessor
    return VllmVlm(LLM(model=locate(name),dtype=dtype,limit_mm_per_prompt=dict(image=1)),AutoProcessor.from_pretrained(locate(name)),SamplingParams,**how)

# %%
if not __import__("importlib.util").util.find_spec("vllm"): test_fail(lambda: load_vlm(recipe("skin",scale="tiny",caption_backend="vllm")), contains="needs vLLM")

# %% [markdown]
# The small VLM reads drawn images. It has never seen these six: they come from the world it was trained on, under numbers that training does not reach.

# %%
#| export
def open_image(
    path # an image file
) -> Image.Image:
    "An upright RGB image, whole: the VLM's own processor decides what it looks at."
    with Image.open(path) as im: return ImageOps.exif_transpose(im).convert("RGB")

# %%
r = recipe("skin",scale="tiny")
vlm = load_vlm(r)
drawn = [("melanoma",900_001),("common_nevus",900_002),("dermatofibroma",900_003),("seborrheic_keratosis",900_004),("vascular_lesion",900_005),("actinic_keratosis",900_006)]
shots = [Image.fromarray(phantom("skin",c,FEATURE_SEED,i)[0]) for c,i in drawn]
asked = [question(skin,c) for c,_ in drawn]
texts = vlm.write(shots,asked,range(6))
image_grid(shots,texts,ncol=3,cell=2.4,width=46)

# %% [markdown]
# An image's caption is its own: alone or in company, it reads the same. Another seed words it otherwise.

# %%
test_eq(vlm.write(shots[2:4],asked[2:4],[2,3]), texts[2:4])
vlm.write(shots[:1]*3,asked[:1]*3,[0,100,101])

# %% [markdown]
# ## Which answers count
#
# Models ramble, refuse, and repeat the question. What comes back is tidied first: outer quotes and stray newlines go, and so does a last sentence that the token limit cut off.

# %%
#| export
def tidy(
    text:str # as the model wrote it
) -> str:    # one line of whole sentences
    "Strip an answer of what is not part of the description."
    text = " ".join(text.split()).strip("\"'“”‘’ ")
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s|$)",text)]
    return text if not ends or text.endswith((".","!","?")) else text[:ends[-1]]

# %%
tidy("\nA dermoscopic image of melanoma shows a dark patch. It has a jagged border. The sur")

# %%
#| export
MIN_WORDS,MAX_WORDS = 6,100
"Fewest words after the opening, and most words in all: the question's own limit."
REFUSALS = re.compile(r"\b(i'?m sorry|i am sorry|i apologi[sz]e|i can'?t|i cannot|i'?m (unable|not able)|i am (unable|not able)|as an ai|as a language model|consult a (doctor|dermatologist|physician|medical))\b",re.I)
ECHO = 5
"A run of so many words of the feature list, in its order, is an echo."

def _words(text): return re.findall(r"[a-z0-9-]+",text.lower())
def _bare(text): return re.sub(r"^an? ","",text.lower())

def caption_fault(
    text:str,    # a tidied answer
    simple:str,  # how it has to begin
    features:str # what must not be parroted
) -> str:        # refusal, opening, echo, short, long; empty when there is none
    "What is wrong with a caption."
    if REFUSALS.search(text): return "refusal"
    if not _bare(text).startswith(_bare(simple)): return "opening"
    said,asked = " ".join(_words(text)),_words(features)
    if any(e in said for e in (*(" ".join(asked[i:i+ECHO]) for i in range(len(asked)-ECHO+1)),"following visual features","does not exceed")): return "echo"
    if len(said.split())<len(_words(simple))+MIN_WORDS: return "short"
    return "long" if len(text.split())>MAX_WORDS else ""

# %%
s,f = "A dermoscopic image of melanoma",skin.features
answers = {f"{s} shows a dark brown patch with a jagged border.":"", f"an{s[1:]} shows a dark brown patch with a jagged border.":"", "I'm sorry, I cannot describe medical images.":"refusal",
           "The image shows a dark brown patch with a jagged border.":"opening", f"{s} with specific color, symmetry, border, shape and so on.":"echo", f"{s} shows a patch.":"short", s+" shows a patch and another patch"*30+".":"long"}
test_eq([caption_fault(a,s,f) for a in answers], list(answers.values()))
pd.DataFrame([(a[:70],w or "none") for a,w in answers.items()],columns=["answer","fault"])

# %% [markdown]
# > The authors ask again until an answer passes, without end. We ask at most `caption_retries` more times, each with a seed of its own, and then take the simple caption. Every rejected draft is kept beside the
# > caption, with its fault.

# %%
#| export
def caption_block(
    vlm,             # can `write`
    r:Recipe,        # seed and retries
    s:Split,         # the images, n of them
    stream:str       # the split's name, part of each seed
) -> list:           # n records: text, source (vsg or simple), drafts and their faults
    "Caption a block of images, asking again where an answer is not fit."
    d = dataset_of(r); n = len(s); simple = [simple_caption(d.modality,category(c)) for c in s.classes]
    images,asked,drafts,waiting = [open_image(s.folder/f) for f in s.files],[question(d,c) for c in s.classes],[[] for _ in range(n)],list(range(n))
    for attempt in range(1+r.caption_retries):
        rows = (waiting*n)[:n] # always n at once
        texts = vlm.write([images[i] for i in rows],[asked[i] for i in rows],[seed_of(r.caption_seed,f"caption {stream}/{s.files[i]}",attempt) for i in rows])
        for i,t in zip(waiting,map(tidy,texts)): drafts[i].append(dict(text=t,fault=caption_fault(t,simple[i],d.features)))
        waiting = [i for i in waiting if drafts[i][-1]["fault"]]
        if not waiting: break
    return [dict(category=c,text=simple[i] if i in waiting else drafts[i].pop()["text"],source="simple" if i in waiting else "vsg",drafts=drafts[i]) for i,c in enumerate(s.classes)]

# %% [markdown]
# ## A store that survives
#
# Captioning a data set takes hours. Each caption is therefore put on disk as soon as its block is done: one line of JSON, flushed to the disk itself before the next. A kill can tear the last line only, and a torn
# line is no line. Each line carries a key, the hash of all it depends on: the question, the sampling, the model, the image's bytes. Lines whose key has changed do not count.

# %%
#| export
def append_line(
    path,       # a file of JSON lines
    record:dict # to add
) -> None:
    "Add one line and see it to the disk."
    path = Path(path); path.parent.mkdir(parents=True,exist_ok=True)
    with open(path,"ab+") as f:
        if f.tell(): f.seek(-1,os.SEEK_END); torn = f.read(1)!=b"\n"
        else: torn = False
        f.write(b"\n"*torn+json.dumps(record,ensure_ascii=False).encode()+b"\n"); f.flush(); os.fsync(f.fileno())

def read_lines(
    folder,    # of *.jsonl
    keys:dict  # name -> key
) -> dict:     # name -> record
    "All whole lines that are still valid."
    found = {}
    for line in (l for f in sorted(Path(folder).glob("*.jsonl")) for l in f.read_bytes().split(b"\n")):
        try: rec = json.loads(line)
        except ValueError: continue
        if keys.get(rec["name"])==rec["key"]: found[rec["name"]] = rec
    return found

# %%
with tempfile.TemporaryDirectory() as d:
    f,keys = Path(d)/"0.jsonl",dict(a=1,b=1,c=2)
    for n in "abc": append_line(f,dict(name=n,key=1,text=n.upper()))
    test_eq(list(read_lines(d,keys)), ["a","b"])          # c's key has changed
    os.truncate(f,f.stat().st_size-45)                    # a kill tears b's line
    test_eq(list(read_lines(d,keys)), ["a"])
    append_line(f,dict(name="b",key=1,text="B again"))
    test_eq({k:v["text"] for k,v in read_lines(d,keys).items()}, dict(a="A",b="B again"))

# %% [markdown]
# Kernels round differently at different batch sizes. So work is done in blocks of one fixed size, the last one filled up, and whole blocks are dealt to the processes; a block of which some lines are missing is done
# again as a whole, and only the missing lines are added. The captions are then the same bytes with one process or eight, interrupted or not.

# %%
#| export
def fill_store(
    folder,       # of the store, one file a process
    keys:dict,    # name -> key, in a fixed order
    block:int,    # names done at once
    load,         # device -> whatever the work needs
    work,         # (that, block of names) -> one record a name
    desc:str      # on the progress bar
) -> dict:        # name -> record, all of them
    "Do what is missing, on as many processes as there are."
    state,names = PartialState(),list(keys); done = read_lines(folder,keys)
    state.wait_for_everyone()
    blocks = [names[i:i+block] for i in range(0,len(names),block)]
    todo = [b for b in blocks if any(n not in done for n in b)][state.process_index::state.num_processes]
    tool = load(state.device) if todo else None
    for b in progress(todo,desc=desc,disable=not state.is_main_process):
        for n,rec in zip(b,work(tool,b+b[-1:]*(block-len(b)))):
            if n not in done: append_line(Path(folder)/f"{state.process_index}.jsonl",dict(name=n,key=keys[n],**rec))
    state.wait_for_everyone()
    found = read_lines(folder,keys)
    return {n:found[n] for n in names}

# %%
with tempfile.TemporaryDirectory() as d:
    keys,calls = {n:0 for n in "abcdefg"},[]
    shout = lambda tool,names: calls.append("".join(names)) or [dict(text=n.upper()) for n in names]
    go = lambda: "".join(v["text"] for v in fill_store(d,keys,3,lambda device: None,shout,"shouting").values())
    test_eq(go(), "ABCDEFG"); test_eq(go(), "ABCDEFG")   # the second time, nothing is left to do
    os.truncate(Path(d)/"0.jsonl",200)
    test_eq(go(), "ABCDEFG")
calls

# %% [markdown]
# ## All captions of a split
#
# What the captions depend on, hashed: for a model in a folder its files, for one on the hub its name.

# %%
#| export
def weights_key(
    name:str # hub id or folder
) -> str:
    "Changes when a model does: sizes of all files in its folder, and contents of those below 64 MB."
    where = Path(locate(name))
    if not where.is_dir(): return name
    return stable_hash([(str(f.relative_to(where)),n,file_hash(f) if n<2**26 else "") for f in sorted(where.rglob("*")) if f.is_file() and f.suffix in (".json",".safetensors",".jinja",".model") for n in [f.stat().st_size]])

def caption_images(
    r:Recipe,    # model, sampling, data
    split:str    # train or test
) -> pd.DataFrame: # one row an image: file_name, class, simple, text, source, tries, faults
    "VSG captions of a split; run again to write only what is missing."
    s = load_split(r,split); at = {f:i for i,f in enumerate(s.files)}
    how = {k:v for k,v in settings(r,"caption").items() if k not in ("vlm","simplifier")}
    base = [TEMPLATE,r.dataset,split,r.dtype,weights_key(r.vlm),how]
    keys = {f:stable_hash([base,f,c,file_hash(s.folder/f)]) for f,c in zip(s.files,s.classes)}
    done = fill_store(captions_dir(r)/split/"drafts",keys,r.caption_block,lambda device: load_vlm(r,device),
                      lambda vlm,names: caption_block(vlm,r,s[[at[n] for n in names]],split),f"captioning {r.dataset} {split}")
    return captions_table(r,[dict(done[f],file_name=f) for f in s.files])

def captions_table(
    r:Recipe,     # for the simple captions
    records:list  # of `caption_block`, with file names
) -> pd.DataFrame:
    "Records as a table."
    simple = [simple_caption(dataset_of(r).modality,category(d["category"])) for d in records]
    faults = [" ".join(x["fault"] for x in d["drafts"]) for d in records]
    return pd.DataFrame({"file_name":[d["file_name"] for d in records],"class":[d["category"] for d in records],"simple":simple,"text":[d["text"] for d in records],
                         "source":[d["source"] for d in records],"tries":[len(d["drafts"])+(d["source"]=="vsg") for d in records],"faults":faults})

# %%
table = caption_images(r,"test")
table[::64].drop(columns=["simple"])

# %% [markdown]
# ## How well it goes
#
# How many captions passed at once, how many after asking again, and how many had to be replaced; and what was wrong with the drafts that were thrown away.

# %%
#| export
def validity(
    table:pd.DataFrame # of `caption_images`
) -> pd.DataFrame:     # one row a class and one for all
    "Shares of captions accepted at once, after retries, and replaced by the simple caption."
    t = table.assign(**{"at once":(table.source=="vsg")&(table.tries==1),"after retries":(table.source=="vsg")&(table.tries>1),"replaced":table.source=="simple"})
    out = pd.concat([t,t.assign(**{"class":"all"})]).groupby("class",sort=False).agg(images=("tries","size"),**{k:(k,"mean") for k in ("at once","after retries","replaced")},tries=("tries","mean")).round(3)
    return out.reset_index()

def fault_counts(
    table:pd.DataFrame # of `caption_images`
) -> dict:             # fault -> rejected drafts
    "What was wrong with rejected drafts."
    return pd.Series(" ".join(table.faults).split(),dtype=str).value_counts().to_dict()

# %%
assert validity(table).set_index("class").loc["all","replaced"]<.1
fault_counts(table)

# %%
validity(table)

# %% [markdown]
# ## What the words tell
#
# A caption is worth something if it says more than the class. But words should differ between classes too: these stand out most, the share of captions that use a word in the class against all others. The class's own
# name is left out, since every caption has it from the question.

# %%
#| export
def telling_words(
    table:pd.DataFrame, # with columns class and text
    k:int=6             # words a class
) -> pd.DataFrame:      # class, word, share in the class, share elsewhere
    "The words that set a class apart from all others."
    used = pd.DataFrame([dict.fromkeys(_words(t),1.) for t in table.text]).fillna(0.).groupby(table["class"].values,sort=False)
    inside,n = used.mean(),used.size(); rows = []
    for c in inside.index:
        rest = (inside.drop(c).mul(n.drop(c),axis=0)).sum()/max(1,n.drop(c).sum())
        gap = (inside.loc[c]-rest).drop(_words(category(c)),errors="ignore").nlargest(k)
        rows += [(c,w,inside.loc[c,w],rest[w]) for w in gap.index]
    return pd.DataFrame(rows,columns=["class","word","in the class","elsewhere"]).round(2)

def words_figure(
    words:pd.DataFrame # of `telling_words`
):                     # figure
    "Which word sets which class apart."
    import matplotlib.pyplot as plt
    import seaborn as sns
    classes = list(dict.fromkeys(words["class"])); nrow = -(-len(classes)//4)
    fig,axs = plt.subplots(nrow,4,figsize=(9,1.5*nrow+.4),layout="constrained",sharex=True,squeeze=False)
    for ax,c in zip(axs.flat,classes):
        w = words[words["class"]==c]; y = range(len(w))
        ax.hlines(y,w.elsewhere,w["in the class"],color=".75",lw=1.5); ax.plot(w["in the class"],y,"o",ms=4,color="#d55e00"); ax.plot(w.elsewhere,y,"o",ms=4,mfc="white",color="#0072b2")
        ax.set(title=category(c),yticks=y,yticklabels=w.word,xlim=(-.03,1.03)); ax.invert_yaxis(); ax.tick_params(labelsize=7); ax.title.set_fontsize(8)
    for ax in axs.flat[len(classes):]: ax.axis("off")
    fig.supxlabel("share of captions with the word: in the class (filled), elsewhere (open)",fontsize=8); sns.despine(fig); plt.close(fig)
    return fig

# %%
words_figure(telling_words(table))

# %% [markdown]
# ## Try it
#
# 1. Sampling is what makes captions vary. With `temperature=.01`, do different seeds still give different captions? Why?

# %%
cold = load_vlm(recipe("skin",scale="tiny",temperature=.01))
check_answer(len(set(cold.write(shots[:1]*4,asked[:1]*4,range(4)))), 1, "divided by .01, the gap between the likeliest word and the next dwarfs any Gumbel noise")

# %% [markdown]
# 2. Ask about a nevus, but show the melanoma. Which words follow the question, and which the picture?

# %%
vlm.write(shots[:1],asked[1:2],[0]), vlm.write(shots[1:2],asked[1:2],[0])

# %% [markdown]
# 3. A model of which every tenth answer is unfit is asked again up to three times. How many of 6,652 captions will be simple ones in the end?

# %%
check_answer(round(6652*.1**4,1), .7, "all four answers have to be unfit")
