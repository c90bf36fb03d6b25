"What a number means, and what is said where there is none."

import numpy as np
import pandas as pd
import pytest
from medart.evaluation import measures
from medart.evaluation import uncertainty


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
        set(measures.HEADLINE_MEASURES)
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


def test_interval_ends_with_the_range():
    assert uncertainty.confidence_interval("coverage", 0.98, 0.05) == pytest.approx(
        (0.882, 1)
    )
    assert uncertainty.confidence_interval("named", 0.01, 0.05)[0] == 0
    assert (
        uncertainty.confidence_interval("frechet", 0.5, 1)[0] == 0
        and uncertainty.confidence_interval("frechet", -1e-12, 1)[0] == -1e-12
    )
    assert uncertainty.confidence_interval("kid", 0.01, 0.05)[0] < 0, (
        "an unbiased estimate has no lower bound"
    )
    assert uncertainty.confidence_interval("saturation_shift", -0.9, 0.2)[0] == -1
