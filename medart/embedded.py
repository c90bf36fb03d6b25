import json,platform
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL,DDPMScheduler,DPMSolverMultistepScheduler,PixArtAlphaPipeline,PixArtTransformer2DModel
from tokenizers import Tokenizer,decoders,models,pre_tokenizers,processors
from torch.optim.swa_utils import AveragedModel,get_ema_multi_avg_fn
from transformers import T5Config,T5EncoderModel,T5TokenizerFast

from medart.core import np_rng,progress,rng,write_atomic
from medart.phantom import BORDERS,BRIGHT,FEATURE_SEED,TEST_FROM,TEXTURES,article,phantom,web_picture
from medart.recipes import DATASETS

WEB_WORDS = [*BRIGHT,*TEXTURES,*BORDERS] + """a an the of on in with and is are it there by to from at two three several many few one around picture background border borders texture textures center
    spots lines line ring surrounded thin thick dark pale bright small medium large shiny matte round oval irregular square squares triangle triangles star stars circle circles ovals patch patches shape shapes
    shaped spot colour color colored""".split()
"Words that the web's captions use."
MEDICAL_WORDS = """dermoscopic endoscopic image images shows showing show has appears appear visible area areas common nevus melanoma seborrheic keratosis carcinoma lentigo solaris dermatofibroma vascular lesion lesions
    actinic dyed lifted polyp polyps resection margins margin esophagitis normal cecum pylorus z-line ulcerative colitis skin tone tones mucosa mucosal surrounding surface symmetric asymmetric symmetry
    bleeding no not signs fold folds vessel vessels branching hair hairs veil whitish bluish brownish pinkish reddish light uneven even pattern patterns network scale scales scaly ulcer ulcers erosion erosions streak streaks
    opening hole lumen raised flat inflamed healthy wet moist smooth blood mass bump dome edge edges tissue wall along across towards which its that this seen slightly mostly partly mild active some
    lagoons clods dots globules crust central peripheral concentric radial junction pearly salmon elevated growth without evident overall appearance lighter darker regular irregularly evenly""".split()
"Words that only descriptions of medical images use: no web caption holds them, so pretraining leaves them without meaning."

def word_tokenizer(
    words,             # whole words, in any order
    max_tokens:int=64  # longest text
) -> T5TokenizerFast:
    "A Unigram tokenizer of T5's kind: whole words first, letters for the rest."
    words = list(dict.fromkeys(w.lower() for w in words)); letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,;:'()/%-"]
    pieces = [("<pad>",0.),("</s>",0.),("<unk>",-30.)]+[("▁"+w,-5.) for w in words]+[("▁",-8.)]+[(c,-9.) for c in letters]
    t = Tokenizer(models.Unigram(pieces, unk_id=2))
    t.pre_tokenizer,t.decoder = pre_tokenizers.Metaspace(),decoders.Metaspace()
    t.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>",1)])
    return T5TokenizerFast(tokenizer_object=t, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", extra_ids=0, model_max_length=max_tokens)

def web_pictures(
    n:int,        # how many
    seed:int=0,   # of the collection
    size:int=64,  # pixels a side
    workers:int=2 # processes that draw
) -> tuple:       # uint8 tensor (n,3,size,size) and n captions
    "The first `n` pictures of the drawn web."
    with ProcessPoolExecutor(workers) as pool:
        got = list(progress(pool.map(partial(web_picture,seed,size=size), range(n), chunksize=200), total=n, desc="drawing the web"))
    return torch.from_numpy(np.stack([p for p,_ in got])).permute(0,3,1,2).contiguous(), [c for _,c in got]

def fit(
    module,              # torch module, trained in place
    loss_of,             # step -> scalar loss
    steps:int,           # updates
    lr:float=1e-3,       # peak learning rate
    warmup:int=100,      # updates until the peak, cosine to zero afterwards
    clip:float=1.,       # gradient norm
    ema:float=.998,      # decay of the average that becomes the result; 0 keeps the last weights
    desc:str="fit"       # on the progress bar
) -> list:               # one loss a step
    "AdamW with warm-up and cosine; the module ends as the moving average of its weights."
    params = [p for p in module.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, betas=(.9,.99), weight_decay=.01)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s+1)/warmup, .5+.5*np.cos(np.pi*s/steps)))
    avg = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    losses = []
    for step in (bar := progress(range(steps), desc=desc)):
        loss = loss_of(step); loss.backward()
        torch.nn.utils.clip_grad_norm_(params, clip); opt.step(); sched.step(); opt.zero_grad()
        if avg: avg.update_parameters(module)
        losses.append(loss.item())
        if step%20==0: bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}")
    if avg: module.load_state_dict(avg.module.state_dict())
    return losses

