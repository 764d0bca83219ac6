"""The Transformer's body: embeddings, stacks of blocks, and the model that joins them.

ids or pixels -> tokens (+ type, + position) (norm) -> blocks of mixer, cross-attention, feed-forward (norm)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, ModelOutput
from transformers.utils.generic import can_return_tuple

from formwright.build import build, parse_spec
from formwright.contracts import SCORE_HOOKS, Context, NormFactory, UnsupportedContext, hooks, scope
from formwright.errors import FormwrightError
from formwright.models.cache import new_cache, refuse_other_caches
from formwright.models.config import TransformerConfig
from formwright.models.decoding import decoded
from formwright.parts import assemble
from formwright.parts.block import reversible
from formwright.parts.embedding.patch import ClassToken, PatchEmbedding
from formwright.parts.sharing.subformer import ADAPTER_DROPOUT, Adapter, Narrowed, Sharing, shared_names, tie


@dataclass
class TransformerOutput(ModelOutput):
    """What the body gives: last_hidden_state (b, n, d), and what was asked for besides."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    extra_losses: dict[str, Tensor] | None = None


class TransformerLayer(GradientCheckpointingLayer):
    """One block, and whether it uses the position that all layers share."""

    def __init__(self, block: nn.Module, *, uses_position: bool) -> None:
        super().__init__()
        self.block, self.uses_position = block, uses_position

    def forward(
        self, x: Float[Tensor, "b n d"], context: Context, cross: Context | None = None
    ) -> Float[Tensor, "b n d"]:
        step = decoded(self.block, x, context) if context.cache is not None else None
        return self.block(x, context, cross) if step is None else step


