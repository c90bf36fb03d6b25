"What measuring and generating cost with four and sixteen times as many images: counted, not timed."

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from medart.core.randomness import np_rng
from medart.evaluation import color
from medart.evaluation import distances
from medart.evaluation import image_sets
from medart.evaluation import memorization
from medart.evaluation import sample_figures
from medart.training import sampling_runs

SIZES = (100, 400, 1600)
LINEAR, PAIRS = 5, 17  # at most so many times the work for four times the images


def grows(costs, most):
    return all(later <= most * before for before, later in zip(costs, costs[1:]))


def clouds(n, d=8):
    g = np_rng(0, "growth", n)
    return g.standard_normal((n, d)), g.standard_normal((n, d)) + 0.1


MEASURES = dict(
    prdc=distances.prdc,
    kid=lambda a, b: distances.kid(a, b, subsets=5),
    mmd2=distances.mmd2,
    stratified=lambda a, b: distances.stratified_mmd2(
        a, b, np.arange(len(a)) % 8, np.arange(len(b)) % 8
    ),
)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_pairs_count_each_pair_once_and_hold_a_block(name, monkeypatch):
    blocks, real = [], distances._product_blocks

    def counted(x, y):
        for i, products in real(x, y, 2**15):
            blocks.append(products.size)
            yield i, products

    monkeypatch.setattr(distances, "_product_blocks", counted)
    costs = []
    for n in SIZES:
        blocks.clear()
        MEASURES[name](*clouds(n))
        assert max(blocks) <= 2**15
        costs.append(sum(blocks))
        assert costs[-1] == 3 * n * n, "within each set, and across"
    assert grows(costs, PAIRS)


