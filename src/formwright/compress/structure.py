"""A changed model is still an ordinary Hugging Face model: it saves, and comes back from safetensors and config alone.

    adopt(model)                      # in place: the class becomes a subclass of its own that knows how to rebuild
    replace(model, "bert.encoder.layer.0.output.dense", LowRank(...))
    model.save_pretrained(folder)
    model = formwright.load(folder)   # or AutoModel... after `import formwright.compress`

The module tree is the truth. At saving a fresh model is built on the meta device from the config the model once had,
and what tells the two apart is written into `config.compression`:

    built_from   the config a fresh model is built from
    layers       which entries of a ModuleList are left, by their old number
    modules      our own modules (`Rebuilt`) in the tree, parents first: path, kind and structure
    shapes       parameters and buffers of another shape, by module
    attributes   whole numbers, truth values and the like that modules keep for themselves (num_attention_heads ...)
    configs      what tells the configs of stacks that keep one of their own (T5's) from a fresh model's
    tied         parameters that are another one by a second name: saved once, and tied again
    prefix       under which name the base model hangs in the model that was saved
    recipe       the steps that made the model

Nothing is pickled, no code is named in the file: a kind is looked up in the catalogue. A difference that cannot be
written down is an error at saving, not a surprise at loading.
"""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from formwright import catalog
from formwright.errors import FormwrightError
from formwright.models import transformer as own

VERSION = 1
PREFIX = "formwright-"
EXECUTOR = "executor"

# Families whose saved models the Auto classes know as soon as this module is imported; `load` knows all.
FAMILIES = (
    *("bert", "roberta", "distilbert", "electra", "mpnet", "albert", "modernbert", "vit", "deit", "dinov2"),
    *("gpt2", "opt", "llama", "qwen3", "mistral", "whisper", "wav2vec2", "t5"),
)


class Rebuilt(nn.Module):
    """A module of ours inside a user's model. Its weights are parameters and persistent buffers; `structure` says the
    rest.
    """

    kind: ClassVar[str]  # its name in the catalogue: [provides."module/<kind>"]

    def structure(self) -> dict[str, Any]:
        """What `rebuild` needs, as JSON."""
        raise NotImplementedError

    @classmethod
    def rebuild(cls, old: nn.Module | None, **structure: Any) -> "Rebuilt":
        """The module around, or in place of, what a fresh model has there; its weights are loaded afterwards."""
        raise NotImplementedError


