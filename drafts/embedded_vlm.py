# %% [markdown]
# ## A small vision-language model
#
# Captions at tiny scale are read off the pixels too. The model that does it is a `LlavaNextForConditionalGeneration`, as at full size: a CLIP vision tower, a projector, a Llama; what differs is their size. LLaVA-NeXT looks at an
# image as a whole and, tile by tile, more closely. Here the whole has 32 pixels, and four tiles of 32 make up the 64: 16 tokens for the whole, 64 for the tiles, and one at the end of each of their eight rows.

# %%
#| export
import re
from collections import Counter
from dataclasses import asdict

import pandas as pd
from PIL import Image

from medart.core import save_table
from medart.phantom import caption,describe_phantom,simple_caption
from medart.recipes import category,recipe
from medart.simplify import count_tokens,limits,load_simplifier,load_tokenizer,shortening_fault
from medart.vsg import TEMPLATE,caption_fault,chat,load_vlm,question,tidy

# %% [markdown]
# ### What it learns to say
#
# The captions of the data sets leave things out at random. The VLM's say everything: a fair coin is replaced by one that always falls on *say it*. One caption in three is also wordy, as VLMs tend to be: it goes on
# about what is *not* there. That is what the simplifier has to cut later.

# %%
#| export
class SayAll:
    "Stands in for a random generator where every coin shall fall on yes."
    def random(self): return 0.
    def permutation(self, n): return np.arange(n)

def asides(
    p # a Phantom
) -> list: # sentences, the most important first
    "What a wordy caption adds: true, and mostly of no importance."
    none = [w for w,a in (("spots",p.spots),("ring around it",p.ring),("lines",p.lines)) if not a]
    if p.modality=="dermoscopic":
        out = ["The skin is without hairs."]*(not p.hairs)+["There is no veil."]*(not p.veil)+["The surface is not shiny."]*(not p.shiny)
    else: out = [f"A dark lumen is {'seen in this image' if p.lumen else 'not seen'}."]*(p.feature not in ("hole","folds"))
    if none: out.append("There are no "+" and no ".join(none)+".")
    return [f"The edges of the image are {'dark' if p.corners else 'not dark'}.",*out]

def full_caption(
    p,                # a Phantom
    wordy:bool=False  # with asides
) -> str:
    "Everything that can be said of a phantom."
    return " ".join([caption(SayAll(),p)]+asides(p)*wordy)

# %%
p,text = describe_phantom("skin","melanoma",FEATURE_SEED,0)
[text, full_caption(p), full_caption(p,wordy=True)]

# %% [markdown]
# ### A tokenizer of words and phrases
#
# As above, but with capitals, and with the question's fixed phrases as single pieces: they are the same for every image, and a piece costs the same whether it holds a word or ten.

# %%
#| export
ASIDE_WORDS = "The It There A An at not without this seen surface lumen edges simplify:".split()
"Words of captions that are not in the lists above."

def cased_unigram(
    words,      # whole words
    phrases=()  # longer pieces, kept together
) -> Tokenizer:
    "A Unigram model of phrases, words and letters, which keeps capitals."
    words = dict.fromkeys([*words,*(w for d in DATASETS.values() for c in d.counts for w in category(c).split())])
    phrases = dict.fromkeys("▁"+p.replace(" ","▁") for p in phrases)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:'()/%-!?\""
    pieces = [("<pad>",0.),("</s>",0.),("<unk>",-30.)]+[(p,-5.) for p in [*phrases,*("▁"+w for w in words if "▁"+w not in phrases)]]+[("▁",-8.)]+[(c,-9.) for c in letters]
    t = Tokenizer(models.Unigram(pieces,unk_id=2))
    t.pre_tokenizer,t.decoder = pre_tokenizers.Metaspace(split=not phrases),decoders.Metaspace(split=not phrases)
    return t

