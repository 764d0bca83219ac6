"""torch.compile without graph breaks, torch.export.

Where a test run installs the shape checks of jaxtyping, every function and dataclass of the package is wrapped in
code that dynamo cannot trace. These checks then have to run in a process without the wrappers: `Check.traces` marks
them, `run_by_name` runs one there.
"""

import torch
from torch import Tensor, nn

from formwright.conformance.check import check, ensure_close
from formwright.conformance.subject import MIXING, Stand, Subject, lengths_to_padding, padding_to_positions, tokens
from formwright.contracts import Context

COMPILER = (
    "aot_eager"  # dynamo, functionalisation and fake tensors, but no code generation: what breaks a graph breaks here
)


class Traced(nn.Module):
    """A stand with tensors alone in its signature."""

    def __init__(self, stand: Stand, *, causal: bool) -> None:
        super().__init__()
        self.stand, self.causal = stand, causal

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        positions = None if padding is None else padding_to_positions(padding)
        return self.stand(x, Context.of(x, causal=self.causal, padding=padding, positions=positions))


def _inputs(subject: Subject, n: int, *, batch: int = 3) -> tuple[Tensor, ...]:
    x = tokens(n, batch=batch)
    if subject.slot not in MIXING or "padding" not in subject.capabilities:
        return (x,)
    return x, lengths_to_padding([n - i for i in range(batch)], n, "left")


@check("compile", traces=True)
def compiles_without_graph_breaks(subject: Subject) -> None:
    """torch.compile(fullgraph=True), forward and backward, gives the same outputs and gradients."""
    for causal in (subject.causals or (False,))[:1]:
        stand, inputs = subject.stand(causal=causal), _inputs(subject, 7)
        torch._dynamo.reset()
        try:
            compiled = torch.compile(Traced(stand, causal=causal), fullgraph=True, backend=COMPILER)
            y = compiled(*inputs)
        except torch._dynamo.exc.TorchDynamoException as broken:
            raise AssertionError(f"{subject} declares compile, but breaks the graph: {_first_line(broken)}") from broken
        finally:
            torch._dynamo.reset()
        y.sum().backward()
        gradients = [p.grad for p in stand.parameters()]
        stand.zero_grad()
        plain = Traced(stand, causal=causal)(*inputs)
        plain.sum().backward()
        ensure_close(y, plain, f"{subject} gives another output when compiled.")
        for (name, parameter), gradient in zip(stand.named_parameters(), gradients, strict=True):
            if parameter.grad is not None and gradient is not None:
                ensure_close(
                    gradient, parameter.grad, f"{subject}: compiled, the gradient of {name} is another.", tolerance=1e-3
                )


@check("export", traces=True)
def exports_with_free_sizes(subject: Subject) -> None:
    """torch.export takes it with batch and length left open; the program gives the same outputs at other sizes."""
    for causal in (subject.causals or (False,))[:1]:
        module = Traced(subject.stand(causal=causal), causal=causal)
        free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        with torch.no_grad():
            inputs = _inputs(subject, 7)
            try:
                names = ("x", "padding")[: len(inputs)]
                shapes = {"x": free, "padding": free if len(inputs) == 2 else None}
                program = torch.export.export(
                    module, inputs, dynamic_shapes={name: shapes[name] for name in names}
                ).module()
            except Exception as refused:  # export raises a dozen kinds
                raise AssertionError(
                    f"{subject} declares export, but torch.export refuses it: {_first_line(refused)}"
                ) from refused
            for n, batch in ((7, 3), (12, 2)):
                inputs = _inputs(subject, n, batch=batch)
                ensure_close(
                    program(*inputs), module(*inputs), f"{subject} gives another output when exported, at {n} tokens."
                )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) if lines else type(error).__name__
