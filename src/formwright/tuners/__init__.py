"""Parameter-efficient tuning with PEFT: adapters that are trained, saved and loaded as PEFT's own are.

Importing the package makes them known to PEFT, which finds a saved adapter's method by name: import it before
`PeftModel.from_pretrained`.
"""

from formwright.errors import require

require("peft", extra="peft")

from formwright.tuners.perft import PERFTConfig, PERFTLayer, PERFTModel  # noqa: E402 - they need peft

__all__ = ["PERFTConfig", "PERFTLayer", "PERFTModel"]