class Executor(Rebuilt):
    """Runs the whole model in another way, as `model.executor`; holds no reference to the model.

    One without structure and weights of its own runs the base model and any head alike: AutoModel reads it from a
    classifier's folder. All others belong to the class they were saved with.
    """

    def run(self, model: PreTrainedModel, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the model's forward gives; `forward` is its own, for what this executor leaves to it."""
        raise NotImplementedError


class Adopted:
    """What a generated subclass adds to its Hugging Face class."""

    _source: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "compression", None) is None:  # a fresh model of this class, not a saved one
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            return
        base = _base_config(config)
        super().__init__(base, *args, **kwargs)  # type: ignore[call-arg]
        _stamp(self)  # type: ignore[arg-type]
        _apply(self, _seen_from(self, config.compression))  # type: ignore[arg-type]
        config._attn_implementation = base._attn_implementation  # chosen while the model was built
        for module in self.modules():  # type: ignore[attr-defined]
            if getattr(module, "config", None) is base:
                module.config = config
        self.post_init()  # type: ignore[attr-defined]  # the tied weights and parallel plans of the changed tree

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As transformers' own, with the structure in the config."""
        self.config.compression = describe(self)  # type: ignore[attr-defined, arg-type]
        theirs = type(self)._tied_weights_keys or {}  # type: ignore[attr-defined]
        self._tied_weights_keys = {**theirs, **self.config.compression["tied"]}  # type: ignore[attr-defined]
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Also what was tied after the model was built, whether or not its embeddings are: as the tree has it now."""
        theirs = super().get_expanded_tied_weights_keys(all_submodels)  # type: ignore[misc]
        ours = _twice(self)  # type: ignore[arg-type]
        return theirs | {one: source for one, source in ours.items() if one not in theirs and source not in theirs}

    def _adjust_bias(self, output_embeddings: nn.Module, input_embeddings: Any) -> None:
        """transformers pads the bias of whatever is tied to the length of a vocabulary; a layer has none."""
        if output_embeddings is self.get_output_embeddings():  # type: ignore[attr-defined]
            super()._adjust_bias(output_embeddings, input_embeddings)  # type: ignore[misc]


def adopt(model: nn.Module) -> PreTrainedModel:
    """Give the model a class that can save and rebuild changed shapes. In place; nothing happens the second time.

    Call it before the first change: what the model is now is what a fresh one will be built as.

    Raises:
        FormwrightError: no Hugging Face model.
    """
    if isinstance(model, Adopted):
        return model
    if not isinstance(model, PreTrainedModel):
        raise FormwrightError(
            f"{type(model).__name__} is no transformers model: load it with AutoModel.from_pretrained or the like."
        )
    built_from = _plain(model.config)
    model.__class__ = adopted(type(model))
    model.config.__class__ = adopted_config(type(model.config))
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs  # by class name, and written when a model is built
    model.config.compression = {"version": VERSION, "built_from": built_from, "recipe": []}
    _stamp(model)
    return model


def replace(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    """Put a module of ours where `path` leads."""
    adopt(model)
    model.set_submodule(path, module)


def attach(model: PreTrainedModel, executor: Executor) -> None:
    """Let the executor run the model.

    Raises:
        FormwrightError: another one runs it already.
    """
    adopt(model)
    present = getattr(model, EXECUTOR, None)
    if present is not None:
        raise FormwrightError(
            f"The model is run by {present.kind} already, and one model has one executor: leave {executor.kind} out."
        )
    model.add_module(EXECUTOR, executor)


@functools.cache
def adopted(source: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a transformers class that rebuilds what it saved."""

    @functools.wraps(source.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = functools.partial(source.forward, self)
        executor = self._modules.get(EXECUTOR)
        return own(*args, **kwargs) if executor is None else executor.run(self, own, *args, **kwargs)

    members = {
        "_source": source,
        "forward": forward,
        "config_class": adopted_config(source.config_class),
        "__module__": source.__module__,  # transformers reads the source of the file a class is from
    }
    return type(f"Formwright{source.__name__}", (Adopted, source), members)


@functools.cache
def adopted_config(source: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The config class with a `compression` field, known to AutoConfig."""

    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        register_models(source)
        return super(made, cls).from_dict(config_dict, **kwargs)

    members = {
        "model_type": PREFIX + source.model_type,
        "compression": None,
        "__annotations__": {"compression": dict | None},
        "__module__": source.__module__,
        "from_dict": classmethod(from_dict),
    }
    made = type(f"Formwright{source.__name__}", (source,), members)
    AutoConfig.register(made.model_type, made, exist_ok=True)
    return made


def register_models(source: type[PreTrainedConfig]) -> None:
    """Let every Auto class that knows a family build its changed models too."""
    made = adopted_config(source)
    for auto in _auto_classes():
        if source in auto._model_mapping and made not in auto._model_mapping._extra_content:
            known = auto._model_mapping[source]
            known = known[0] if isinstance(known, list | tuple) else known
            auto.register(made, adopted(known), exist_ok=True)


def _auto_classes() -> Iterator[Any]:
    for name in vars(modeling_auto):
        auto = getattr(modeling_auto, name)
        if name.startswith("AutoModel") and hasattr(auto, "_model_mapping"):
            yield auto


def register_families() -> None:
    """Make AutoConfig know the saved models of the families above."""
    for family in FAMILIES:
        if family in CONFIG_MAPPING:
            adopted_config(CONFIG_MAPPING[family])


# What is written down


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The `compression` of an adopted model's config: how to rebuild it.

    Raises:
        FormwrightError: the tree holds a change that cannot be written down.
    """
    before = model.config.compression
    found: dict[str, Any] = {name: before[name] for name in ("version", "built_from", "recipe")}
    found["prefix"] = _prefix(model)
    found["layers"] = {
        path: [int(one._formwright_origin.rpartition(".")[2]) for one in module]
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(hasattr(one, "_formwright_origin") for one in module)
    }
    fresh = _fresh(model)
    found["layers"] = {
        path: kept
        for path, kept in found["layers"].items()
        if _has(fresh, path) and kept != list(range(len(fresh.get_submodule(path))))
    }
    found["modules"] = [
        {"path": path, "kind": module.kind, "structure": _json(module)}
        for path, module in model.named_modules()
        if isinstance(module, Rebuilt)
    ]
    _apply(fresh, found)
    found["shapes"], found["attributes"] = _differences(model, fresh)
    theirs = {path: _plain(config) for path, config in _own_configs(fresh)}
    found["configs"] = {
        path: changed
        for path, config in _own_configs(model)
        if (changed := {k: v for k, v in _plain(config).items() if path in theirs and theirs[path].get(k) != v})
    }
    already = _twice(fresh)
    found["tied"] = {target: source for target, source in _twice(model).items() if target not in already}
    return found


def _twice(model: nn.Module) -> dict[str, str]:
    """Parameters that have a name already, and that name."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(one)] for name, one in named if first.setdefault(id(one), name) != name}


def _own_configs(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedConfig]]:
    """Configs that modules keep beside the model's, by the first module that has it."""
    seen = {id(model.config)}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield path, config


def _json(module: Rebuilt) -> dict[str, Any]:
    structure = module.structure()
    if json.loads(json.dumps(structure)) != structure:
        raise FormwrightError(f"The structure of {module.kind} is no plain JSON: {structure}.")
    return structure


def _fresh(model: PreTrainedModel) -> PreTrainedModel:
    """What the model was built as, without weights."""
    config = _base_config(model.config)
    with torch.device("meta"):
        return type(model)._source(config)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _differences(model: nn.Module, fresh: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    shapes: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    theirs = dict(fresh.named_modules())
    ours = dict(model.named_modules())
    for path, module in ours.items():
        other = theirs.get(path)
        if other is None or (_type(other) != _type(module) and path):
            was = "nothing" if other is None else type(other).__name__
            raise FormwrightError(
                f"{path} is a {type(module).__name__} where a fresh model has {was}: this change cannot be saved; "
                "make the module a formwright.compress.structure.Rebuilt."
            )
        mine, its = _tensors(module), _tensors(other)
        changed = {name: mine.get(name) for name in mine.keys() | its.keys() if mine.get(name) != its.get(name)}
        if changed:
            shapes[path] = changed
        kept, were = _simple(module), _simple(other)
        changed = {name: value for name, value in kept.items() if name not in were or were[name] != value}
        if changed and not isinstance(module, Rebuilt):
            attributes[path] = changed
    gone = sorted(theirs.keys() - ours.keys())
    if gone:
        raise FormwrightError(f"{gone[0]} is missing from the model: this change cannot be saved.")
    return shapes, attributes


def _type(module: nn.Module) -> object:
    """What a module is; torch makes a class of its own for each that is parametrized, as by a weight norm."""
    return type(module).__bases__ if is_parametrized(module) else type(module)


def _tensors(module: nn.Module) -> dict[str, list[int] | None]:
    """Shapes of the module's own parameters and buffers."""
    own = {**module._parameters, **module._buffers}
    return {name: None if value is None else list(value.shape) for name, value in own.items()}


def _simple(module: nn.Module) -> dict[str, Any]:
    """The plain values a module keeps for itself."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ("training", "gradient_checkpointing")
        and (
            isinstance(value, bool | int | float)
            or (isinstance(value, tuple) and all(isinstance(one, int) for one in value))
        )
    }


# What is built again


def _apply(model: nn.Module, compression: dict[str, Any]) -> None:
    """Make a fresh model what `compression` says. Shapes and attributes come last: modules may bring their own."""
    for path, kept in compression.get("layers", {}).items():
        layers = model.get_submodule(path)
        model.set_submodule(path, nn.ModuleList([layers[index] for index in kept]))
    for entry in compression.get("modules", []):
        path = entry["path"]
        old = model.get_submodule(path) if _has(model, path) else None
        made = _kind(entry).rebuild(old, **entry["structure"])
        if path == EXECUTOR:
            model.add_module(EXECUTOR, made)
        else:
            model.set_submodule(path, made)
    for path, changed in compression.get("shapes", {}).items():
        module = model.get_submodule(path)
        for name, shape in changed.items():
            _resize(module, name, shape)
    for path, changed in compression.get("attributes", {}).items():
        module = model.get_submodule(path)
        for name, value in changed.items():
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    for path, changed in compression.get("configs", {}).items():
        for name, value in changed.items():
            setattr(model.get_submodule(path).config, name, value)
    for target, source in compression.get("tied", {}).items():
        path, _, name = target.rpartition(".")
        model.get_submodule(path)._parameters[name] = model.get_parameter(source)


def _prefix(model: nn.Module) -> str:
    """Where the base model hangs in a model with a head; "" in the base model itself."""
    name = model.base_model_prefix
    return name if name and hasattr(model, name) else ""


def _seen_from(model: nn.Module, compression: dict[str, Any]) -> dict[str, Any]:
    """The paths of a saved model in one of another class: a base model read from a model with a head, or the reverse.

    Raises:
        FormwrightError: the saved model runs by an executor that belongs to its own class.
    """
    theirs, ours = compression.get("prefix", ""), _prefix(model)
    if theirs == ours:
        return compression
    for entry in compression.get("modules", []):
        if entry["path"] == EXECUTOR and not _serves_any_class(entry):
            raise FormwrightError(
                f"The saved model runs by {entry['kind']}, which {type(model)._source.__name__} cannot take over: "
                "load it with the class it was saved from, formwright.load(folder)."
            )

    def move(path: str) -> str | None:
        if path.partition(".")[0] == EXECUTOR:
            return path
        if not theirs:
            return f"{ours}.{path}"
        return path.removeprefix(f"{theirs}.") if path.startswith(f"{theirs}.") else None

    moved = dict(compression)
    for what in ("layers", "shapes", "attributes", "configs"):
        pairs = [(move(path), value) for path, value in compression.get(what, {}).items()]
        moved[what] = {path: value for path, value in pairs if path is not None}
    tied = {move(target): move(source) for target, source in compression.get("tied", {}).items()}
    moved["tied"] = {target: source for target, source in tied.items() if target is not None and source is not None}
    entries = [{**entry, "path": move(entry["path"])} for entry in compression.get("modules", [])]
    moved["modules"] = [entry for entry in entries if entry["path"] is not None]
    return moved


def _serves_any_class(entry: dict[str, Any]) -> bool:
    return not entry["structure"] and not _kind(entry).rebuild(None).state_dict()


def _kind(entry: dict[str, Any]) -> type[Rebuilt]:
    kind = catalog.resolve(catalog.find("module", entry["kind"]).target)
    if not issubclass(kind, Rebuilt):
        raise FormwrightError(f"{entry['kind']} in the saved model is no module that can be rebuilt.")
    return kind  # type: ignore[no-any-return]


def _resize(module: nn.Module, name: str, shape: list[int] | None) -> None:
    held = module._parameters if name in module._parameters else module._buffers
    old = held.get(name)
    if shape is None:
        held[name] = None
    elif old is None or name not in module._parameters:
        held[name] = torch.empty(shape, dtype=old.dtype if old is not None else None)
    else:
        held[name] = nn.Parameter(torch.empty(shape, dtype=old.dtype), requires_grad=old.requires_grad)


def _stamp(model: nn.Module) -> None:
    """Mark the entries of every ModuleList with their number, so that it is known which are left later."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for index, one in enumerate(module):
                one._formwright_origin = f"{path}.{index}"


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """A config as a dictionary that builds the same model."""
    left_out = ("transformers_version", "_name_or_path", "architectures", "compression", "dtype")
    return copy.deepcopy({name: value for name, value in config.to_dict().items() if name not in left_out})


def _base_config(config: PreTrainedConfig) -> PreTrainedConfig:
    source = type(config).__mro__[1] if type(config).model_type.startswith(PREFIX) else type(config)
    base = source.from_dict(copy.deepcopy(config.compression["built_from"]))
    base._attn_implementation = config._attn_implementation
    base.dtype = config.dtype
    return base


# Loading


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model saved in a folder, exactly: its own class, shapes, modules and executor.

    Args:
        folder: where `save_pretrained` wrote it; an ordinary transformers model loads too.
        kwargs: of from_pretrained: dtype, device_map, attn_implementation.

    Raises:
        FormwrightError: no such folder, no model in it, weights cut off or of another model, or a quantization this
            version does not know.
    """
    folder = Path(folder)
    description = read_config(folder)
    architecture = (description.get("architectures") or ["AutoModel"])[0]
    family = description.get("model_type", "")
    base = family.removeprefix(PREFIX)
    if family.startswith(PREFIX) and base in CONFIG_MAPPING:
        register_models(CONFIG_MAPPING[base])
        cls = adopted(_named(architecture.removeprefix("Formwright"), folder))
    else:
        cls = _named(architecture, folder)
    return _read(cls, folder, kwargs)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        FormwrightError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise FormwrightError(f"{folder} is no folder: give the folder of a model saved with save_pretrained.")
    if not path.exists():
        raise FormwrightError(f"{folder} holds no model: it has no config.json.")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as wrong:
        raise FormwrightError(f"{path} is no JSON ({wrong}): save or download the model again.") from wrong
    if not isinstance(description, dict):
        raise FormwrightError(f"{path} is no model description: save or download the model again.")
    return description


def _named(architecture: str, folder: Path) -> Any:
    cls = getattr(transformers, architecture, None) or getattr(own, architecture, None)
    if cls is None:
        raise FormwrightError(
            f"{folder} holds a {architecture}, which transformers {transformers.__version__} does not have: "
            "choose a model of a family it knows."
        )
    return cls


def _read(cls: Any, folder: Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    from safetensors import SafetensorError

    try:
        model, report = cls.from_pretrained(folder, output_loading_info=True, use_safetensors=True, **kwargs)
    except FormwrightError:
        raise
    except SafetensorError as wrong:
        raise FormwrightError(
            f"The weights in {folder} cannot be read ({wrong}): the file is cut off or damaged; copy it again."
        ) from wrong
    except OSError as wrong:
        raise FormwrightError(f"{folder} holds no weights as safetensors: save the model again.") from wrong
    except (RuntimeError, KeyError, TypeError, AttributeError) as wrong:
        raise FormwrightError(f"The model in {folder} cannot be rebuilt: {first_line(wrong)}.") from wrong
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            names = sorted(str(one) for one in report[what])
            raise FormwrightError(
                f"The weights in {folder} do not fit its config ({what.replace('_', ' ')}: {names[0]}"
                f"{f' and {len(names) - 1} more' if len(names) > 1 else ''}): save the model again."
            )
    return model


def first_line(error: Exception) -> str:
    """What went wrong, of an exception that may say it at length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