def vlm_processor(
):  # LlavaNextProcessor
    "Image processor, tokenizer and chat template of the small VLM."
    from transformers import LlavaNextProcessor,PreTrainedTokenizerFast
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    fixed = [p.strip(" .'") for p in re.split(r"{\w+}",TEMPLATE) if len(p.split())>2]+[d.features for d in DATASETS.values()]
    tok = PreTrainedTokenizerFast(tokenizer_object=cased_unigram(WEB_WORDS+MEDICAL_WORDS+ASIDE_WORDS,fixed),eos_token="</s>",pad_token="<pad>",unk_token="<unk>",padding_side="left",model_max_length=512,
                                  additional_special_tokens=["<image>","<user>","<assistant>"])
    look = LlavaNextImageProcessorPil(size=dict(shortest_edge=32),crop_size=dict(height=32,width=32),image_grid_pinpoints=[[64,64]],image_mean=[.5]*3,image_std=[.5]*3)
    talk = "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    return LlavaNextProcessor(look,tok,patch_size=8,vision_feature_select_strategy="default",num_additional_image_tokens=1,chat_template=talk)

# %%
processor = vlm_processor()
processor.tokenizer.tokenize(question(DATASETS["skin"],"melanoma"))

# %%
#| export
def tiny_vlm(
    processor # LlavaNextProcessor
):            # LlavaNextForConditionalGeneration, about 1.2 M parameters
    "An untrained VLM: three layers of vision, four of language, all of width 128."
    from transformers import CLIPVisionConfig,LlamaConfig,LlavaNextConfig,LlavaNextForConditionalGeneration
    tok = processor.tokenizer; ids = dict(bos_token_id=None,eos_token_id=tok.eos_token_id,pad_token_id=tok.pad_token_id)
    vision = CLIPVisionConfig(hidden_size=128,intermediate_size=256,num_hidden_layers=3,num_attention_heads=4,image_size=32,patch_size=8,projection_dim=128)
    text = LlamaConfig(vocab_size=len(tok),hidden_size=128,intermediate_size=256,num_hidden_layers=4,num_attention_heads=4,num_key_value_heads=4,max_position_embeddings=512,tie_word_embeddings=True,**ids)
    return LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=vision,text_config=text,image_token_index=processor.image_token_id,vision_feature_layer=-1,image_grid_pinpoints=[[64,64]],image_seq_length=16,
                                                             tie_word_embeddings=True,**ids))

# %% [markdown]
# ### What it is shown
#
# Phantoms of the seed that no data set uses, of all sixteen classes alike. The processor's views are computed once; turning and mirroring them gives eight pictures for one, all with the same true caption.

# %%
#| export
def _study(job): return phantom(*job[:2],FEATURE_SEED,job[2])

def vlm_phantoms(
    each:int,      # of each class
    first:int=0,   # number of the first
    workers:int=2  # processes that draw
) -> list:         # (dataset, class, picture, attributes), classes in turn
    "Phantoms to learn from, or to be examined on."
    jobs = [(d.name,c,i) for i in range(first,first+each) for d in DATASETS.values() for c in d.counts]
    with ProcessPoolExecutor(workers) as pool:
        got = list(progress(pool.map(_study,jobs,chunksize=50),total=len(jobs),desc="drawing phantoms",mininterval=5))
    return [(d,c,x,p) for (d,c,_),(x,p,_) in zip(jobs,got)]

def views_of(
    processor,    # LlavaNextProcessor
    pictures:list # uint8 arrays (64,64,3)
) -> torch.Tensor: # uint8 (n,5,3,32,32): the whole, then four tiles
    "What the processor makes of pictures, as bytes."
    views = [processor.image_processor([Image.fromarray(x) for x in pictures[i:i+500]],return_tensors="pt").pixel_values for i in range(0,len(pictures),500)]
    return torch.cat([((v+1)*127.5).round().byte() for v in views])

def turned(
    views:torch.Tensor, # (n,5,3,32,32)
    quarters:int,       # turns
    mirror:bool         # then flip
) -> torch.Tensor:      # same shape
    "Turn whole and tiles together."
    n = len(views); tiles = views[:,1:].reshape(n,2,2,3,32,32).permute(0,3,1,4,2,5).reshape(n,3,64,64)
    whole,tiles = (torch.rot90(x.flip(-1) if mirror else x,quarters,(-2,-1)) for x in (views[:,0],tiles))
    return torch.cat([whole[:,None],tiles.reshape(n,3,2,32,2,32).permute(0,2,4,1,3,5).reshape(n,4,3,32,32)],1)

# %%
shown = [phantom("skin","melanoma",FEATURE_SEED,0)[0],phantom("kvasir","polyps",FEATURE_SEED,0)[0]]
v = views_of(processor,shown)
again = views_of(processor,[np.rot90(x[:,::-1],1,(0,1)).copy() for x in shown])
assert (turned(v,1,True).int()-again.int()).abs().max()<=1
image_grid([x/127.5-1 for x in v.flatten(0,1)],ncol=5,cell=.9,rows=["melanoma","polyps"])

