"""What the parts of this library need to know about a base model; `probe` finds it out."""

from dataclasses import dataclass

from softprompt.config import KVConfig
from softprompt.errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class LayerShape:
    """Key and value shape of one attention layer, for one token; `window` is its sliding window, if any."""

    heads: int
    key_size: int
    value_size: int
    window: int | None = None


@dataclass(frozen=True)
class Geometry:
    """What a probe forward pass found out about a base model (never read from a list of config key names).

    `layers` are the self-attention layers (on encoder-decoders the decoder's; `cross_layers` and `encoder_layers` are
    the others), `hidden_size` the width of the input embeddings, `context` the number of tokens that have a position.
    `foldable`: a prompt in front leaves nothing but keys and values, so it can be computed once for all rows.
    `divides_loss`: the model's loss is the sum over labels, divided by `num_items_in_batch` where that is given.
    """

    layers: tuple[LayerShape, ...]
    hidden_size: int
    query_heads: int
    causal: bool
    context: int | None
    learned_positions: bool
    position_offset: int
    foldable: bool = True
    divides_loss: bool = False
    encoder_decoder: bool = False
    cross_layers: tuple[LayerShape, ...] = ()
    encoder_layers: tuple[LayerShape, ...] = ()
    no_prefix: str = ""
    """Why keys and values cannot reach this model, if they cannot."""
    no_vectors: str = ""
    """Why vectors cannot stand in its input, if they cannot."""

    def prefix_layers(self, config: KVConfig) -> tuple[LayerShape, ...]:
        """The attention layers a prefix reaches: decoder (or only) self-attention, cross-attention, encoder.

        Raises UnsupportedError where nothing attends, ConfigError for parts the model does not have.
        """
        if self.no_prefix:
            raise UnsupportedError(f"{self.no_prefix}; use prompt_tuning or p_tuning.")
        if config.prefix_always_visible and not any(layer.window for layer in self.layers):
            raise ConfigError(
                "prefix_always_visible is for models with a sliding window, which no layer here that takes a prefix "
                "has; leave it unset."
            )
        if not self.encoder_decoder and (config.cross_prefix or config.encoder_prefix or not config.decoder_prefix):
            raise ConfigError(
                "decoder_prefix, cross_prefix and encoder_prefix choose between the attentions of an encoder-decoder, "
                "which this model is not; leave them unset."
            )
        return (
            (self.layers if config.decoder_prefix else ())
            + (self.cross_layers if config.cross_prefix else ())
            + (self.encoder_layers if config.encoder_prefix else ())
        )
