"The classifier on tasks whose answers are known: what it learns, what its scores say, what is kept, what is refused."

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from everywhere import replace_everywhere
from medart.bundled import shapes_vit
from medart.core import locations
from medart.data import loading
from medart.evaluation import classification
from medart.evaluation import classifier as classifier_room
from medart.evaluation import classifier_results
from medart.evaluation import corruptions
from medart.evaluation import image_sets

from medart.data.images import Split
from medart.data.phantoms import write_phantoms
from medart.recipes.datasets import DATASETS
from medart.recipes.recipe import recipe
from medart.recipes.runs import classifier_dir, samples_dir

CLASSES = list(DATASETS["skin"].counts)
FEW = dict(train=dict.fromkeys(CLASSES, 4), test=dict.fromkeys(CLASSES, 3))


@pytest.fixture
def run(folders):
    "A recipe on a few phantoms; its synthetic images are the training images, recolored."
    write_phantoms("skin", folders[0] / "few", counts=FEW)
    r = recipe("skin", scale="tiny", data="few", classifier_epochs=1)
    train = image_sets.real_images(r, "train")
    image_sets.write_samples(
        samples_dir(classification.synthetic_recipe(r)),
        replace(train, x=corruptions.saturate(train.x, 1.3)),
    )
    return r


def test_classifiers_of_real_images_are_found(run, monkeypatch):
    "Trained before, they are not trained again, and answer as they would have."
    classification.train_on_real(run, [0])
    trained, train = [], classification.train_classifier

    def noting(net, x, y, **how):
        trained.append(x)
        return train(net, x, y, **how)

    monkeypatch.setattr(classification, "train_classifier", noting)
    found = classification.classify(run, [0])
    assert len(trained) == 2
    for kept in (classifier_dir(run).parent.parent / "classifiers").iterdir():
        kept.unlink()
    assert classification.classify(run, [0]).equals(found) and len(trained) == 5


def blobs(n, seed, dim=0.0):
    "Images that are reddish (class 0) or bluish (class 1), in noise."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 110 + 40 * torch.randn(n, 3, 64, 64, generator=g)
    x[y == 0, 0] += 60 - dim
    x[y == 1, 2] += 60 - dim
    return classification.LabeledImages(x.clamp(0, 255).byte(), y)


# Scores


def test_scores_of_known_answers():
    y = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    right, blind = np.eye(3)[y], np.tile([0.5, 0.25, 0.25], (8, 1))
    assert classifier_room.classification_scores(y, right) == dict.fromkeys(
        classifier_room.SCORES, 1.0
    )
    got = classifier_room.classification_scores(y, blind)
    f0 = 2 * 0.5 * 1 / 1.5  # precision 1/2, recall 1
    assert got == pytest.approx(
        dict(weighted_f1=f0 / 2, macro_f1=f0 / 3, bacc=1 / 3, auc=0.5)
    )


def test_auc_asks_for_order_alone():
    y, p = (
        np.array([0, 0, 1, 1]),
        np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]),
    )
    assert (
        classifier_room.classification_scores(y, p)["auc"] == 1
        and classifier_room.classification_scores(y, p)["bacc"] == 0.5
    )


def test_scores_by_hand():
    "Each measure written out, on random answers of four unequal classes."
    g = np.random.default_rng(0)
    y = g.choice(4, 300, p=[0.6, 0.2, 0.15, 0.05])
    p = g.dirichlet(np.ones(4), 300) + 0.5 * np.eye(4)[y]
    p /= p.sum(1, keepdims=True)
    d = p.argmax(1)
    n = np.array([(y == c).sum() for c in range(4)])
    hit = np.array([((y == c) & (d == c)).sum() for c in range(4)])
    f1 = 2 * hit / (n + np.array([(d == c).sum() for c in range(4)]))
    auc = [
        np.mean(
            (p[y == c, c][:, None] > p[y != c, c])
            + 0.5 * (p[y == c, c][:, None] == p[y != c, c])
        )
        for c in range(4)
    ]
    want = dict(
        weighted_f1=(n * f1).sum() / 300,
        macro_f1=f1.mean(),
        bacc=(hit / n).mean(),
        auc=np.mean(auc),
    )
    assert classifier_room.classification_scores(y, p) == pytest.approx(want)


