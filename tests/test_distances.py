"Distances between clouds of points whose distance is known."

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from medart.evaluation import distances as distances_room
from medart.core.randomness import np_rng


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
    assert distances_room.frechet_distance(a, b) == pytest.approx(
        usual, rel=1e-6, abs=1e-6
    )
    assert distances_room.frechet_distance(b, a) == pytest.approx(
        distances_room.frechet_distance(a, b), rel=1e-9
    )
    assert distances_room.frechet_distance(a, a) == pytest.approx(
        0, abs=1e-9 * np.trace(s)
    )


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
    assert distances_room.frechet_distance(f1, f2) == pytest.approx(formula, rel=1e-6)
    assert distances_room.frechet_distance(f1, f2) == pytest.approx(
        fid.compute().item(), rel=1e-6
    )


def test_frechet_with_fewer_images_than_dimensions():
    "The covariance is singular, which makes the general matrix root complex; ours stays real and at least zero."
    g = np_rng(0, "thin")
    a, b = g.standard_normal((20, 100)), g.standard_normal((30, 100))
    assert distances_room.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert distances_room.frechet_distance(a, b) > 0


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
    assert distances_room.frechet_distance(a[p], b) == pytest.approx(
        distances_room.frechet_distance(a, b), rel=1e-9
    )
    assert distances_room.mmd2(a[p], b) == pytest.approx(
        distances_room.mmd2(a, b), rel=1e-9
    )
    assert distances_room.prdc(a[p], b) == pytest.approx(distances_room.prdc(a, b))


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


def by_differences(gen, real, k=5):
    "Precision, recall, density and coverage from distances that are computed pair by pair."
    from scipy.spatial.distance import cdist

    r, g = (np.partition(cdist(x, x), k, axis=1)[:, k] for x in (real, gen))
    d = cdist(real, gen)
    inside = d < r[:, None]
    return dict(
        precision=inside.any(0).mean(),
        recall=(d < g).any(1).mean(),
        density=inside.sum(0).mean() / k,
        coverage=inside.any(1).mean(),
    )


@pytest.mark.parametrize("offset", [0.0, 1e5 + 0.1])
@pytest.mark.parametrize("kind", ["cloud", "grid", "twins", "clusters", "one point"])
def test_distances_by_products_decide_as_those_by_differences(kind, offset):
    "Equal distances, equal images and a mean far away: no neighbor is mistaken."
    g = np_rng(0, f"products {kind}")
    real, gen = g.standard_normal((150, 6)), g.standard_normal((130, 6)) * 1.1
    if kind == "grid":
        real, gen = (g.integers(0, 3, (n, 4)).astype(float) for n in (150, 130))
    if kind == "twins":
        real = np.repeat(real[:30], 5, 0)
        gen[:60] = real[::2][:60]
    if kind == "clusters":
        real, gen = (1e-3 * x + 1e3 * np.sign(x[:, :1]) for x in (real, gen))
    if kind == "one point":
        real, gen = np.zeros((20, 3)), np.zeros((15, 3))
    real, gen = real + offset, gen + offset
    assert distances_room.prdc(gen, real) == by_differences(gen, real)


def test_features_must_be_numbers():
    x = np_rng(0, "nan").standard_normal((20, 3))
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        distances_room.prdc(x, x)


@pytest.mark.parametrize("decay", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [40, 64, 66, 200])
def test_frechet_by_eigenvalues_is_that_by_singular_values(n, decay):
    "Also where directions vary by six powers of ten, and with fewer images than features."
    g = np_rng(0, "graded", n)
    turn = np.linalg.qr(g.standard_normal((64, 64)))[0]
    scale = np.arange(1, 65.0) ** -decay
    a, b = (g.standard_normal((n, 64)) * scale * s @ turn for s in (1, 1.1))

    def root(x):
        return np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(n - 1)

    R1, R2 = root(a), root(b)
    cross = np.linalg.svd(R1 @ R2.T, compute_uv=False).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    known = means + (R1**2).sum() + (R2**2).sum() - 2 * cross
    assert distances_room.frechet_distance(a, b) == pytest.approx(known, rel=1e-9)


def test_frechet_of_beginnings_is_that_of_each():
    g = np_rng(0, "beginnings")
    a, b = g.standard_normal((90, 20)) + 50, g.standard_normal((90, 20)) * 1.2 + 50
    sizes = [(15, 15), (21, 30), (60, 70), (90, 90)]
    found = distances_room.frechet_distances(a, b, sizes)
    for value, (m, n) in zip(found, sizes):
        one = distances_room.frechet_distance(a[:m], b[:n])
        assert value == pytest.approx(one, rel=1e-9)


def trace_of_root(a, b):
    "The trace of the root of a product of covariances, by a root of one of them."
    values, vectors = np.linalg.eigh(np.cov(a, rowvar=False))
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    inner = root @ np.cov(b, rowvar=False) @ root
    return np.sqrt(np.linalg.eigvalsh(inner).clip(min=0)).sum()


@pytest.mark.parametrize("n,m", [(30, 30), (30, 90), (90, 30), (90, 80)])
@pytest.mark.parametrize("kind", ["plain", "dead", "twins", "steep"])
def test_frechet_of_clouds_whose_covariance_is_hard_to_take_a_root_of(n, m, kind):
    "Few images, features that never vary, images that occur twice, variances that fall by 1e8."
    g = np_rng(0, f"hard {kind}")
    a, b = g.standard_normal((n, 60)), 1.1 * g.standard_normal((m, 60)) + 0.1
    if kind == "dead":
        a[:, :7], b[:, 4:20] = 3.0, 0.0
    if kind == "twins":
        a[n // 2 :] = a[: n // 2]
    if kind == "steep":
        a, b = (x * np.logspace(0, -4, 60) for x in (a, b))
    spread = a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    usual = means + spread - 2 * trace_of_root(a, b)
    assert distances_room.frechet_distance(a, b) == pytest.approx(usual, rel=1e-6)


@pytest.mark.parametrize("keep", [0, 2**22])
def test_measures_that_share_their_products_are_those_by_themselves(keep):
    g = np_rng(0, "shared")
    a, b = g.standard_normal((90, 6)) + 100, g.standard_normal((70, 6)) + 100.1
    classes = np.arange(90) % 4, np.arange(70) % 4
    pairs = distances_room.PairProducts(a, b, keep)
    for _ in range(2):
        assert distances_room.prdc(a, b, pairs=pairs) == distances_room.prdc(a, b)
        shared = distances_room.kid(a, b, subsets=7, pairs=pairs)
        assert shared == pytest.approx(distances_room.kid(a, b, subsets=7), rel=1e-9)
        shared = distances_room.stratified_mmd2(a, b, *classes, pairs)
        alone = distances_room.stratified_mmd2(a, b, *classes)
        assert shared == pytest.approx(alone, rel=1e-9)
    assert len(pairs.kept) == (3 if keep else 0)