# %% [markdown]
# ### Eyes first, then words
#
# LLaVA starts from a vision tower that CLIP has taught to see. So does this one, in small: it first learns to tick which attributes a picture has (*color=brown*, *border=jagged*, ...), from the mean of its
# patches, with a layer that is thrown away afterwards. Without this first lesson the language model learns what captions sound like long before it learns to look.

# %%
#| export
def ticks(
    people:list # Phantoms
) -> tuple:     # names of attribute values, and a (n,k) table of zeros and ones
    "Which attribute values each phantom has."
    has = [{f"{k}={v}" for k,v in asdict(p).items() if k!="modality"} for p in people]
    names = sorted({t for h in has for t in h})
    return names,torch.tensor([[float(t in h) for t in names] for h in has])

class Eye(torch.nn.Module):
    "The vision tower and a layer that reads attributes from its patches."
    def __init__(self, vlm, n):
        super().__init__()
        self.tower,self.read = vlm.model.vision_tower,torch.nn.Linear(vlm.config.vision_config.hidden_size*2,n)
    def forward(self, views): # (n,5,3,32,32) in -1..1 -> (n,k)
        h = self.tower(views.flatten(0,1),output_hidden_states=True).hidden_states[-1][:,1:].mean(1).unflatten(0,views.shape[:2])
        return self.read(torch.cat([h[:,0],h[:,1:].mean(1)],-1))

def see(
    vlm,                # its tower is trained in place
    views:torch.Tensor, # uint8 (n,5,3,32,32)
    people:list,        # n Phantoms
    steps:int,          # updates
    batch:int=64,       # pictures each
    seed:int=0          # of everything drawn
) -> list:              # losses
    "First lesson: tick attributes."
    names,table = ticks(people); eye = Eye(vlm,len(names))
    def loss_of(step):
        g = rng(seed,"see",step); i = torch.randint(len(views),(batch,),generator=g); k = torch.randint(8,(1,),generator=g).item()
        return F.binary_cross_entropy_with_logits(eye(turned(views[i]/127.5-1,k%4,k>3)),table[i])
    return fit(eye,loss_of,steps,lr=1e-3,warmup=50,ema=.99,desc="eyes")

# %% [markdown]
# The second lesson is LLaVA's own: question and image in, caption out, loss on the caption alone.

# %%
#| export
def lesson(
    processor,     # LlavaNextProcessor
    prompts:dict,  # (dataset, class) -> token ids of the question, image tokens among them
    who:list,      # n pairs (dataset, class)
    captions:list  # n texts
) -> dict:         # input_ids, attention_mask, labels, padded on the left
    "A batch of conversations, the caption's tokens being the labels."
    tok = processor.tokenizer
    answers = [ids+[tok.eos_token_id] for ids in tok(captions,add_special_tokens=False).input_ids]
    rows = [(prompts[w]+a,[-100]*len(prompts[w])+a) for w,a in zip(who,answers)]; n = max(len(r) for r,_ in rows)
    pad = lambda xs,v: torch.tensor([[v]*(n-len(x))+x for x in xs])
    return dict(input_ids=pad([r for r,_ in rows],tok.pad_token_id),attention_mask=pad([[1]*len(r) for r,_ in rows],0),labels=pad([l for _,l in rows],-100))

def prompt_ids(
    processor,   # LlavaNextProcessor
    dataset:str, # skin or kvasir
    cls:str      # class folder
) -> list:       # token ids
    "The question about an image of 64 pixels, as the processor writes it."
    blank = Image.new("RGB",(64,64))
    return processor.apply_chat_template([chat(question(DATASETS[dataset],cls),blank)],add_generation_prompt=True,tokenize=True,return_dict=True)["input_ids"][0]

