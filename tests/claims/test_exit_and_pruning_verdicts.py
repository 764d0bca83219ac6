"""The verdicts of the claims about early exit and token pruning, on made-up outcomes, and what both compare with."""

import pytest
import torch

from formwright.claims import Outcome, deebert, ltp


def exits(saved=0.35, drop=0.005, accuracy=0.8, random=0.78, fixed=0.79, whole=0.8):
    measured = {"saved": saved, "drop": drop, "accuracy": accuracy}
    return Outcome(scale="full", seed=0, measured=measured, baseline={"random": random, "fixed": fixed, "whole": whole})


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([exits()], "holds"),
        ([exits(saved=0.2)], "holds in direction"),
        ([exits(), exits(fixed=0.805)], "holds in direction"),
        ([exits(drop=0.02)], "does not hold here"),
        ([exits(random=0.81)], "does not hold here"),
        ([exits(saved=-0.1)], "does not hold here"),
        ([exits(), exits(whole=0.5)], "does not hold here"),
    ],
)
def test_exits_must_save_time_and_beat_random_and_fixed_ones(outcomes, wanted):
    assert deebert.verdict(outcomes) == wanted


def pruned(flops=0.45, drop=0.005, accuracy=0.8, top=0.79, spent=0.46):
    measured = {"LTP, flops": flops, "drop": drop, "LTP, accuracy": accuracy}
    return Outcome(scale="full", seed=0, measured=measured, baseline={"top-k, flops": spent, "top-k, accuracy": top})


@pytest.mark.parametrize(
    ("outcomes", "wanted"),
    [
        ([pruned()], "holds"),
        ([pruned(flops=0.6, spent=0.5)], "holds in direction"),
        ([pruned(top=0.81)], "holds in direction"),
        ([pruned(drop=0.05)], "holds in direction"),
        ([pruned(drop=0.05, top=0.81)], "does not hold here"),
        ([pruned(flops=0.9, spent=0.8)], "does not hold here"),
    ],
)
def test_pruning_must_halve_the_operations_or_beat_top_k(outcomes, wanted):
    assert ltp.verdict(outcomes) == wanted


def test_a_text_leaves_at_the_first_sure_ramp_or_at_the_end():
    sure, unsure = [9.0, 0.0], [0.0, 0.0]
    says = torch.tensor([[sure, unsure, unsure], [unsure, sure, unsure], [unsure, unsure, unsure]])
    assert deebert.leaving(says, 0.1).tolist() == [0, 1, 2]
    assert deebert.leaving(says, 0.0).tolist() == [2, 2, 2]


def test_top_k_keeps_a_falling_share_of_each_texts_own_length():
    top = ltp.TopK(layers=4, final_threshold=0.0, temperature=1.0, variant="paper")
    top.final = 0.2
    assert [top.share(number) for number in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    scores = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.3, 0.0, 0.0]])
    live = torch.tensor([[True] * 5, [True, True, True, False, False]])
    kept = top.keep(2, scores, live, live.sum(1))
    assert kept.tolist() == [[True, False, False, False, True], [True, True, False, False, False]]