def test_a_class_without_test_images_is_refused():
    with pytest.raises(ValueError, match="no test image of class 2 of 3"):
        classifier_room.classification_scores(np.array([0, 1, 0]), np.eye(3)[[0, 1, 0]])


def three(p=None, y=(0, 1, 2)):
    return lambda: classifier_room.classification_scores(
        np.array(y), np.eye(3) if p is None else p
    )


@pytest.mark.parametrize(
    "wrong,says",
    [
        (
            lambda: classifier_room.classification_scores(
                np.zeros(5, int), np.ones((5, 1))
            ),
            "one class only",
        ),
        (
            lambda: classifier_room.classification_scores(
                np.zeros(0, int), np.ones((0, 2))
            ),
            "no test image of class 0, 1 of 2",
        ),
        (
            three(np.full((3, 3), np.nan)),
            "3 of 3 answers are no numbers: the classifier has diverged",
        ),
        (three(np.array([[1, 0, 0], [0, np.inf, 0], [0, 0, 1.0]])), "1 of 3 answers"),
        (three(y=(0, 1, 3)), "classes 0 to 2"),
        (three(y=(0, 1)), "2 true classes for 3 answers"),
    ],
)
def test_what_has_no_scores_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()


def test_two_classes_have_scores():
    assert classifier_room.classification_scores(
        np.array([0, 1, 1]), np.eye(2)[[0, 1, 1]]
    ) == dict.fromkeys(classifier_room.SCORES, 1.0)


# Training


def test_all_training_sets_have_the_same_number_of_updates(run, monkeypatch):
    "Twice the images for the same epochs would be twice the updates, which help by themselves."
    run, seen = replace(run, classifier_epochs=3), []
    fit = classifier_room.train_classifier

    def counted(net, x, y, **k):
        losses = fit(net, x, y, **k)
        seen.append((len(x), len(losses)))
        return losses

    replace_everywhere(monkeypatch, shapes_vit.train_classifier, counted)
    classification.classify(run, seeds=(0,))
    assert seen == [(32, 3), (32, 3), (64, 3)]
    assert classifier_results.read_classification(run)["updates"] == 3


def test_a_batch_may_be_cut_but_no_image_is_preferred():
    whole = classifier_room._training_batches(10, 4, 6)
    assert (
        sorted(np.concatenate(whole[:3]))
        == sorted(np.concatenate(whole[3:]))
        == list(range(10))
    )
    assert [b.tolist() for b in classifier_room._training_batches(10, 4, 2)] == [
        b.tolist() for b in whole[:2]
    ]
    assert (
        len(classifier_room._training_batches(3, 8, 5))
        == 5
        == classifier_room.count_updates(3, 5, 8)
    )


def test_a_diverged_classifier_is_said(run):
    with pytest.raises(
        ValueError,
        match=r"diverged: its loss is (nan|inf) at update \d+. Lower classifier_lr=1e\+30",
    ):
        classification.classify(
            replace(run, classifier_lr=1e30, classifier_epochs=4), seeds=(0,)
        )
    fast = replace(run, classifier_lr=3.0, classifier_epochs=4)
    classification.classify(fast, seeds=(0,))
    remarks = classifier_results.read_classification(fast)["remarks"]
    assert {x["training"] for x in remarks} == set(
        classification.TRAINING_SETS
    ) and all("learned nothing" in x["remark"] for x in remarks)
    assert (
        classifier_results.scores_table(classifier_results.read_classification(fast))[
            "remarks"
        ]
        .str.contains("seed 0: learned nothing")
        .all()
    )