def train_vlm(
    each:int=500,       # phantoms of each of the sixteen classes
    see_steps:int=500,  # updates of the first lesson
    steps:int=1200,     # updates of the second
    batch:int=48,       # pictures each
    wordy:float=.33,    # share of captions with asides
    lr:float=1.5e-3,    # peak learning rate
    seed:int=0          # of everything drawn
) -> tuple:             # LlavaNextForConditionalGeneration, its processor, losses of both lessons
    "Train the small VLM from nothing."
    torch.manual_seed(seed); processor = vlm_processor(); vlm = tiny_vlm(processor)
    study = vlm_phantoms(each); views,people = views_of(processor,[x for _,_,x,_ in study]),[p for *_,p in study]
    seen = see(vlm,views,people,see_steps,seed=seed)
    prompts = {(d,c):prompt_ids(processor,d,c) for d,c in {s[:2] for s in study}}
    size = torch.full((batch,2),64)
    def loss_of(step):
        g = rng(seed,"vlm",step); i = torch.randint(len(study),(batch,),generator=g).tolist(); k = torch.randint(8,(1,),generator=g).item()
        texts = [full_caption(people[j],w) for j,w in zip(i,(torch.rand(batch,generator=g)<wordy).tolist())]
        return vlm(**lesson(processor,prompts,[study[j][:2] for j in i],texts),pixel_values=turned(views[i]/127.5-1,k%4,k>3),image_sizes=size,use_cache=False).loss
    losses = fit(vlm,loss_of,steps,lr=lr,warmup=100,ema=.99,desc="small VLM")
    return vlm.eval(),processor,dict(eyes=seen,words=losses)

def save_vlm(
    vlm,processor, # of `train_vlm`
    folder         # where to write
) -> Path:
    "Write the VLM in half precision, as a Hugging Face folder."
    vlm.half().save_pretrained(folder); vlm.float(); processor.save_pretrained(folder)
    return Path(folder)

# %% [markdown]
# ### Does it tell the truth?
#
# Its captions are read back into attributes, by pattern, and compared with those of the true caption. The rivals never look: one always gives the commonest answer of the whole data set, the other, knowing the class from
# the question, the commonest of the class.

# %%
#| export
_COLOR = r"((?:dark |pale )?(?:"+"|".join(BRIGHT)+"))"
SAID = {"color":_COLOR+r" (?:round|oval|irregular) (?:patch|bump)|"+_COLOR+r" streaks|and "+_COLOR+" patches", "outline":r"(round|oval|irregular) (?:\w+ )?(?:patch|bump|hole)", "border":f"({'|'.join(BORDERS)}) border",
        "texture":f"({'|'.join(TEXTURES)}) texture", "size":r"\b(small|large)\b(?! black hole)", "asymmetry":"(asymmetric)", "beyond the line":"border around "+_COLOR+" mucosa",
        "ground":r"(?:background|mucosa) is "+_COLOR+"|shows "+_COLOR+" mucosa", "areas":_COLOR+" areas", "veil":_COLOR+" veil", "center":_COLOR+" center", "spots":_COLOR+" spots", "ring":_COLOR+" ring",
        "lines":f"thin {_COLOR} lines", "shine":r"(?<!not )(shiny)", "hairs":"thin (black hairs)", "folds":r"(?:with|and) (?:thin \w+ lines and )?(folds)", "bleeding":"there is (bleeding)", "corners":"edges of the image are (dark|not dark)",
        "lumen":"lumen is (seen|not seen)"}
"How each attribute is found in a caption."
UNSAID = ("corners","lumen")
"Attributes that only wordy captions speak of: silence about them says nothing."

def said(
    text:str # a caption
) -> dict:   # attribute -> what it says, "" where it is silent
    "Read a caption back into attributes."
    t = text[0].lower()+text[1:]; t = t.replace("There","there")
    found = {k:re.search(p,t) for k,p in SAID.items()}
    return {k:next((x for x in m.groups() if x),"") if m else "" for k,m in found.items()}

# %%
test_eq(said(full_caption(p))["border"], p.border); test_eq(said(full_caption(p))["veil"], p.veil)
{k:v for k,v in said(full_caption(p,True)).items() if v}

