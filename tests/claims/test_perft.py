"""Verdicts of PERFT's claims with made-up outcomes, and that the arms are of one size."""

import pytest

pytest.importorskip("peft")
from peft import get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM

from formwright.claims import Outcome, perft


def outcome(seed, routed, attention, experts):
    columns = {arm: perft.column(arm, perft.ACTIVATED) for arm in (perft.ROUTED, perft.ON_ATTENTION, perft.ON_EXPERTS)}
    return Outcome(
        scale="full",
        seed=seed,
        measured={columns[perft.ROUTED]: routed},
        baseline={columns[perft.ON_ATTENTION]: attention, columns[perft.ON_EXPERTS]: experts},
    )


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ([(1.0, 1.2, 1.1), (1.0, 1.2, 1.1)], "holds"),
        ([(1.0, 1.2, 1.1), (1.0, 1.2, 0.9)], "holds in direction"),  # in one seed LoRA on the experts is lower
        ([(1.0, 1.2, 1.1), (1.3, 1.2, 1.4)], "holds in direction"),
        ([(1.0, 1.2, 1.1), (1.5, 1.2, 1.6)], "does not hold here"),
    ],
)
def test_the_verdict_follows_the_rule(losses, verdict):
    outcomes = [outcome(seed, *each) for seed, each in enumerate(losses)]
    assert perft.verdict(outcomes, perft.ACTIVATED) == verdict


def sizes(arm, equal):
    """Trained parameters of a layer, and those of them that a token meets."""
    sizes = {"hidden_size": perft.WIDTH, "intermediate_size": perft.WIDTH, "num_hidden_layers": 1}
    config = OlmoeConfig(vocab_size=8, num_attention_heads=4, num_experts=8, num_experts_per_tok=2, **sizes)
    model = get_peft_model(OlmoeForCausalLM(config), perft.ARMS[arm, equal]())
    trained = {name: one.numel() for name, one in model.named_parameters() if one.requires_grad}
    share = 0.25 if arm in (perft.ON_EXPERTS, "PERFT-E") else 0.5 if arm == perft.ROUTED else 1.0
    met = sum(size if "router" in name else share * size for name, size in trained.items())
    return sum(trained.values()), met


@pytest.mark.parametrize(("arm", "equal"), perft.ARMS)
def test_an_arm_is_of_its_claims_size_and_a_routed_one_never_larger(arm, equal):
    trained, met = sizes(arm, equal)
    size = met if equal == perft.ACTIVATED else trained
    assert 1792 <= size <= 2048
    assert arm not in perft.SAME or trained == met
