"""transformers' `generate` with the caches of our models."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from formwright.errors import FormwrightError


class Generates(GenerationMixin):
    """generate with our own cache. A model names GenerationMixin among its bases too, where `can_generate` looks."""

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        _generation_mode: Any,
        _batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise FormwrightError(
                f"cache_implementation={generation_config.cache_implementation!r} has no meaning here: a Formwright "
                "Transformer makes its own growing cache; leave the argument out."
            )
        if model_kwargs.get("past_key_values") is not None:
            if generation_config.use_cache is False:
                raise FormwrightError(
                    "past_key_values with use_cache=False would read the past twice: leave one of the two out."
                )
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False and self.model._can_cache():
            model_kwargs["past_key_values"] = self.model.new_cache(capacity=max_cache_length)
        else:
            generation_config.use_cache = False

    @property
    def _is_stateful(self) -> bool:
        return any(mixer.cache_kind == "state" for mixer in self.model.decoder.mixers)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, *_settings: Any
    ) -> dict[str, Any]:
        if self.model.encoder is None or model_kwargs.get("encoder_outputs") is not None:
            return model_kwargs
        names = ("attention_mask", "token_type_ids", "position_ids")
        given = {name: model_kwargs[name] for name in names if model_kwargs.get(name) is not None}
        given[model_input_name or self.main_input_name] = inputs_tensor
        return model_kwargs | {"encoder_outputs": self.model.encode(**given)}