# %%
#| export
def truth_table(
    captions:list, # n, of the VLM
    truths:list,   # n, the true captions with all asides
    groups:list    # n, e.g. (dataset, class)
) -> pd.DataFrame: # one row a data set and attribute: share of right answers of the VLM and of its rivals
    "How truthful captions are, attribute by attribute."
    got,want = [said(t) for t in captions],[said(t) for t in truths]; rows = []
    for d in dict.fromkeys(g[0] for g in groups):
        for k in SAID:
            i = [j for j,g in enumerate(groups) if g[0]==d and not (k in UNSAID and not got[j][k])]
            common = lambda js: Counter(want[j][k] for j in js).most_common(1)[0][0] if js else ""
            all_,most = [j for j,g in enumerate(groups) if g[0]==d],{c:common([j for j,g in enumerate(groups) if g==c]) for c in dict.fromkeys(groups)}
            if len({want[j][k] for j in all_})<2 or not i: continue
            rows.append((d,k,len(i),np.mean([got[j][k]==want[j][k] for j in i]),np.mean([want[j][k]==common(all_) for j in i]),np.mean([want[j][k]==most[groups[j]] for j in i])))
    return pd.DataFrame(rows,columns=["data set","attribute","captions","VLM","commonest answer","commonest of the class"]).round(3)

def truth_figure(
    table:pd.DataFrame # of `truth_table`
):                     # figure
    "Right answers by attribute: the VLM, and two rivals that never look."
    import matplotlib.pyplot as plt
    import seaborn as sns
    sets = list(dict.fromkeys(table["data set"])); fig,axs = plt.subplots(1,len(sets),figsize=(4.2*len(sets),3.6),layout="constrained",sharex=True,squeeze=False)
    for ax,d in zip(axs[0],sets):
        t = table[table["data set"]==d].sort_values("VLM",ascending=False); y = range(len(t))
        ax.hlines(y,t["commonest answer"],t.VLM,color=".8",lw=2)
        for k,m,c in (("commonest answer","o","white"),("commonest of the class","|","#0072b2"),("VLM","o","#d55e00")): ax.plot(t[k],y,m,ms=5,mfc=c,mec="#d55e00" if k=="VLM" else "#0072b2",label=k)
        ax.set(yticks=y,yticklabels=t.attribute,xlabel="share of right answers",title=d,xlim=(0,1.02)); ax.invert_yaxis()
    axs[0,0].legend(frameon=False,fontsize=7,loc="lower left"); sns.despine(fig); plt.close(fig)
    return fig

def truthfulness(
    r=None,          # recipe that names the VLM and its sampling; the embedded one's unless given
    each:int=24,     # held-out phantoms of each class
    block:int=64     # captions at once
) -> tuple:          # table of `truth_table`, share of captions that would have to be replaced, captions
    "Let the VLM describe phantoms it has never seen, as `caption_images` would, and compare."
    r = r or recipe("skin",scale="tiny"); vlm = load_vlm(r); exam = vlm_phantoms(each,first=TEST_FROM)
    texts,left = [""]*len(exam),list(range(len(exam)))
    for attempt in range(1+r.caption_retries):
        for b in progress([left[i:i+block] for i in range(0,len(left),block)],desc="examining"):
            for j,t in zip(b,vlm.write([Image.fromarray(exam[j][2]) for j in b],[question(DATASETS[exam[j][0]],exam[j][1]) for j in b],[j+len(exam)*attempt for j in b])): texts[j] = tidy(t)
        left = [j for j in left if caption_fault(texts[j],simple_caption(exam[j][3].modality,exam[j][3].category),DATASETS[exam[j][0]].features)]
    good = [j for j in range(len(exam)) if j not in set(left)]
    table = truth_table([texts[j] for j in good],[full_caption(exam[j][3],True) for j in good],[exam[j][:2] for j in good])
    return table,len(left)/len(exam),texts

