"Checks of exercises: whatever a reader puts into a gap, the answer is a sentence and a hint."

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

from medart.core.exercises import (
    WrongAnswer,
    answer_key,
    check_answer,
    check_function,
    check_key,
)

ODD = [
    *(True, -1, 0.3, 1j, float("nan"), float("inf"), 10**400, "", "b", b"b"),
    *([], [1, "a"], [[]], {}, {"a": 1}, set(), {1}, range(3), object(), print, int),
    *(np.zeros(3), np.array("a"), np.array([None]), np.datetime64("2020-01-01")),
    *(torch.zeros(2, 3), torch.zeros(0), torch.tensor(1 + 1j), torch.nn.Linear(1, 1)),
    *(
        torch.zeros(2, dtype=torch.bfloat16),
        torch.tensor([True]),
        torch.zeros(1).to_sparse(),
    ),
]
WANTED = [
    0.25,
    "a",
    True,
    [1, 2],
    {"k": 1},
    np.ones(4),
    torch.ones(2, 2),
    lambda x: x > 3,
]


def test_an_open_exercise_is_your_turn():
    assert check_answer(..., 42, "one more") == "Your turn."
    assert check_answer(None, 42, "one more") == "Your turn."
    assert check_answer((1, ...), (1, 2), "one more") == "Your turn."


@pytest.mark.parametrize("answer", [41, "42", [42, 41], {}, np.zeros(3)])
def test_a_wrong_answer_of_any_type_gets_the_hint(answer):
    with pytest.raises(WrongAnswer, match="Hint: one more"):
        check_answer(answer, 42, "one more")


def test_right_answers_of_each_kind():
    assert check_answer(42.0, 42, "") == "Right."
    assert check_answer([1, 2], np.array([1, 2]), "") == "Right."
    assert check_answer("a", "a", "") == "Right."
    assert check_answer(4, lambda n: n % 2 == 0, "an even number") == "Right."
    with pytest.raises(AssertionError, match="an even number"):
        check_answer("x", lambda n: n % 2 == 0, "an even number")


def told(check, *arguments):
    "What a check says, whether it returns or raises it."
    try:
        return check(*arguments)
    except WrongAnswer as error:
        return str(error)


@pytest.mark.parametrize("got", ODD, ids=lambda got: type(got).__name__)
def test_no_answer_ends_in_an_error_of_ours(got):
    for want in WANTED:
        assert told(check_answer, got, want, "hint").endswith(("Hint: hint", "Right."))
        function = told(check_function, lambda: got, lambda: want, [()], "hint")
        assert function.endswith(("Hint: hint", "Right."))
    for answer in (0.25, "z", ["a", "z"]):
        assert told(check_key, got, answer_key(answer), "hint").endswith("Hint: hint")
    if not callable(got):
        assert "a function is expected" in told(
            check_function, got, abs, [(1,)], "hint"
        )


def raises(x):
    raise KeyError("nothing here\nand more")


def forever(x):
    return forever(x)


def half_done(x):
    return x * ...


@pytest.mark.parametrize(
    "function, said",
    [
        (None, "Your turn."),
        (lambda x: None, "Your turn."),
        (lambda x: ..., "Your turn."),
        (half_done, "Your turn."),
        (lambda x: x + 1, "2.0 came"),
        (lambda: 1, "0 positional arguments"),
        (raises, "KeyError"),
        (forever, "RecursionError"),
        (lambda x: x.sqroot(), "sqroot"),
    ],
)
def test_a_function_is_told_what_is_wrong_with_it(function, said):
    assert said in told(check_function, function, lambda x: x, [(1.0,), (2.0,)], "hint")


def test_a_function_cannot_change_what_the_check_holds():
    z = torch.zeros(3)
    cases = [(z, [z], {"z": z}, z.numpy())]

    def spoil(a, b, c, d):
        for each in (a, b[0], c["z"]):
            each.add_(1)
        d += 1
        return a

    assert told(check_function, spoil, lambda a, b, c, d: a + 1, cases, "") == "Right."
    assert z.sum() == 0


def test_gradients_flow_to_the_copies():
    def gradient(w):
        return torch.autograd.grad((w**2).sum(), w)[0]

    w = torch.ones(3, requires_grad=True)
    assert check_function(gradient, lambda w: 2 * w, [(w,), (2 * w,)], "") == "Right."


def test_rounding_does_not_decide():
    x, w = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))

    def backwards(x, w):
        return (x.flip(0) * w.flip(0)).flip(0), (x.flip(0) * w.flip(0)).sum()

    def forwards(x, w):
        return x * w, (x * w).sum()

    assert check_function(backwards, forwards, [(x, w)], "") == "Right."
    assert "gap" in told(
        check_function, lambda x, w: (1.001 * x * w, 0), forwards, [(x, w)], ""
    )


@pytest.mark.parametrize("digits", [2, 3, 4])
def test_keys_accept_what_rounds_alike_and_nothing_far(digits):
    for answer in np.random.default_rng(0).lognormal(0, 5, 100):
        key, unit = answer_key(answer, digits), 10.0 ** (1 - digits)
        for got in (answer, answer * (1 + 1e-9), answer * (1 - 1e-9)):
            assert check_key(got, key, "", digits) == "Right."
        wrong = answer * (1 + 2 * unit)
        assert told(check_key, wrong, key, "hint", digits).endswith("Hint: hint")


def test_equal_answers_have_different_keys():
    keys = {answer_key("b") for _ in range(10)}
    assert len(keys) == 10
    assert {check_key("B", key, "") for key in keys} == {"Right."}


@pytest.mark.parametrize("execution", ["autograde", "validate"])
def test_when_nbgrader_grades_a_blank_is_wrong(execution, monkeypatch, capsys):
    monkeypatch.setenv("NBGRADER_EXECUTION", execution)
    for check in (
        lambda: check_answer(..., 1, ""),
        lambda: check_key(None, answer_key(1), ""),
        lambda: check_function(lambda: None, lambda: 1, [()], ""),
    ):
        with pytest.raises(WrongAnswer, match="Your turn."):
            check()
    assert check_answer(1, 1, "") is None  # nbgrader would read a value as points
    assert capsys.readouterr().out == "Right.\n"


def test_notebooks_show_the_sentence_alone(capsys):
    shell = InteractiveShell()
    shell.user_ns["check_answer"] = check_answer
    shell.run_cell("check_answer(41, 42, 'one more')")
    shown = capsys.readouterr().out
    assert shown.strip() == "41 is not it. Hint: one more"