def tiny_vae(
) -> AutoencoderKL: # 0.7 M parameters, images (n,3,64,64) <-> latents (n,4,16,16)
    "An untrained autoencoder of Stable Diffusion's kind."
    return AutoencoderKL(in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",)*3, up_block_types=("UpDecoderBlock2D",)*3, block_out_channels=(16,32,64),
                         layers_per_block=1, latent_channels=4, norm_num_groups=1, sample_size=64, mid_block_add_attention=False)

def recolor(
    x:torch.Tensor,   # images in -1..1, (n,3,h,w)
    g:torch.Generator # source of randomness
) -> torch.Tensor:    # same shape
    "Change saturation, contrast and tint of every other image."
    n = len(x); u = lambda lo,hi,k=1: torch.rand(n,k,1,1,generator=g)*(hi-lo)+lo
    gray = x.mean(1,keepdim=True)
    y = (gray+(x-gray)*u(0,1))*u(.4,1)+u(-.5,.5,3)
    return torch.where((torch.arange(n)%2==0)[:,None,None,None], x, y.clamp(-1,1))

def vae_loss(
    vae,                # AutoencoderKL
    x:torch.Tensor,     # images in -1..1, (n,3,h,w)
    g:torch.Generator,  # source of randomness
    kl:float=3e-4       # weight of the prior
) -> torch.Tensor:      # scalar
    "Absolute and squared error, and a little pull of the latents towards a unit Gaussian."
    q = vae.encode(x).latent_dist
    y = vae.decode(q.mean+q.std*torch.randn(q.mean.shape,generator=g)).sample
    return (y-x).abs().mean()+(y-x).pow(2).mean()+kl*q.kl().mean()/q.mean[0].numel()