def test_a_damaged_answer_on_disk_is_computed_anew(run):
    before = classification.classify(run, seeds=(0,))
    files = sorted((classifier_dir(run).parents[1] / "classifiers").glob("*.npz"))
    whole = [f.read_bytes() for f in files]
    turned = bytearray(whole[0])
    turned[len(turned) // 3] ^= 1
    for f, data in zip(files, (bytes(turned), whole[1][:50], b"")):
        f.write_bytes(data)
    assert classification.classify(run, seeds=(0,)).equals(before)
    assert [f.read_bytes() for f in files] == whole


@pytest.mark.parametrize("seeds", [(), (0, 0)])
def test_seeds_are_given_once_each(run, seeds):
    with pytest.raises(ValueError, match="each once"):
        classification.classify(run, seeds=seeds)


@pytest.mark.parametrize(
    "train,test,says",
    [
        (dict(a=3), dict(a=2), "one class only"),
        (dict(a=3, b=2), dict(a=2), "holds no image of b"),
        (dict(a=3, b=2), dict(), "holds no images"),
        (dict(a=3, b=2), dict(a=2, b=1, c=1), "classes that the training set lacks: c"),
    ],
)
def test_a_task_without_scores_is_refused_before_anything_is_read(
    run, monkeypatch, train, test, says
):
    def split(counts):
        names = tuple(c for c, n in counts.items() for _ in range(n))
        return Split(Path("nowhere"), names, names, names)

    replace_everywhere(
        monkeypatch,
        loading.load_split,
        lambda r, s: split(dict(train=train, test=test)[s]),
    )
    replace_everywhere(
        monkeypatch,
        classification.load_classifier,
        lambda *a, **k: pytest.fail("too late"),
    )
    with pytest.raises(ValueError, match=says):
        classification.classify(run, seeds=(0,))


def test_it_learns_the_same_twice_and_not_from_shuffled_labels():
    train, test = blobs(64, 0), blobs(64, 1)

    def accuracy(y, seed=0):
        net = shapes_vit._small_vit(("red", "blue"), width=32, layers=2)
        losses = classifier_room.train_classifier(
            net, train.x, y, epochs=4, lr=2e-3, batch=16, seed=seed
        )
        p = classifier_room.predict(net, test.x)
        assert (
            len(losses) == 16
            and p.dtype == np.float64
            and np.abs(p.sum(1) - 1).max() < 1e-12
        )
        return (p.argmax(1) == test.y.numpy()).mean(), p

    right, p = accuracy(train.y)
    assert right > 0.95
    assert (accuracy(train.y)[1] == p).all(), "one seed, one answer"
    assert (accuracy(train.y, seed=1)[1] != p).any()
    turned, _ = accuracy(1 - train.y)
    assert turned < 0.05


def test_labels_may_be_shared_between_attributes():
    "A picture that is half one thing and half another: the network says so."
    net = shapes_vit._small_vit(("a", "b", "c"), width=32, layers=1)
    x, y = blobs(16, 0).x, torch.tensor([0.5, 0.5, 0.0]).repeat(16, 1)
    classifier_room.train_classifier(net, x, y, epochs=12, lr=3e-3, batch=8)
    assert np.abs(classifier_room.predict(net, x) - [0.5, 0.5, 0]).max() < 0.1


def test_shapes_are_labelled_with_what_is_true():
    x, y = shapes_vit._shape_pictures(40, seed=5)
    assert x.shape == (40, 3, 64, 64) and y.sum(1).allclose(torch.ones(40))
    assert ((y > 0).sum(1) == len(shapes_vit._ATTRIBUTE_GROUPS)).all()
    at = (
        shapes_vit._ATTRIBUTES.index("on white"),
        shapes_vit._ATTRIBUTES.index("on black"),
    )
    corners = x[:, :, :4, :4].float().mean((1, 2, 3))
    bright = [corners[y[:, k] > 0] for k in at]
    assert (
        bright[0].numel() == 0
        or bright[1].numel() == 0
        or bright[0].min() > bright[1].max()
    )
    truth = shapes_vit._attribute_accuracy(y.numpy(), y)
    assert set(truth.values()) == {1.0}


def test_the_small_vit_is_built_from_shapes_alone(tmp_path):
    found = shapes_vit.build_shapes_vit(
        tmp_path / "vit", pictures=48, epochs=1, lr=1e-3
    )
    assert set(found) == set(shapes_vit._ATTRIBUTE_GROUPS)
    first = (tmp_path / "vit" / "model.safetensors").read_bytes()
    when = (tmp_path / "vit" / "model.safetensors").stat().st_mtime_ns
    assert (
        shapes_vit.build_shapes_vit(tmp_path / "vit", pictures=48, epochs=1, lr=1e-3)
        == found
    )
    assert (tmp_path / "vit" / "model.safetensors").stat().st_mtime_ns == when, (
        "built once"
    )
    net = classifier_room.load_classifier(str(tmp_path / "vit"), CLASSES, seed=3)
    again = classifier_room.load_classifier(str(tmp_path / "vit"), CLASSES, seed=3)
    assert (
        net.network.classifier.out_features == 8
        and net.key
        == again.key
        != classifier_room.load_classifier(str(tmp_path / "vit"), CLASSES, seed=4).key
    )
    (tmp_path / "vit" / "built.json").unlink()
    shapes_vit.build_shapes_vit(tmp_path / "vit", pictures=48, epochs=1, lr=1e-3)
    assert (tmp_path / "vit" / "model.safetensors").read_bytes() == first, (
        "the same bytes from the same seed"
    )


def test_it_loads_as_its_big_sister_would(tmp_path):
    "The published network is a ViTModel of another size with its own processor: the same call."
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=16,
        )
    ).save_pretrained(tmp_path)
    ViTImageProcessorPil(size=dict(height=32, width=32)).save_pretrained(tmp_path)
    net = classifier_room.load_classifier(str(tmp_path), ("a", "b"))
    big = blobs(4, 0)
    small = torch.stack(
        [
            torch.from_numpy(
                np.asarray(
                    net.pre([a], do_rescale=False, do_normalize=False).pixel_values[0]
                )
            )
            for a in big.x
        ]
    )
    assert net.side == 32 and classifier_room.predict(net, small.byte()).shape == (4, 2)
    with pytest.raises(FileNotFoundError, match="hf download google/none"):
        classifier_room.load_classifier("google/none", ("a", "b"))


