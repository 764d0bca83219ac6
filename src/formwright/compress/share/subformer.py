"""Sandwich sharing of a trained model: the layers between use the mean of their weights.

Paper    Reid, Marrese-Taylor, Matsuo: Subformer (Findings of EMNLP 2021), arXiv:2101.00234; the schemes are those of
         `formwright.parts.sharing.subformer`, with which a model is trained from scratch.
Idea     A trained model is a start for a shared one: of the layers that share, every matrix and bias becomes the mean
         over the layers, and all use the same tensor, which a file holds once. Norms stay each layer's own.

             W <- 1/n sum_i W_i      over the n layers that share

Differs  The paper trains from scratch; the mean as a start is ours. It costs much of what the model knew: let
         `finetune` or `distill` follow. Work and time are those of the unshared model.
"""

from torch import nn
from transformers import PreTrainedModel

from formwright import catalog
from formwright.build import Spec, build
from formwright.compress.anatomy import describe
from formwright.compress.modifier import Modifier
from formwright.compress.structure import Rebuilt
from formwright.errors import FormwrightError
from formwright.models.body import Stack
from formwright.parts.sharing.subformer import average, shared_names, tie


class Share(Modifier):
    """Average the weights of layers that are to share, and tie them. Every stack of the model is shared by itself.

    Args:
        scheme: which layers share: "sandwich" (all but the first and the last), "all" or "all-but-last".
    """

    def __init__(self, *, scheme: str = "sandwich") -> None:
        known = [part.name for part in catalog.provided("sharing")]
        if scheme not in known:
            raise FormwrightError(f"scheme is {scheme!r}, but it must be one of {', '.join(known)}.")
        self.scheme: Spec = scheme

    def check(self, model: PreTrainedModel) -> None:
        saved = 0
        for path in stacks(model):
            layers = model.get_submodule(path)
            odd = next((name for name, one in layers.named_modules() if isinstance(one, Rebuilt)), None)
            if odd is not None:
                raise FormwrightError(
                    f"{path}.{odd} was changed by another method, and layers share before that: put share first."
                )
            names = self._names(layers)
            parameters = dict(layers.named_parameters(remove_duplicate=False))
            whole = next((name for name in names if not parameters[name].is_floating_point()), None)
            if whole is not None:
                raise FormwrightError(
                    f"{path}.{whole} holds whole numbers, of which there is no mean: put share first."
                )
            saved += sum(parameters[target] is not parameters[source] for target, source in names.items())
        if not saved:
            raise FormwrightError(f"{self.scheme} leaves nothing to share in this model: leave the step out.")

    def apply(self, model: PreTrainedModel) -> None:
        for path in stacks(model):
            layers = model.get_submodule(path)
            names = self._names(layers)
            average(layers, names)
            tie(layers, names)

    def _names(self, layers: nn.ModuleList) -> dict[str, str]:
        owners = build("sharing", self.scheme, dim=0).owners(len(layers))
        return shared_names(layers, owners)


def stacks(model: PreTrainedModel) -> list[str]:
    """Where the layers of a model of ours or of transformers' lie, a ModuleList for each stack.

    Raises:
        FormwrightError: an unknown family, or one whose layers are one layer already (ALBERT).
    """
    ours = [f"{path}.layers" for path, module in model.named_modules() if isinstance(module, Stack)]
    if ours:
        return ours
    anatomy = describe(model)
    if anatomy.shared:
        raise FormwrightError(f"The layers of {anatomy.family} are shared already: leave share out.")
    return [stack.path for stack in anatomy.stacks]