def build_vlm(
    folder,             # receives the model, its losses and its marks
    each:int=500,       # phantoms of each class
    see_steps:int=1000, # updates of the first lesson
    steps:int=1000,     # updates of the second
    seed:int=0          # of everything
) -> pd.DataFrame:      # of `truth_table`
    "Draw phantoms, train the small VLM, examine it on others, and write it."
    import time
    folder = Path(folder); wanted = dict(each=each,see_steps=see_steps,steps=steps,seed=seed)
    if not ((folder/"built.json").exists() and json.loads((folder/"built.json").read_text())["settings"]==wanted):
        t = time.time(); vlm,processor,losses = train_vlm(each,see_steps,steps,seed=seed); minutes = (time.time()-t)/60
        save_vlm(vlm,processor,folder); save_losses(folder,**losses)
        table,replaced,_ = truthfulness(recipe("skin",scale="tiny",vlm=str(folder))); save_table(table,folder/"truthfulness.csv"); mean = table.mean(numeric_only=True)
        save_card(folder,"A small LLaVA-NeXT","A `LlavaNextForConditionalGeneration` for 64-pixel images, trained from scratch to describe drawn phantoms (`medart.phantom`). What it says of a real image means nothing.",
            {"parameters":f"{sum(q.numel() for q in vlm.parameters())/1e6:.2f} M","phantoms":16*each,"steps":f"{see_steps} and {steps}","minutes":f"{minutes:.0f}","caption loss, last 100 steps":f"{np.mean(losses['words'][-100:]):.4f}",
             "right answers, mean over attributes":f"{mean.VLM:.3f}","commonest answer":f"{mean['commonest answer']:.3f}","commonest answer of the class":f"{mean['commonest of the class']:.3f}",
             "captions that would have to be replaced":f"{replaced:.1%}","machine":machine(),"seed":seed})
        write_atomic(folder/"built.json",json.dumps(dict(settings=wanted,replaced=replaced))+"\n")
    return pd.read_csv(folder/"truthfulness.csv")

# %% [markdown]
# ## A small simplifier
#
# Nobody has trained T5 to simplify; the small one is. Its lessons are wordy captions that exceed the limit, and the same captions without the least important asides, as many as have to go. No pictures are needed for it.

# %%
#| export
def simplifier_tokenizer(
) -> T5TokenizerFast:
    "T5's kind of tokenizer, with capitals."
    t = cased_unigram(WEB_WORDS+MEDICAL_WORDS+ASIDE_WORDS)
    t.post_processor = processors.TemplateProcessing(single="$A </s>",special_tokens=[("</s>",1)])
    return T5TokenizerFast(tokenizer_object=t,eos_token="</s>",pad_token="<pad>",unk_token="<unk>",extra_ids=0,model_max_length=512)

def tiny_simplifier(
    vocab:int # size of the tokenizer
):            # T5ForConditionalGeneration
    "An untrained T5: two layers that read, two that write, of width 96."
    from transformers import T5ForConditionalGeneration
    return T5ForConditionalGeneration(T5Config(vocab_size=vocab,d_model=96,d_kv=24,num_heads=4,d_ff=192,num_layers=2,num_decoder_layers=2,dropout_rate=0.,feed_forward_proj="gated-gelu",pad_token_id=0,eos_token_id=1,
                                               decoder_start_token_id=0,tie_word_embeddings=False))

def shortened(
    p,         # a Phantom
    count,     # text -> tokens
    most:int   # tokens allowed
) -> tuple:    # the wordy caption, and what is left of it; None when it is not too long
    "A pair to learn from: drop asides, the least important first, until the rest fits."
    base,extra = full_caption(p),asides(p); long = " ".join([base,*extra])
    if count(long)<=most: return None
    while extra and count(" ".join([base,*extra]))>most: extra = extra[:-1]
    return (long," ".join([base,*extra])) if extra else None

def simplifier_pairs(
    n:int,         # how many
    r,             # recipe: tokenizer and limits of the text encoder
    first:int=0    # number of the first phantom of each class
) -> list:         # (long, short)
    "Wordy captions that are too long, with what should be left of them."
    tok,pairs = load_tokenizer(r),[]; count = lambda t: count_tokens(tok,[t])[0]
    jobs = ((d.name,c,i) for i in range(first,first+n) for d in DATASETS.values() for c in d.counts)
    for d,c,i in jobs:
        if (q := shortened(describe_phantom(d,c,FEATURE_SEED,i)[0],count,r.max_tokens)) and count(q[1])>=limits(r)[0]: pairs.append(q)
        if len(pairs)==n: break
    return pairs

# %%
pairs = simplifier_pairs(2,recipe("skin",scale="tiny"))
pairs[0]

# %% [markdown]
# Shortening is copying, mostly. A first trial copied badly all the same: having learned that polyps are often red, it wrote *red* where it had read *pink*, in one caption of three. So in half of the lessons colours,
# borders and textures change places, in the long and the short caption alike: nothing can then be guessed from the class.

# %%
#| export
def swapped(
    g:np.random.Generator, # source of randomness
    *texts:str             # any number
) -> tuple:                # the same texts, with the same words exchanged in all of them
    "Let colours, borders and textures change places."
    swap = {a:b for names in (BRIGHT,BORDERS,TEXTURES) for a,b in zip(names,g.permutation(list(names)))}
    return tuple(re.sub("[a-z-]+",lambda m: swap.get(m[0],m[0]),t) for t in texts)

