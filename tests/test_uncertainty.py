"Intervals keep their promise, and floors compare like with like."

import numpy as np
import pytest
from medart.evaluation import distances as distances_room
from medart.evaluation import uncertainty
from medart.core.randomness import np_rng


@pytest.mark.parametrize("shift", [0.0, 0.25])
@pytest.mark.parametrize(
    "statistic",
    [
        distances_room.frechet_distance,
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
        s = uncertainty.delete_half_jackknife(
            lambda p, q: statistic(a[p], b[q]), none, none, reps=25, seed=i
        )
        held += abs(statistic(a, b) - true) < 1.96 * s
    assert held >= 54


@pytest.mark.parametrize("p,n", [(0.01, 100), (0.5, 40), (0.9, 500)])
def test_intervals_of_shares(p, n):
    k = np_rng(0, "shares").binomial(n, p, 2000)
    low, high = np.transpose([uncertainty.wilson_interval(x, n) for x in k])
    assert ((low <= p) & (p <= high)).mean() > 0.9
    assert uncertainty.wilson_interval(0, 50)[0] == pytest.approx(
        0, abs=1e-12
    ) and uncertainty.wilson_interval(50, 50)[1] == pytest.approx(1)


def test_infinite_n_is_nearer_to_the_truth():
    g, d, true = np_rng(0, "infinity"), 16, 16 * 0.2**2
    pairs = [
        (g.standard_normal((200, d)) + 0.2, g.standard_normal((200, d)))
        for _ in range(12)
    ]
    plain, far = (
        np.mean([distances_room.frechet_distance(a, b) for a, b in pairs]),
        np.mean([uncertainty._frechet_infinity(a, b) for a, b in pairs]),
    )
    assert abs(far - true) < 0.2 * abs(plain - true)


def test_every_beginning_of_a_mixed_order_has_the_shares():
    classes = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    for k in range(5):
        order = uncertainty.stratified_order(classes, np_rng(k, "mixed"))
        assert sorted(order) == list(range(100))
        first = [classes[i] for i in order[:50]]
        assert (
            abs(first.count("a") - 30) <= 1
            and abs(first.count("b") - 15) <= 1
            and abs(first.count("c") - 5) <= 1
        )


def test_floor_uses_training_images_where_there_are_enough():
    test, gen = ("a",) * 8 + ("b",) * 4, ("a",) * 8 + ("b",) * 4
    enough = uncertainty.plan_real_baseline(test, ("a",) * 30 + ("b",) * 4, gen)
    assert (enough.source, enough.n) == ("train", 12)
    scarce = uncertainty.plan_real_baseline(test, ("a",) * 30 + ("b",) * 3, gen)
    assert (scarce.source, scarce.n) == ("test", 6)
    for ref, real, g in scarce.draws:
        assert not set(ref) & set(real) and len(ref) == len(real) == len(g) == 6
        assert [test[i] for i in ref] == [test[i] for i in real] == [gen[i] for i in g]


@pytest.mark.parametrize("n,d", [(47, 24), (20, 24), (10, 600)])
def test_infinitely_many_images_take_two_a_feature(n, d):
    g = np_rng(0, "few")
    with pytest.raises(
        ValueError,
        match=f"needs {2 * d} images on each side, two for each of {d} features, there are {n}",
    ):
        uncertainty._frechet_infinity(
            g.standard_normal((n, d)), g.standard_normal((2 * d, d))
        )


def test_floor_of_classes_with_single_images():
    "A class that cannot stand on both sides is left out, and said; where no class can, there is no floor."
    plan = uncertainty.plan_real_baseline(
        ("a",) * 8 + ("b",), ("a",) * 3, ("a",) * 8 + ("b",)
    )
    assert plan.n == 4 and "without b" in plan.how
    none = uncertainty.plan_real_baseline(("a", "b"), (), ("a", "b"))
    assert none.draws == [] and none.n == 0