# Where it starts


def photographs(folder, n=3):
    "Noisy images in class folders, which nobody calls phantoms."
    for split in ("train", "test"):
        x, y = (t.numpy() for t in vars(blobs(2 * n, len(split))).values())
        for i, (image, k) in enumerate(zip(x.transpose(0, 2, 3, 1), y)):
            path = folder / split / "ab"[k] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    told = "modality: dermoscopic\nfeatures: color\ncategories: {a: a, b: b}\n"
    (folder / "dataset.yaml").write_text(told)
    return folder


def test_the_start_follows_from_the_data(folders, tmp_path):
    photos = str(photographs(tmp_path / "photos"))
    real = recipe("mine", scale="tiny", data=photos)
    drawn = recipe("skin", scale="tiny")
    paper = recipe("mine", scale="paper", data=photos)
    assert (real.classifier, real.classifier_lr) == ("efficientnet-lite0", 5e-3)
    assert (drawn.classifier, drawn.classifier_lr) == ("data/tiny/vit-shapes", 5e-4)
    assert paper.classifier == "google/vit-base-patch16-224-in21k"
    auto = recipe("mine", scale="tiny", data=photos, classifier="auto")
    assert auto == real and classifier_dir(auto) == classifier_dir(real)
    asked = recipe("skin", scale="tiny", classifier="efficientnet-lite0")
    assert asked.classifier_lr == 5e-3, "the rate belongs to the start"
    told = recipe("mine", scale="tiny", data=photos, classifier_lr=0.1)
    assert told.classifier_lr == 0.1


def test_photographs_are_learned_from_features(run):
    "A last layer on features that are computed once, and the results say so."
    run = replace(run, classifier="efficientnet-lite0", classifier_lr=5e-3)
    sets, test, net = classification._training_sets(run)
    assert net.side == 224 and sets["both"].x.shape == (64, 1280)
    assert test.x.dtype == torch.float32 and classifier_room.predict(
        net, test.x
    ).shape == (24, 8)
    classification.classify(run, seeds=(0,))
    said = classifier_results.read_classification(run)["start"]
    assert said.startswith("efficientnet-lite0, pretrained on ImageNet photographs")
    assert "its last layer is trained" in said


def test_the_last_layer_learns_and_is_drawn_with_its_own_seed():
    net, same = (
        classifier_room.load_classifier("efficientnet-lite0", ("a", "b"), seed=3)
        for _ in "12"
    )
    other = classifier_room.load_classifier("efficientnet-lite0", ("a", "b"), seed=4)
    assert net.key == same.key != other.key
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 1280, generator=g)
    y = (x[:, 0] > x[:, 1]).long()
    classifier_room.train_classifier(net, x[:80], y[:80], epochs=20, lr=5e-3)
    assert (
        classifier_room.predict(net, x[:80]).argmax(1) == y[:80].numpy()
    ).mean() > 0.9