# %%
swapped(np_rng(0,"swap"),*pairs[0])

# %%
#| export
def train_simplifier(
    n:int=4000,      # pairs
    steps:int=2000,  # updates
    batch:int=32,    # pairs each
    lr:float=2e-3,   # peak learning rate
    seed:int=0       # of everything drawn
) -> tuple:          # T5ForConditionalGeneration, tokenizer, losses
    "Train the small T5 from nothing."
    torch.manual_seed(seed); tok = simplifier_tokenizer(); t5 = tiny_simplifier(len(tok)); pairs = simplifier_pairs(n,recipe("skin",scale="tiny"))
    def loss_of(step):
        g = np_rng(seed,"simplifier",step); some = [pairs[i] if g.random()<.5 else swapped(g,*pairs[i]) for i in g.integers(len(pairs),size=batch)]
        x,y = tok([f"simplify: {a}" for a,_ in some],padding=True,return_tensors="pt"),tok([b for _,b in some],padding=True,return_tensors="pt").input_ids
        return t5(input_ids=x.input_ids,attention_mask=x.attention_mask,labels=y.masked_fill(y==tok.pad_token_id,-100)).loss
    losses = fit(t5,loss_of,steps,lr=lr,warmup=100,ema=.99,desc="simplifier")
    return t5.eval(),tok,losses

def faithfulness(
    r=None,      # recipe that names the T5; the embedded one's unless given
    n:int=256    # held-out captions
) -> pd.DataFrame: # one row
    "How often the small T5's answer passes, how often it is exactly what was asked for, and how often it says something the long caption does not."
    r = r or recipe("skin",scale="tiny"); t5,tok = load_simplifier(r),load_tokenizer(r); pairs = simplifier_pairs(n,r,first=TEST_FROM)
    out = [s for i in progress(range(0,n,64),desc="examining") for s in t5.shorten([a for a,_ in pairs[i:i+64]])]; k = count_tokens(tok,out)
    fault = [shortening_fault(s,a[:a.index(" shows ")],m,r) for s,(a,_),m in zip(out,pairs,k)]
    return pd.DataFrame([dict(captions=len(pairs),passes=np.mean([not f for f in fault]),exact=np.mean([s==b for s,(_,b) in zip(out,pairs)]),invents=np.mean([any(x not in a for x in re.split(r"(?<=\.) ",s)) for s,(a,_) in zip(out,pairs)]),
                              before=np.mean(count_tokens(tok,[a for a,_ in pairs])),after=np.mean(k))]).round(3)

def build_simplifier(
    folder,           # receives the model, its losses and its marks
    n:int=4000,       # pairs
    steps:int=2000,   # updates
    seed:int=0        # of everything
) -> pd.DataFrame:    # of `faithfulness`
    "Train the small T5, examine it, and write it."
    import time
    folder = Path(folder); wanted = dict(n=n,steps=steps,seed=seed)
    if not ((folder/"built.json").exists() and json.loads((folder/"built.json").read_text())["settings"]==wanted):
        t = time.time(); t5,tok,losses = train_simplifier(n,steps,seed=seed); minutes = (time.time()-t)/60
        t5.half().save_pretrained(folder); tok.save_pretrained(folder); save_losses(folder,simplifier=losses)
        marks = save_table(faithfulness(recipe("skin",scale="tiny",simplifier=str(folder))),folder/"faithfulness.csv").iloc[0]
        save_card(folder,"A small T5 that shortens captions","A `T5ForConditionalGeneration` trained from scratch to drop the least important sentences of wordy captions of phantoms (`medart.phantom`).",
            {"parameters":f"{sum(q.numel() for q in t5.parameters())/1e6:.2f} M","steps":steps,"minutes":f"{minutes:.0f}","loss, last 100 steps":f"{np.mean(losses[-100:]):.4f}","answers within the limits, opening kept":f"{marks.passes:.1%}",
             "answers with a sentence that was not there":f"{marks.invents:.1%}","machine":machine(),"seed":seed})
        write_atomic(folder/"built.json",json.dumps(dict(settings=wanted))+"\n")
    return pd.read_csv(folder/"faithfulness.csv")
