"""How a method of ours becomes one of PEFT's."""

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method


def register(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Make a method known to PEFT. Its adapters' parameters begin with `name` and an underscore."""
    if name.upper() not in PeftType.__members__:
        _add_type(name.upper())
        register_peft_method(name=name, config_cls=config, model_cls=model)


def _add_type(name: str) -> None:
    """One more member of a closed enum, which `register_peft_method` asks for: there is no public way."""
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
