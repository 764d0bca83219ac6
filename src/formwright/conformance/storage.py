"""Save and load: safetensors hold all there is, and Hugging Face loading does not undo it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from formwright.conformance.check import check, ensure, ensure_close
from formwright.conformance.subject import Stand, Subject, tokens
from formwright.contracts import Context
from formwright.parts.norm.init import Normal


def host_class(make: Callable[[], Stand]) -> type[PreTrainedModel]:
    """A Hugging Face model around one part, which initialises as our models do."""

    class Host(PreTrainedModel):
        config_class = PreTrainedConfig
        base_model_prefix = "stand"

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.stand = make()
            self.post_init()

        @torch.no_grad()
        def _init_weights(self, module: nn.Module) -> None:
            if type(module).__module__.startswith("torch.nn"):
                Normal(layers=2)(module)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    return Host


def _output(stand: Stand, causal: bool) -> Tensor:
    x = tokens(9).to(next((p.dtype for p in stand.parameters()), torch.float32))
    with torch.no_grad():
        return stand(x, Context.of(x, causal=causal))


@check()
def safetensors_hold_everything(subject: Subject) -> None:
    """Saved after some training steps and loaded into a part built under another seed: the same state, the same
    outputs to the bit.
    """
    causal = (subject.causals or (False,))[0]
    stand, other = subject.stand(causal=causal, seed=0), subject.stand(causal=causal, seed=1)
    stand.train()
    for seed in (3, 4):
        x = tokens(9, seed=seed)
        stand(x, Context.of(x, causal=causal))
    stand.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "part.safetensors")
        save_model(stand, path)
        load_model(other, path)
    mine, theirs = stand.state_dict(), other.state_dict()
    ensure(mine.keys() == theirs.keys(), f"{subject}: the state loaded has other names than the one saved.")
    for name in mine:
        ensure(torch.equal(mine[name], theirs[name]), f"{subject}: {name} is not what was saved.")
    ensure(
        torch.equal(_output(stand, causal), _output(other, causal)),
        f"{subject} keeps something outside its state: saved and loaded into another, it gives other outputs.",
    )


@check()
def from_pretrained_gives_it_back(subject: Subject) -> None:
    """save_pretrained and from_pretrained, built on the meta device: same outputs, in float32 and in bfloat16."""
    causal = (subject.causals or (False,))[0]
    make = host_class(lambda: Stand(subject.slot, subject.build(causal=causal)))
    model = make(PreTrainedConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for dtype in (torch.float32, torch.bfloat16):
            loaded = make.from_pretrained(folder, dtype=dtype).eval()
            twin = model.stand.twin(dtype)
            ensure_close(
                _output(loaded.stand, causal),
                _output(twin, causal),
                f"{subject} in {dtype} comes back from from_pretrained as something else: a constant was lost or "
                f"rounded.",
            )


@check()
def loading_keeps_what_was_loaded(subject: Subject) -> None:
    """A file that lacks one tensor: that one is initialised, and every other one is as saved."""
    causal = (subject.causals or (False,))[0]
    make = host_class(lambda: Stand(subject.slot, subject.build(causal=causal)))
    model = make(PreTrainedConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)  # unlike anything an initialisation gives
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "model.safetensors"
        saved = load_file(path) if path.exists() else {}
        names = [name for name, _ in model.named_parameters() if name in saved]
        for missing in names[:: max(1, len(names) // 4)]:
            save_file(
                {name: value for name, value in saved.items() if name != missing}, path, metadata={"format": "pt"}
            )
            loaded = make.from_pretrained(folder).state_dict()
            for name, value in saved.items():
                if name == missing:
                    ensure(
                        bool(torch.isfinite(loaded[name]).all()),
                        f"{subject} leaves {name} uninitialised when a file lacks it.",
                    )
                else:
                    ensure(
                        torch.equal(loaded[name], value),
                        f"{subject}: {name} was loaded and then initialised again, because the file lacked {missing}; "
                        "reset_parameters must use torch.nn.init alone.",
                    )