@pytest.mark.parametrize("name", ["prdc", "mmd2", "stratified"])
def test_memory_of_measures_of_pairs_is_that_of_a_block(name):
    "All pairs of 4,000 would take 128 MB."
    a, b = clouds(4000, 4)
    tracemalloc.start()
    MEASURES[name](a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 70e6


def test_a_set_that_is_drawn_again_is_measured_once():
    "Where a draw takes all images, every draw is the same set in another order."
    from medart.evaluation import comparison, image_stats, uncertainty
    from medart.evaluation.features import Features

    def stats(k):
        g, classes = np_rng(0, "drawn again", k), tuple("abcd" * 15)
        colors, lab, sat = g.random((60, 6)), g.random((60, 4, 3)), g.random(60)
        features = Features(g.standard_normal((60, 5)) + 0.1 * k, None)
        return image_stats.ImageStats(features, colors, lab, sat, classes)

    gen, test, train, measured = stats(0), stats(1), stats(2), []

    def how(a, b, *more):
        measured.append((a.classes, b.classes))
        return image_stats.measure_all(a, b, *more)

    plan = uncertainty.plan_real_baseline(test.classes, train.classes, gen.classes)
    assert len(plan.draws) == 10
    rows = comparison.compare_sets(gen, test, train, plan, train, how, reps=6)
    assert len(measured) == 1 + 2 + 6  # `train` is also the base, and known
    rows = rows.set_index("measure")
    alone = image_stats.measure_all(gen, test, 0)
    for key in ("frechet", "kid", "precision", "lab_distance"):
        assert rows.same_n[key] == pytest.approx(alone[key], rel=1e-9, abs=1e-12)
    assert np.allclose(rows.floor_low, rows.floor_high)


def test_the_copy_search_compares_each_pair_once_and_holds_a_block(monkeypatch):
    "Suspects times gallery, for each way of asking and each disguise; of the gallery 256 at once."
    compared, described = [], []

    def likeness(a, b):
        compared.append(len(a) * len(b))
        return a @ b.T

    def gallery(x):
        described.append(len(x))
        return [x, x.flip(1)]

    space = memorization._CopySpace(lambda x: [x, -x], gallery, likeness)
    costs = []
    for n in SIZES:
        compared.clear()
        described.clear()
        g = torch.Generator().manual_seed(n)
        x = torch.nn.functional.normalize(torch.randn(3 * n, 6, generator=g), dim=1)
        suspects, train, test = x[: n // 4], x[n : 2 * n], x[2 * n : 2 * n + n // 4]
        memorization._copy_scores(suspects, train, test, dict(thumbnails=space))
        assert max(described) <= 256 and sum(described) == len(train) + len(test)
        assert max(compared) <= 512 * 256
        costs.append(sum(compared))
        assert costs[-1] == 4 * len(suspects) * (len(train) + len(test))
    assert grows(costs, PAIRS)


class Counted:
    "Images that say how many of them were read, and how many at once."

    def __init__(self, n, side=8):
        self.shape, self.read = (n, 3, side, side), []

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        many = len(range(len(self))[i])
        self.read.append(many)
        return torch.zeros((many, *self.shape[1:]), dtype=torch.uint8)


READERS = dict(
    hash=image_sets.pixel_hash,
    color=color.color_stats,
    lab=color.lab_pixels,
    saturation=color.mean_saturation,
    small=lambda x: image_sets.downscale(x, 4),
    histograms=sample_figures._histograms,
)


@pytest.mark.parametrize("name", READERS)
def test_whoever_looks_at_images_reads_each_once_and_few_at_a_time(name):
    for n in SIZES:
        x = Counted(n)
        if name == "lab":
            color.lab_pixels(x, per=16)
        else:
            READERS[name](x)
        assert sum(x.read) == n and max(x.read) <= 256


def test_figures_read_only_what_they_show(few_run, monkeypatch):
    "However many images there are, a sheet of two a class reads two a class."
    from medart.recipes.runs import samples_dir
    from medart.training import samples

    test = image_sets.real_images(few_run, "test")
    folder = image_sets.write_samples(samples_dir(few_run), test)
    read, real = [], samples.read_pixels

    def counted(s, size):
        read.append(len(s))
        return real(s, size)

    monkeypatch.setattr(samples, "read_pixels", counted)
    sample_figures.samples_sheet(folder, k=2)
    assert sum(read) == 16
    read.clear()
    sample_figures.real_beside_generated(few_run, k=1)
    assert sum(read) == 8


def test_images_on_disk_are_those_in_memory(few_run):
    held = image_sets.real_images(few_run, "test")
    there = image_sets.real_images(few_run, "test", False)
    assert torch.equal(there.x[10:20], held.x[10:20])
    assert torch.equal(there.x[[5, 3]], held.x[[5, 3]])
    assert torch.equal(there.x[-1], held.x[-1]) and there.x.shape == held.x.shape
    assert image_sets.pixel_hash(there.x) == image_sets.pixel_hash(held.x)
    assert np.array_equal(color.lab_pixels(there.x), color.lab_pixels(held.x))
    some = dict(a=held.x[:40])
    first, second = (
        sample_figures._histograms(x) for x in (some["a"], some["a"] / 127.5 - 1)
    )
    assert torch.equal(first, second), "bytes or values, it is the same histogram"


def test_captions_are_encoded_while_images_are_made(monkeypatch, tmp_path):
    "Of any number of images, the embeddings of 32 are held; each caption is encoded once."
    held, encoded, order = [], [], []

    class Reader(torch.nn.Linear):
        pass

    def load(*a, **k):
        model = SimpleNamespace(parts=["transformer", "text_encoder"])
        model.transformer, model.text_encoder = None, Reader(1, 1)
        model.device = torch.device("cpu")
        return model

    def encode_blocks(model, plan, blocks):
        assert model.text_encoder is not None
        many = sum(map(len, blocks.values()))
        held.append(many)
        encoded.append(many)
        order.append("text")
        return {b: torch.zeros(len(b), 1) for b in blocks}

    def sample_images(model, r, cond, indices):
        order.append("images")
        return torch.zeros(len(indices), 3, 2, 2)

    monkeypatch.setattr(sampling_runs, "load_model", load)
    monkeypatch.setattr(sampling_runs, "merge_loras", lambda model: model)
    monkeypatch.setattr(sampling_runs, "_encode_blocks", encode_blocks)
    monkeypatch.setattr(sampling_runs, "sample_images", sample_images)
    monkeypatch.setattr(sampling_runs, "save_png", lambda *a: None)
    monkeypatch.setattr(sampling_runs, "_AT_ONCE", 32)
    monkeypatch.setattr(sampling_runs, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(sampling_runs, "run_dir", lambda r: tmp_path)
    r = SimpleNamespace(gen_block=4, dataset="skin", method="medart")
    costs = []
    for n in SIZES:
        for seen in (held, encoded, order):
            seen.clear()
        plan = SimpleNamespace(index=range(n), texts=["a caption"] * n)
        todo = [range(k, k + 4) for k in range(0, n, 4)]
        names, labels = [str(i) for i in range(n)], [{}] * n
        device = torch.device("cpu")
        sampling_runs._generate_blocks(r, tmp_path, plan, names, labels, todo, device)
        assert max(held) <= 32 and order[1] == "images"
        costs.append(sum(encoded))
        assert costs[-1] == n and order.count("images") == len(todo)
    assert grows(costs, LINEAR)