def train_vae(
    pictures:torch.Tensor, # uint8 (n,3,h,w)
    steps:int=1500,        # updates
    batch:int=64,          # crops of a quarter of an image each; a quarter as many whole images in the last fifth
    seed:int=0             # of everything drawn
) -> tuple:                # AutoencoderKL with its scaling factor set, and losses
    "Train the autoencoder and measure the factor that gives its latents unit variance."
    torch.manual_seed(seed); vae = tiny_vae()
    def loss_of(step):
        g = rng(seed,"vae",step); whole = step>.8*steps
        x = pictures[torch.randint(len(pictures),(batch//4 if whole else batch,),generator=g)]/127.5-1
        if not whole:
            h = x.shape[-1]//2; i,j = torch.randint(h+1,(2,),generator=g).tolist(); x = x[:,:,i:i+h,j:j+h]
        return vae_loss(vae, recolor(x,g), g)
    losses = fit(vae, loss_of, steps, lr=2e-3, ema=.99, desc="autoencoder")
    vae.register_to_config(scaling_factor=round(1/encode_all(vae,pictures[:512])[0].std().item(),4))
    return vae,losses

@torch.no_grad()
def encode_all(
    vae,                  # AutoencoderKL
    pictures:torch.Tensor,# uint8 (n,3,h,w)
    batch:int=64          # images at once
) -> tuple:               # mean and std of the latents, unscaled, each (n,4,h/4,w/4)
    "Every picture's latent moments, computed once."
    qs = [vae.encode(pictures[i:i+batch]/127.5-1).latent_dist for i in progress(range(0,len(pictures),batch),desc="encoding")]
    return torch.cat([q.mean for q in qs]),torch.cat([q.std for q in qs])

def tiny_t5(
    vocab:int # size of the tokenizer
) -> T5EncoderModel:
    "An untrained T5 v1.1 encoder."
    return T5EncoderModel(T5Config(vocab_size=vocab, d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=3, feed_forward_proj="gated-gelu", dropout_rate=.1, tie_word_embeddings=False))

def tiny_transformer(
) -> PixArtTransformer2DModel:
    "An untrained PixArt-alpha transformer for latents of (4,16,16)."
    return PixArtTransformer2DModel(num_attention_heads=5, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=6, cross_attention_dim=160, sample_size=16, patch_size=2, caption_channels=128,
                                    use_additional_conditions=False)

SCHEDULE = dict(num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4, beta_end=.02)
"PixArt-alpha's noise schedule."

def train_pixart(
    moments:tuple,     # mean and std of the latents, unscaled
    captions:list,     # one a picture
    tokenizer,         # T5TokenizerFast
    scale:float,       # the autoencoder's scaling factor
    steps:int=2700,    # updates
    batch:int=48,      # pictures each
    drop:float=.1,     # share of captions emptied, for guidance
    lr:float=1e-3,     # peak learning rate
    seed:int=0,        # of everything drawn
    gamma:float=0.,    # min-SNR weighting, 0 for the plain loss
    net=None           # continue from these two networks
):                     # ModuleDict of transformer and text_encoder, and losses
    "Pretrain both from scratch on captioned latents: the objective of Eq. 1."
    torch.manual_seed(seed)
    net = (net or torch.nn.ModuleDict(dict(transformer=tiny_transformer(), text_encoder=tiny_t5(len(tokenizer))))).eval()
    abar = DDPMScheduler(**SCHEDULE).alphas_cumprod
    weight = min_snr(abar,gamma) if gamma else torch.ones_like(abar)
    def loss_of(step):
        g = rng(seed,"pixart",step); i = torch.randint(len(captions),(batch,),generator=g)
        z0 = (moments[0][i]+moments[1][i]*torch.randn(moments[0][i].shape,generator=g))*scale
        texts = ["" if d else captions[j].lower() for j,d in zip(i.tolist(), (torch.rand(batch,generator=g)<drop).tolist())]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        t,eps = torch.randint(1000,(batch,),generator=g),torch.randn(z0.shape,generator=g)
        a = abar[t][:,None,None,None]; zt = a.sqrt()*z0+(1-a).sqrt()*eps
        emb = net["text_encoder"](tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        out = net["transformer"](zt, encoder_hidden_states=emb, timestep=t, encoder_attention_mask=tokens.attention_mask, added_cond_kwargs=dict(resolution=None,aspect_ratio=None)).sample
        return (weight[t]*(out.chunk(2,dim=1)[0]-eps).pow(2).mean((1,2,3))).mean()
    return net,fit(net, loss_of, steps, lr=lr, warmup=200, desc="PixArt-alpha")

def min_snr(
    abar:torch.Tensor, # signal left, (T,)
    gamma:float        # largest signal-to-noise ratio that counts in full
) -> torch.Tensor:     # weights of mean 1, (T,)
    "Min-SNR weights for predicted noise: less for times with hardly any noise. https://arxiv.org/abs/2303.09556"
    snr = abar/(1-abar); w = snr.clamp(max=gamma)/snr
    return w/w.mean()

def assemble(
    vae,transformer,text_encoder,tokenizer, # the four parts
    folder                                  # where to write
) -> Path:
    "Write a `PixArtAlphaPipeline` folder in half precision."
    scheduler = DPMSolverMultistepScheduler(**SCHEDULE, solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint")
    pipe = PixArtAlphaPipeline(tokenizer,text_encoder,vae,transformer,scheduler)
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    return Path(folder)

def machine(
) -> str: # processor, cores, torch
    "What this runs on, for a model card."
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return f"{gpu or cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"

def tiny_vit(
    classes # class folder names, in order
):          # ViTForImageClassification for images of 64 pixels
    "An untrained ViT classifier: patches of 8, six layers of width 96."
    from transformers import ViTConfig,ViTForImageClassification
    names = dict(enumerate(classes))
    return ViTForImageClassification(ViTConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=192, image_size=64, patch_size=8, hidden_dropout_prob=0., attention_probs_dropout_prob=0.,
                                               id2label=names, label2id={c:i for i,c in names.items()}))

def vit_phantoms(
    dataset:str,   # skin or kvasir
    each:int,      # phantoms of each class
    first:int=0,   # index of the first
    workers:int=2  # processes that draw
) -> tuple:        # uint8 (n,3,64,64) and labels (n,)
    "Labelled phantoms of the seed that belongs to feature extractors."
    classes = list(DATASETS[dataset].counts)
    jobs = [(c,i) for i in range(first,first+each) for c in classes]
    with ProcessPoolExecutor(workers) as pool:
        got = pool.map(partial(_draw_phantom,dataset), jobs, chunksize=100)
        x = np.stack(list(progress(got, total=len(jobs), desc=f"drawing {dataset} phantoms")))
    return torch.from_numpy(x).permute(0,3,1,2).contiguous(), torch.tensor([classes.index(c) for c,_ in jobs])

def _draw_phantom(dataset,job): return phantom(dataset,job[0],FEATURE_SEED,job[1])[0]

def turn_and_shift(
    x:torch.Tensor,   # images in -1..1, (n,3,h,w)
    g:torch.Generator # source of randomness
) -> torch.Tensor:    # same shape
    "Mirror, turn by quarters, shift by up to 4 pixels, add a little noise: nothing that changes colours."
    k = torch.randint(8,(len(x),),generator=g); dy,dx = (torch.randint(-4,5,(2,),generator=g)).tolist()
    x = torch.stack([torch.rot90(a.flip(2) if i>3 else a, int(i)%4, (1,2)) for a,i in zip(x,k)])
    x = F.pad(x,(4,4,4,4),mode="reflect")[:,:,4+dy:68+dy,4+dx:68+dx]
    return x+.04*torch.randn(x.shape,generator=g)

@torch.no_grad()
def vit_accuracy(
    vit,             # ViTForImageClassification
    x:torch.Tensor,  # uint8 (n,3,64,64)
    y:torch.Tensor   # labels (n,)
) -> float:
    "Share of images that the classifier names rightly."
    return torch.cat([vit(x[i:i+128]/127.5-1).logits.argmax(1) for i in range(0,len(x),128)]).eq(y).float().mean().item()

def train_vit(
    dataset:str,    # skin or kvasir
    each:int=750,   # training phantoms of each class
    steps:int=1500, # updates
    batch:int=64,   # images each
    seed:int=0      # of everything drawn
) -> tuple:         # ViTForImageClassification, losses, accuracy on phantoms it has not seen
    "Train a feature extractor from scratch."
    torch.manual_seed(seed); vit = tiny_vit(DATASETS[dataset].counts)
    x,y = vit_phantoms(dataset,each); far = vit_phantoms(dataset,64,first=TEST_FROM)
    def loss_of(step):
        g = rng(seed,f"vit {dataset}",step); i = torch.randint(len(x),(batch,),generator=g)
        return F.cross_entropy(vit(turn_and_shift(x[i]/127.5-1,g)).logits, y[i], label_smoothing=.1)
    losses = fit(vit.train(), loss_of, steps, lr=1e-3, warmup=100, ema=.99, desc=f"ViT {dataset}")
    return vit.eval(),losses,vit_accuracy(vit.eval(),*far)

def save_vit(
    vit,   # ViTForImageClassification
    folder # where to write
) -> Path:
    "Write the classifier and its image processor in half precision, as a Hugging Face folder."
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    vit.half().save_pretrained(folder); vit.float()
    ViTImageProcessorPil(size=dict(height=64,width=64)).save_pretrained(folder)
    return Path(folder)

def save_card(
    folder,        # of the model
    title:str,     # first line
    about:str,     # what it is and was trained on
    facts:dict     # measured numbers
) -> Path:
    "A model card: what it is, how it was made, what it is not for."
    rows = "\n".join(f"| {k} | {v} |" for k,v in facts.items())
    return write_atomic(Path(folder)/"README.md", f"# {title}\n\n{about}\n\n| | |\n|---|---|\n{rows}\n\nTrained on drawings only. For teaching and tests; its images mean nothing medically. Apache-2.0.\n")

def save_losses(
    folder,        # of the model
    **losses       # name -> one loss a step
) -> Path:
    "Losses as means of twenty steps."
    rows = [(k,i+20,float(np.mean(v[i:i+20]))) for k,v in losses.items() for i in range(0,len(v)-19,20)]
    return write_atomic(Path(folder)/"losses.csv", "part,step,loss\n"+"".join(f"{k},{s},{l:.5f}\n" for k,s,l in rows))

def build_pixart(
    folder,            # receives the pipeline, losses.csv and README.md
    pictures:int=20000,# of the drawn web
    vae_steps:int=1500,# updates of the autoencoder
    steps:int=2700,    # updates of the transformer and T5 with the plain loss
    more:int=2600,     # further updates with min-SNR weights
    seed:int=0         # of everything
) -> Path:
    "Draw the web, train the autoencoder, then the transformer with its T5, and write a pipeline."
    import time
    folder = Path(folder); wanted = dict(pictures=pictures,vae_steps=vae_steps,steps=steps,more=more,seed=seed)
    if (folder/"built.json").exists() and json.loads((folder/"built.json").read_text())==wanted: return folder
    x,captions = web_pictures(pictures,seed)
    tokenizer = word_tokenizer(WEB_WORDS+MEDICAL_WORDS)
    t0 = time.time(); vae,vae_losses = train_vae(x,vae_steps,seed=seed)
    t1 = time.time(); moments = encode_all(vae,x)
    net,losses = train_pixart(moments,captions,tokenizer,vae.config.scaling_factor,steps,seed=seed)
    net,losses2 = train_pixart(moments,captions,tokenizer,vae.config.scaling_factor,more,batch=32,seed=seed+1,gamma=5.,net=net)
    t2,(transformer,text_encoder) = time.time(),(net["transformer"],net["text_encoder"])
    size = lambda m: f"{sum(p.numel() for p in m.parameters())/1e6:.2f} M parameters"
    assemble(vae,transformer,text_encoder,tokenizer,folder)
    save_losses(folder,autoencoder=vae_losses,pixart=losses,**{"pixart, min-SNR":losses2})
    save_card(folder,"A small PixArt-alpha","A `PixArtAlphaPipeline` for 64-pixel images, pretrained from scratch on drawn, captioned, brightly coloured shapes (`medart.phantom.web_picture`). It has never seen a medical image.",
        {"transformer":size(transformer),"T5 encoder":size(text_encoder),"autoencoder":size(vae),"pictures":pictures,"autoencoder steps":vae_steps,"autoencoder minutes":f"{(t1-t0)/60:.0f}",
         "autoencoder loss, last 100 steps":f"{np.mean(vae_losses[-100:]):.4f}","PixArt steps":f"{steps} at batch 48, {more} at batch 32 with min-SNR weights","PixArt minutes":f"{(t2-t1)/60:.0f}",
         "PixArt loss, last 100 steps of each":f"{np.mean(losses[-100:]):.4f}, {np.mean(losses2[-100:]):.4f}","machine":machine(),"seed":seed})
    write_atomic(folder/"built.json",json.dumps(wanted)+"\n")
    return folder

def build_vit(
    folder,         # receives the classifier
    dataset:str,    # skin or kvasir
    steps:int=1500, # updates
    seed:int=0      # of everything
) -> float:         # accuracy on phantoms it has not seen
    "Draw labelled phantoms, train a feature extractor, and write it."
    import time
    folder = Path(folder); wanted = dict(dataset=dataset,steps=steps,seed=seed)
    if (folder/"built.json").exists():
        done = json.loads((folder/"built.json").read_text())
        if done["settings"]==wanted: return done["accuracy"]
    t = time.time(); vit,losses,accuracy = train_vit(dataset,steps=steps,seed=seed); minutes = (time.time()-t)/60
    save_vit(vit,folder); save_losses(folder,vit=losses)
    save_card(folder,f"A small ViT for {dataset} phantoms","A `ViTForImageClassification` for 64-pixel images: the stand-in of the classifiers behind KFD and HFD. Trained on labelled drawn phantoms of a seed that no data set uses.",
        {"parameters":f"{sum(p.numel() for p in vit.parameters())/1e6:.2f} M","steps":steps,"minutes":f"{minutes:.0f}","accuracy on unseen phantoms":f"{accuracy:.3f}","machine":machine(),"seed":seed})
    write_atomic(folder/"built.json",json.dumps(dict(settings=wanted,accuracy=accuracy))+"\n")
    return accuracy

def nearest_color(
    rgb:np.ndarray, # in 0..1, (...,3)
    names=tuple(BRIGHT) # to choose from
) -> np.ndarray:    # names, (...)
    "The named colour closest to an RGB value."
    table = np.array([BRIGHT[n] for n in names])
    return np.array(names)[((rgb[...,None,:]-table)**2).sum(-1).argmin(-1)]

def obeyed(
    images:torch.Tensor, # (n,3,h,w) in -1..1
    asked:list           # n pairs: shape colour, background colour
) -> tuple:              # share of shapes and of backgrounds painted in the colour asked for
    "How often a picture's middle and corners have the colours that its caption names."
    x = ((images.clamp(-1,1)+1)/2).permute(0,2,3,1).numpy(); n,h = x.shape[:2]; k = h//8
    middle = np.median(x[:,h//2-k:h//2+k,h//2-k:h//2+k].reshape(n,-1,3),1)
    corners = np.median(np.concatenate([x[:,a,b].reshape(n,-1,3) for a in (slice(0,k),slice(-k,None)) for b in (slice(0,k),slice(-k,None))],1),1)
    near = [nearest_color(v)==np.array([p[i] for p in asked]) for i,v in enumerate((middle,corners))]
    return near[0].mean(),near[1].mean(),(near[0]&near[1]).mean()

def color_prompts(
    n:int,     # how many
    seed:int=0 # which
) -> tuple:    # captions and the pairs of colours they name
    "Prompts such as *a red circle on a blue background*."
    g,names = np_rng(seed,"color prompts"),[c for c in BRIGHT if c not in ("tan","pink","gray")]
    pairs = [tuple(g.choice(names,2,replace=False)) for _ in range(n)]
    shapes = [("circle","oval","square","large irregular patch")[g.integers(4)] for _ in range(n)]
    return [f"{article(a)} {a} {s} on {article(b)} {b} background" for (a,b),s in zip(pairs,shapes)],pairs