class Stack(nn.Module):
    """Position, blocks and the final norm of an encoder or a decoder.

    Args:
        config: what to build.
        side: "encoder" or "decoder".
        crossed: whether the blocks read a memory.
    """

    def __init__(self, config: TransformerConfig, *, side: str, crossed: bool) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        if crossed and config.num_decoder_layers is not None:
            depth = config.num_decoder_layers
        self.dropout = config.dropout
        known = {
            "dim": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim or config.hidden_size // config.num_attention_heads,
            "length": config.max_position_embeddings + config.class_token,
            "layers": depth,
            "causal": side == "decoder",
            "vocab": config.vocab_size,
            "grid": (config.image_size // config.patch_size,) * 2 if config.use_grid and config.image_size else None,
        }
        self.position = _shared_position(config, known)
        self.cross_position = _cross_position(config, known) if crossed else None

        def norm(width: int) -> nn.Module:
            return build("norm", config.norm, dim=width)

        self.embedding_norm = norm(config.embedding_size) if config.embedding_norm else None
        self.lift = _lift(config, known, norm)
        sharing = _sharing(config)
        layers, scored = [], False
        for layer in range(depth):
            known["layer"] = layer
            wide = sharing is not None and sharing.wide(layer, depth)
            sizes = known | _wide_sizes(sharing) if wide else known
            on_scores = bool(hooks(self.position) & SCORE_HOOKS)
            own = _own_position(config, sizes) if self.position is None or (wide and on_scores) else None
            mixer = assemble.mixer(config.layer_spec("mixer", layer), position=own, qkv_bias=config.qkv_bias, **sizes)
            cross = assemble.mixer(config.cross_mixer, qkv_bias=config.qkv_bias, **known) if crossed else None
            if cross is not None:
                for module in cross.modules():
                    module.stack = "cross"
                if wide:
                    cross = Narrowed(cross, dim=config.hidden_size, width=sharing.width, norm=norm)
            feedforward = assemble.feedforward(
                config.layer_spec("feedforward", layer),
                hidden=(sharing.hidden if wide else None) or config.intermediate_size,
                **sizes,
            )
            block = build(
                "block",
                config.layer_spec("block", layer),
                mixer=mixer,
                feedforward=feedforward,
                cross=cross,
                norm=norm,
                dropout=config.dropout,
                **sizes,
            )
            needed = (hooks(self.position) | hooks(own)) & SCORE_HOOKS
            scored = scored or bool(needed)
            layers.append(TransformerLayer(block, uses_position=bool(needed) and needed <= mixer.hooks))
        self.layers = nn.ModuleList(layers)
        if scored and not any(layer.uses_position for layer in layers):
            raise UnsupportedContext(
                f"No mixer of {config.mixer!r} uses the position {config.position!r}: it works on attention scores. "
                "Choose a position that is added to the tokens, such as sinusoidal or learned, or none."
            )
        self.adapters = nn.ModuleDict()  # before the first of the wide layers, and before the first behind them
        if sharing is not None and sharing.width is not None:
            narrow, wide = config.hidden_size, sharing.width
            for place, dim, width in ((1, narrow, wide), (depth - 1, wide, narrow)):
                self.adapters[str(place)] = Adapter(dim=dim, width=width, norm=norm, dropout=ADAPTER_DROPOUT)
        self.streams = _streams(layers)
        if self.streams > 1 and self.adapters:
            raise FormwrightError("Reversible blocks have one width: leave out the width of shared layers.")
        self.norm = norm(config.hidden_size) if layers[-1].block.final_norm else None
        for module in self.modules():
            if not hasattr(module, "stack"):
                module.stack = side
        for place, layer in enumerate(self.layers):
            for module in layer.modules():
                module.place = place
        if sharing is not None:
            names = shared_names(self.layers, sharing.owners(depth))
            tie(self.layers, names)
            # where transformers looks for what it saves once and ties again
            self._tied_weights_keys = {f"layers.{name}": f"layers.{owner}" for name, owner in names.items()}
            self.all_tied_weights_keys = self._tied_weights_keys

    @property
    def mixers(self) -> list[nn.Module]:
        """Those of the layers, and behind them the one that lifts the embeddings, where there is one: as a cache has
        them.
        """
        lifting = [] if self.lift is None or self.lift.mixer is None else [self.lift.mixer]
        return [layer.block.mixer for layer in self.layers] + lifting

    def checkpointed(self, *, reentrant: bool = False) -> bool:
        """Whether layers run again in the backward pass, with `reentrant` in torch's older way."""
        return self.training and any(
            layer.gradient_checkpointing
            and (not reentrant or layer._gradient_checkpointing_func.keywords.get("use_reentrant", False))
            for layer in self.layers
        )

    def forward(
        self,
        x: Float[Tensor, "b n r"],  # as wide as the embeddings
        context: Context,
        cross: Context | None = None,
        cache: Cache | None = None,
        hidden_states: list[Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        own_cache, cross_cache = _both(cache)
        if self.lift is not None and self.lift.scale != 1:
            x = x * self.lift.scale
        if self.position is not None and hasattr(self.position, "embed"):
            x = self.position.embed(x, context)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        if self.lift is not None:
            lifting = None if own_cache is None or self.lift.mixer is None else own_cache.layers[len(self.layers)]
            x = self.lift(x, replace(context.at_layer(cache=lifting), attentions=None))
        x = torch.cat([x] * self.streams, -1) if self.streams > 1 else x
        watched = cache is not None or hidden_states is not None or context.attentions is not None
        steps: list[reversible.Step] | None = None
        if self.streams > 1 and self.training and torch.is_grad_enabled() and not watched:
            steps = []  # run at the end, all together
        for i, layer in enumerate(self.layers):
            if str(i) in self.adapters:
                x = self.adapters[str(i)](x)
            if hidden_states is not None:
                hidden_states.append(self._joined(x))
            here = context.at_layer(
                cache=None if own_cache is None else own_cache.layers[i],
                shared_position=self.position if layer.uses_position else None,
            )
            there = None
            if cross is not None:
                there = cross.at_layer(
                    cache=None if cross_cache is None else cross_cache.layers[i], shared_position=self.cross_position
                )
            if steps is None:
                x = layer(x, here, there)
            else:
                steps += layer.block.steps(here, there)
        if steps is not None:
            x = reversible.run(steps, x)
        x = self._joined(x)
        if self.norm is not None:
            x = self.norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x

    def _joined(self, x: Tensor) -> Tensor:
        """The mean of the streams."""
        return x if self.streams == 1 else torch.stack(x.chunk(self.streams, -1)).mean(0)


def _streams(layers: Sequence[TransformerLayer]) -> int:
    found = {getattr(layer.block, "streams", 1) for layer in layers}
    if len(found) > 1:
        raise FormwrightError("Reversible blocks stand in every layer or in none.")
    return found.pop()


def _sharing(config: TransformerConfig) -> Sharing | None:
    if parse_spec(config.sharing)["name"] == "none":
        return None
    return build("sharing", config.sharing, dim=config.hidden_size)


def _wide_sizes(sharing: Sharing) -> dict[str, Any]:
    """What a layer between knows otherwise when it is wider."""
    return {"dim": sharing.width, "heads": sharing.heads, "head_dim": sharing.width // sharing.heads}


def _lift(config: TransformerConfig, known: dict[str, Any], norm: NormFactory) -> nn.Module | None:
    """What takes narrow embeddings to the width of the layers."""
    if parse_spec(config.embedding)["name"] == "none":
        return None

    def make_position(heads: int, head_dim: int) -> nn.Module | None:
        """A position on scores, as the layers have it; one that is added to the tokens is added before the lift."""
        spec = config.layer_spec("position", 0)
        if parse_spec(spec)["name"] == "none":
            return None
        sizes = {"dim": config.embedding_size, "heads": heads, "kv_heads": None, "head_dim": head_dim, "layer": 0}
        position = build("position", spec, **known | sizes)
        return position if hooks(position) & SCORE_HOOKS else None

    given = {"dim": config.hidden_size, "causal": known["causal"], "dropout": config.dropout, "norm": norm}
    return build("embedding", config.embedding, make_position=make_position, **given)


def _shared_position(config: TransformerConfig, known: dict[str, Any]) -> nn.Module | None:
    """The one position of all layers; none when there is no position or each layer has its own. One that is added to
    the tokens is as wide as they are.
    """
    if isinstance(config.position, list) or parse_spec(config.position)["name"] == "none":
        return None
    position = build("position", config.position, **known)
    if "embed" in hooks(position) and config.embedding_size != config.hidden_size:
        position = build("position", config.position, **known | {"dim": config.embedding_size})
    return position if scope(position) == "model" else None


def _cross_position(config: TransformerConfig, known: dict[str, Any]) -> nn.Module | None:
    """The one position of all layers' cross-attention, which sees the memory in both directions.

    Raises:
        UnsupportedContext: one that is added to the tokens.
    """
    if parse_spec(config.cross_position)["name"] == "none":
        return None
    position = build("position", config.cross_position, **{**known, "causal": False})
    if "embed" in hooks(position):
        raise UnsupportedContext(
            f"{config.cross_position!r} is added to the tokens, which cross-attention does not do; give it as position."
        )
    return position


def _own_position(config: TransformerConfig, known: dict[str, Any]) -> nn.Module | None:
    """The position of one layer.

    Raises:
        UnsupportedContext: a list of positions holds one that is added to the tokens, which happens once and not in
            a layer.
    """
    spec = config.layer_spec("position", known["layer"])
    if parse_spec(spec)["name"] == "none":
        return None
    position = build("position", spec, **known)
    if "embed" in hooks(position):
        raise UnsupportedContext(f"{spec!r} is added to the tokens once; give it alone, not in a list of positions.")
    return position


def _both(cache: Cache | None) -> tuple[Cache | None, Cache | None]:
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


class Embeddings(nn.Module):
    """Ids or pixels to tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.embedding_size
        self.tokens = nn.Embedding(config.vocab_size, width) if config.vocab_size else None
        self.types = nn.Embedding(config.type_vocab_size, width) if config.type_vocab_size else None
        self.patches = (
            PatchEmbedding(
                dim=config.hidden_size,
                image_size=config.image_size,
                patch_size=config.patch_size,
                channels=config.num_channels,
            )
            if config.image_size
            else None
        )
        self.class_token = ClassToken(dim=config.hidden_size) if config.class_token else None

    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None,
        token_type_ids: Int[Tensor, "b n"] | None,
        inputs_embeds: Float[Tensor, "b n d"] | None,
        pixel_values: Float[Tensor, "b c h w"] | None,
    ) -> Float[Tensor, "b n d"]:
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "pixel_values": pixel_values}
        present = [name for name, value in given.items() if value is not None]
        if len(present) != 1:
            raise FormwrightError(f"Give the model one of {', '.join(given)}; got {', '.join(present) or 'none'}.")
        if pixel_values is not None:
            if self.patches is None:
                raise FormwrightError("This model reads ids; for images set image_size in its config.")
            patches = self.patches(pixel_values)
            return patches if self.class_token is None else self.class_token(patches)
        if input_ids is not None and self.tokens is None:
            raise FormwrightError("This model reads images; for ids set vocab_size in its config.")
        x = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.types is not None:
            types = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
            x = x + self.types(types if token_type_ids is None else token_type_ids)
        elif token_type_ids is not None and bool(token_type_ids.any()):
            raise FormwrightError(
                "This model knows no token types; set type_vocab_size in its config or leave them out."
            )
        return x


def _tables(config: TransformerConfig) -> int:
    """How many embeddings are summed whose scale is the scheme's: of tokens or patches, of types, of places."""
    position = {} if isinstance(config.position, list) else parse_spec(config.position)
    learned = position.get("name") == "learned" and position.get("std") is None
    return 1 + bool(config.type_vocab_size) + learned


class TransformerPreTrainedModel(PreTrainedModel):
    """What all share: initialisation by the config's scheme, and the places transformers looks at."""

    config: TransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over this batch; the Trainer divides under accumulation
    _no_split_modules = ("TransformerLayer",)
    _supports_sdpa = True
    _input_embed_layer = "tokens"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if type(module).__module__.startswith("torch.nn"):
            self._scheme(module)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Weights by the scheme, then what a scheme decides of a part as a whole (`finish`): transformers hands it no
        module without weights of its own.
        """
        fresh = [module for module in self.modules() if not getattr(module, "_is_hf_initialized", False)]
        super().initialize_weights()
        if hasattr(self._scheme, "finish"):
            for module in fresh:
                self._scheme.finish(module)

    @cached_property
    def _scheme(self) -> Any:
        config = self.config
        paired = config.architecture == "encoder-decoder"
        decoder_layers = (config.num_decoder_layers or config.num_hidden_layers) if paired else config.num_hidden_layers
        return build(
            "init",
            config.init,
            dim=config.hidden_size,
            layers=config.num_hidden_layers,
            encoder_layers=0 if config.architecture == "decoder" else config.num_hidden_layers,
            decoder_layers=0 if config.architecture == "encoder" else decoder_layers,
            dropout=config.dropout,
            tables=_tables(config),
        )

    def _adjust_bias(self, output_embeddings: nn.Module, input_embeddings: Any) -> None:
        """transformers pads the bias of whatever is tied to the length of a vocabulary; shared layers have none."""
        if output_embeddings is self.get_output_embeddings():
            super()._adjust_bias(output_embeddings, input_embeddings)

    def set_attn_implementation(self, attn_implementation: Any, *_args: Any, **_kwargs: Any) -> None:
        raise FormwrightError(
            f"A Formwright Transformer takes its attention from its config: mixer={self.config.mixer!r} now. "
            f"Build it with another mixer instead of setting {attn_implementation!r}."
        )


class TransformerModel(TransformerPreTrainedModel):
    """The body without a head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        paired = config.architecture == "encoder-decoder"
        self.encoder = Stack(config, side="encoder", crossed=False) if config.architecture != "decoder" else None
        self.decoder = Stack(config, side="decoder", crossed=paired) if config.architecture != "encoder" else None
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def main_input_name(self) -> str:
        return "pixel_values" if self.config.image_size else "input_ids"

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.tokens = value

    def new_cache(self, capacity: int = 0) -> Cache:
        """An empty cache for this model.

        Args:
            capacity: tokens to make room for at once.

        Raises:
            UnsupportedContext: a mixer cannot decode step by step, or the model is an encoder.
        """
        if self.decoder is None:
            raise UnsupportedContext("An encoder decodes nothing; build a decoder to use a cache.")
        own = new_cache(self.decoder.mixers, capacity=capacity)
        if self.encoder is None:
            return own
        return EncoderDecoderCache(own, new_cache(layer.block.cross for layer in self.decoder.layers))

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        pixel_values: Float[Tensor, "b c h w"] | None = None,
        decoder_input_ids: Int[Tensor, "b t"] | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> TransformerOutput:
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = [] if asked else None
        asked = self.config.output_attentions if output_attentions is None else output_attentions
        attentions = [] if asked else None
        if self.decoder is None:
            if past_key_values is not None:
                raise UnsupportedContext("An encoder keeps no cache; leave past_key_values out or build a decoder.")
            if decoder_input_ids is not None or encoder_outputs is not None:
                raise UnsupportedContext("An encoder takes input_ids alone; build an encoder-decoder instead.")
            x = self.embeddings(input_ids, token_type_ids, inputs_embeds, pixel_values)
            grid = self._grid(pixel_values)
            context = self._context(x, attention_mask, position_ids, grid=grid, attentions=attentions)
            x = self.encoder(x, context, hidden_states=hidden_states)
            self._check_losses(context)
            return _output(x, context, hidden_states)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        memory, losses = None, {}
        if self.encoder is not None:
            if encoder_outputs is None:
                encoder_outputs = self.encode(
                    input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, pixel_values, losses
                )
            memory = encoder_outputs[0]
            memory_mask, memory_places = attention_mask, position_ids
            input_ids, attention_mask, position_ids = decoder_input_ids, decoder_attention_mask, decoder_position_ids
            token_type_ids = inputs_embeds = pixel_values = None
            if input_ids is None:
                raise FormwrightError("An encoder-decoder needs decoder_input_ids, or labels to make them from.")
        elif decoder_input_ids is not None or encoder_outputs is not None:
            raise UnsupportedContext(
                "A decoder without encoder takes input_ids alone; build an encoder-decoder instead."
            )
        if use_cache and past_key_values is None and self._can_cache():
            past_key_values = self.new_cache()
        if past_key_values is not None and torch.is_grad_enabled() and self.decoder.checkpointed():
            raise FormwrightError(
                "Gradient checkpointing runs a layer twice, and a cache would be written twice: pass use_cache=False "
                "in training, or call gradient_checkpointing_disable()."
            )
        x = self.embeddings(input_ids, token_type_ids, inputs_embeds, pixel_values)
        if past_key_values is not None:
            refuse_other_caches(_both(past_key_values)[0], self.decoder.mixers, batch=x.shape[0])
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        context = self._context(
            x,
            attention_mask,
            position_ids,
            grid=self._grid(pixel_values) if self.encoder is None else None,
            past=past,
            causal=True,
            attentions=attentions,
            losses=losses,
        )
        cross = None
        if memory is not None:
            memory_padding = _padding(memory_mask, *memory.shape[:2])
            cross = Context(
                queries=x.shape[1],
                keys=memory.shape[1],
                padding=memory_padding,
                positions=_positions(memory_places, memory_padding, 0, memory.shape[1], x.device),
                memory=memory,
                query_places=context.query_positions(),
                losses=context.losses,
                attentions=None if attentions is None else [],
                device=x.device,
            )
        x = self.decoder(x, context, cross, past_key_values, hidden_states)
        self._check_losses(context)
        output = _output(x, context, hidden_states)
        output.past_key_values = past_key_values
        output.encoder_last_hidden_state = memory
        output.cross_attentions = None if cross is None or cross.attentions is None else tuple(cross.attentions)
        return output

    def encode(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Int[Tensor, "b n"] | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        pixel_values: Float[Tensor, "b c h w"] | None = None,
        losses: dict[str, Tensor] | None = None,
    ) -> BaseModelOutput:
        """The encoder's side alone: last_hidden_state (b, n, d). Its extra losses go into `losses`."""
        x = self.embeddings(input_ids, token_type_ids, inputs_embeds, pixel_values)
        grid = self._grid(pixel_values)
        context = self._context(x, attention_mask, position_ids, grid=grid, losses=losses)
        return BaseModelOutput(last_hidden_state=self.encoder(x, context))

    def _check_losses(self, context: Context) -> None:
        stacks = [stack for stack in (self.encoder, self.decoder) if stack is not None]
        if context.losses and torch.is_grad_enabled() and any(stack.checkpointed(reentrant=True) for stack in stacks):
            raise FormwrightError(
                f"Reentrant checkpointing loses the gradient of the extra losses {', '.join(context.losses)}: "
                "leave use_reentrant out of the gradient checkpointing arguments, or set it to False."
            )

    def _can_cache(self) -> bool:
        return all(mixer.cache_kind is not None for mixer in self.decoder.mixers)

    def _grid(self, pixel_values: Tensor | None) -> tuple[int, int] | None:
        """What the parts are told the patches lie on.

        Raises:
            UnsupportedContext: images of another size than the config's, and parts that only know that size.
        """
        patches = self.embeddings.patches
        if patches is None:
            return None
        grid = patches.grid if pixel_values is None else patches.grid_of(pixel_values)
        if grid != patches.grid:
            stack = self.encoder or self.decoder
            positions = [stack.position, *(getattr(mixer, "position", None) for mixer in stack.mixers)]
            fixed = [one for one in positions if one is not None and not getattr(one, "any_grid", False)]
            if fixed or not self.config.use_grid:
                side, patch = self.config.image_size, self.config.patch_size
                because = f"{type(fixed[0]).__name__} is set to that size" if fixed else "the parts are told no grid"
                raise UnsupportedContext(
                    f"The model reads images of {side} x {side}, got {grid[0] * patch} x {grid[1] * patch}: {because}. "
                    'For any size set use_grid=True with block="cpvt" and position="none", or resize the images.'
                )
        return grid if self.config.use_grid else None

    def _context(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        *,
        grid: tuple[int, int] | None,
        past: int = 0,
        causal: bool = False,
        attentions: list[Tensor] | None = None,
        losses: dict[str, Tensor] | None = None,
    ) -> Context:
        keys = past + x.shape[1]
        padding = _padding(attention_mask, x.shape[0], keys)
        return Context(
            queries=x.shape[1],
            keys=keys,
            causal=causal,
            padding=padding,
            positions=_positions(position_ids, padding, past, keys, x.device),
            grid=grid,
            losses={} if losses is None else losses,
            attentions=attentions,
            device=x.device,
        )


def _output(x: Tensor, context: Context, hidden_states: list[Tensor] | None) -> TransformerOutput:
    return TransformerOutput(
        last_hidden_state=x,
        hidden_states=None if hidden_states is None else tuple(hidden_states),
        attentions=None if context.attentions is None else tuple(context.attentions),
        extra_losses=dict(context.losses) or None,  # a checkpointed layer that runs again adds to the context's
    )


def _padding(attention_mask: Tensor | None, batch: int, keys: int) -> Bool[Tensor, "b k"] | None:
    """The mask as True = real; none when it hides nothing, which only untraced code can ask."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, keys):
        raise FormwrightError(
            f"attention_mask must be ({batch}, {keys}), one entry for every token including cached ones, "
            f"got {tuple(attention_mask.shape)}."
        )
    real = attention_mask.bool()
    return None if not torch.compiler.is_compiling() and bool(real.all()) else real


def _positions(
    position_ids: Tensor | None, padding: Tensor | None, past: int, keys: int, device: torch.device
) -> Int[Tensor, "b k"] | None:
    """Where every key stands, counting real tokens; none when that is 0, 1, 2, ... in every row.

    The cached tokens' positions follow from the padding, as transformers' `generate` counts them.
    """
    traced = torch.compiler.is_compiling()
    plain = torch.arange(keys, device=device)[None]
    if padding is None:
        every = plain
    elif not traced and bool((padding[:, 1:] <= padding[:, :-1]).all()):
        every = plain  # padding on the right moves no real token
    else:
        every = (padding.long().cumsum(-1) - 1).clamp(min=0)
    if position_ids is not None:
        if position_ids.shape[-1] != keys - past:
            raise FormwrightError(
                f"position_ids must have one entry for each of the {keys - past} tokens, "
                f"got {tuple(position_ids.shape)}."
            )
        if past:
            rows = max(len(position_ids), len(every))
            position_ids = torch.cat([every[:, :past].expand(rows, -1), position_ids.expand(rows, -1)], dim=1)
        every = position_ids
    if every is plain or (not traced and bool((every == plain).all())):
        return None
    return every
