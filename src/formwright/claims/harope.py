"""Claim: a learned linear map a head before the rotation gives better images than fixed rotary encodings.

Paper  ImageNet 256 x 256, DiT-B/2, 1M steps, FID-50K (lower is better): 8.90, against 9.49 for 2-D RoPE, 9.81 for 1-D
       RoPE and 11.47 for absolute positions.
Here   scikit-learn's 8 x 8 digits, a token a pixel: a two-layer encoder that is told the class and the level of the
       noise predicts the noise that was mixed in, 500 steps of 32 images. Denoising is all that a diffusion model does;
       no images are drawn.
Fair   Four positions, each read at the learning rate, of the same three, that is best for it on the validation part;
       same steps, images and noise. Absolute positions are waves along both axes, as DiT has them. All are read on one
       fixed set of noise: every test image at eight levels.
Rule   error = mean squared error of the predicted noise on test images.
       holds                in every seed HARoPE's error is the lowest of the four
       holds in direction   HARoPE's mean error is the lowest of the four
"""

from collections.abc import Sequence
from statistics import fmean

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formwright import tasks
from formwright.claims import Outcome, Scale, Verdict
from formwright.models.transformer import TransformerConfig, TransformerHeadOutput, TransformerModel
from formwright.training import Settings, fit, seeded
from formwright.training.evaluation import Split, fetch, rows

STATEMENT = "A learned linear map per head before the rotation gives better images than fixed rotary encodings."
PAPER = {"FID, HARoPE": 8.90, "FID, 2-D RoPE": 9.49, "FID, 1-D RoPE": 9.81, "FID, absolute": 11.47}
RULE = (
    "error = mean squared error of the predicted noise on test images; holds: in every seed HARoPE's is the lowest of "
    "the four; holds in direction: HARoPE's mean is the lowest of the four."
)
SEEDS = (3, 4, 5)  # others than those looked at while the claim was written

OURS = "harope"
OTHERS = ("2-D RoPE", "1-D RoPE", "absolute")
POSITIONS = {  # and whether the tokens lie on a plane for it
    OURS: ("harope", True),
    "2-D RoPE": ("rope", True),
    "1-D RoPE": ("rope", False),
    "absolute": ("sinusoidal(axes=grid)", True),
}
RATES = {"smoke": (4e-3,), "full": (2e-3, 4e-3, 8e-3)}
STEPS = {"smoke": 4, "full": 500}
LEVELS = 8
CLASSES = 10


class Denoiser(nn.Module):
    """The noise in cos(t pi / 2) image + sin(t pi / 2) noise, from the mixture, its class and t."""

    def __init__(self, position: str, *, grid: bool) -> None:
        super().__init__()
        config = TransformerConfig(
            vocab_size=0,
            image_size=8,
            patch_size=1,
            num_channels=3 + CLASSES,
            use_grid=grid,
            position=position,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        self.body, self.noise = TransformerModel(config), nn.Linear(64, 1)

    def forward(
        self,
        pixel_values: Float[Tensor, "b 1 h w"],
        labels: Int[Tensor, " b"],
        noise: Float[Tensor, "b 1 h w"] | None = None,
        t: Float[Tensor, " b"] | None = None,
    ) -> TransformerHeadOutput:
        if noise is None:
            noise, t = torch.randn_like(pixel_values), torch.rand(len(pixel_values), device=pixel_values.device)
        angle = (t * torch.pi / 2)[:, None, None, None]
        told = (angle.cos(), angle.sin(), F.one_hot(labels, CLASSES)[:, :, None, None])
        planes = [fact.expand(-1, -1, *pixel_values.shape[2:]).to(noise.dtype) for fact in told]
        mixed = angle.cos() * pixel_values + angle.sin() * noise
        found = self.noise(self.body(pixel_values=torch.cat((mixed, *planes), 1)).last_hidden_state)
        return TransformerHeadOutput(loss=F.mse_loss(found, noise.flatten(2).mT), logits=found)


def run(scale: Scale, seed: int) -> Outcome:
    measured, baseline = error(OURS, scale, seed), {}
    for name in OTHERS:
        baseline |= error(name, scale, seed)
    return Outcome(scale=scale, seed=seed, measured=measured, baseline=baseline)


def error(name: str, scale: Scale, seed: int) -> dict[str, float]:
    """Error on the test images at the rate that is best on the validation part, and that rate."""
    task = tasks.load("digits(patch_size=1, validation=0.2)")
    position, grid = POSITIONS[name]
    tried = []
    for rate in RATES[scale]:
        seeded(seed)
        model = Denoiser(position, grid=grid)
        fit(model, task, Settings(steps=STEPS[scale], batch_size=32, learning_rate=rate, seed=seed))
        tried.append((denoised(model, task, "validation"), rate, model))
    _, rate, model = min(tried, key=lambda trial: trial[0])
    return {name: denoised(model, task, "test"), f"{name}, learning rate": rate}


@torch.no_grad()
def denoised(model: Denoiser, task: tasks.Task, split: Split) -> float:
    """Mean squared error over every image at every level, with noise that is the same for all."""
    images = fetch(rows(task, split), list(range(len(rows(task, split)))), task.collate)
    drawn = torch.Generator().manual_seed(0)
    errors = []
    for level in range(LEVELS):
        noise = torch.randn(images["pixel_values"].shape, generator=drawn)
        t = torch.full((len(noise),), (level + 0.5) / LEVELS)
        errors.append(model(**images, noise=noise, t=t).loss.item())
    return fmean(errors)


def verdict(outcomes: Sequence[Outcome]) -> Verdict:
    if all(outcome.measured[OURS] < min(outcome.baseline[name] for name in OTHERS) for outcome in outcomes):
        return "holds"
    ours = fmean(outcome.measured[OURS] for outcome in outcomes)
    theirs = min(fmean(outcome.baseline[name] for outcome in outcomes) for name in OTHERS)
    return "holds in direction" if ours < theirs else "does not hold here"