# A run's row


def test_classify_once_and_again(run, monkeypatch):
    rows = classification.classify(run, seeds=(0, 1))
    assert (
        set(rows.training) == set(classification.TRAINING_SETS)
        and set(rows.measure) == set(classifier_room.SCORES)
        and len(rows) == 3 * 2 * 4
    )
    res = classifier_results.read_classification(run)
    assert (
        res["n"] == dict(synthetic=32, real=32, both=64)
        and res["n_test"] == 24
        and res["about"].startswith("skin, medart, tiny scale")
    )
    for c in res["confusion"].values():
        assert np.sum(c) == 48 and np.sum(c, 1).tolist() == [6] * 8
    table = classifier_results.scores_table(res)
    assert (
        set(table["updates"]) == {1}
        and set(table["test images"]) == {24}
        and classifier_results.recall_table(res).shape == (8, 3)
    )
    assert {"F1, weighted", "F1, macro"} <= set(table) and table[
        "F1, macro"
    ].str.contains("±").all()
    recall = classifier_results.recall_table(res).mean()
    bacc = rows[rows.measure == "bacc"].groupby("training").value.mean()
    assert all(
        recall[k] == pytest.approx(bacc[k]) for k in classification.TRAINING_SETS
    ), "balanced accuracy is the mean of the recalls"
    file = classifier_dir(run) / "classifier.json"
    before = file.read_bytes()
    calls, fit = [], classifier_room.train_classifier
    replace_everywhere(
        monkeypatch,
        shapes_vit.train_classifier,
        lambda *a, **k: calls.append(1) or fit(*a, **k),
    )
    classification.classify(run, seeds=(0, 1))
    assert not calls and file.read_bytes() == before, (
        "what is trained is not trained again"
    )
    other = replace(run, seed=1)
    train = image_sets.real_images(run, "train")
    image_sets.write_samples(
        samples_dir(classification.synthetic_recipe(other)),
        replace(train, x=corruptions.saturate(train.x, 2.0)),
    )
    classification.classify(other, seeds=(0,))
    assert len(calls) == 2, (
        "another run has other synthetic images, and the same real ones"
    )


def test_what_is_missing_is_named_with_its_command(folders, run):
    folder = samples_dir(classification.synthetic_recipe(run))
    with pytest.raises(
        FileNotFoundError,
        match="Train the classifiers first: papermill nbs/classify.ipynb",
    ):
        classifier_results.read_classification(run)
    m = pd.read_csv(folder / "metadata.csv")
    file = folder / m.file_name[3]
    good = file.read_bytes()
    file.unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its 32 images"):
        classification.classify(run, seeds=(0,))
    file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        classification.classify(run, seeds=(0,))
    file.write_bytes(good)
    m[:20].to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(
        ValueError, match="holds 20 images, and there are 32 training captions"
    ):
        classification.classify(run, seeds=(0,))
    (folder / "metadata.csv").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="papermill nbs/generate.ipynb .*-p gen_split train -p gen_count 0",
    ):
        classification.classify(run, seeds=(0,))
    assert not (classifier_dir(run) / "classifier.json").exists()


def test_results_are_json_without_the_clock(run):
    classification.classify(run, seeds=(0,))
    text = (classifier_dir(run) / "classifier.json").read_text()
    assert (
        json.loads(text)["settings"]
        == dict(lr=run.classifier_lr, epochs=1, batch=run.classifier_batch)
        and str(samples_dir(run).parent) not in text
    )


def test_results_name_no_folder_of_this_machine(run, tmp_path):
    import shutil

    shutil.copytree(
        Path(locations.locate(run.classifier)), tmp_path / "Jane Doe" / "vit"
    )
    own = replace(run, classifier=str(tmp_path / "Jane Doe" / "vit"))
    classification.classify(own, seeds=(0,))
    text = (classifier_dir(own) / "classifier.json").read_text()
    assert (
        "Doe" not in text
        and classifier_results.read_classification(own)["network"] == "path/to/vit"
    )
