"""`TiedLSTMForCausalLM`: the LSTM language model of Zaremba, Press & Wolf, Inan and Merity."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin, utils
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from hf_tying.projection.penalty import share_of_update
from hf_tying.ties.modeling import TiedModelMixin

from .configuration_lstm import TiedLSTMConfig
from .dropout import drop, drop_words, locked_mask
from .layer import LSTMLayer
from .state import LayerState, check_state, state_rows


@dataclass
class TiedLSTMModelOutput(ModelOutput):
    """The output of `TiedLSTMModel`.

    Args:
        last_hidden_state: (batch, time, width of the last layer), after dropout.
        state: last output and cell of each layer, each (batch, width), without dropout. Pass it on with the next piece
            of the same texts.
        hidden_states: vectors that were looked up, and outputs of all layers, without dropout. Only on request.
    """

    last_hidden_state: torch.FloatTensor | None = None
    state: tuple[LayerState, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class TiedLSTMOutput(ModelOutput):
    """The output of `TiedLSTMForCausalLM`.

    Args:
        loss: scalar, if there are labels.
        logits: (batch, time, words).
        state: see `TiedLSTMModelOutput`.
        hidden_states: see `TiedLSTMModelOutput`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    state: tuple[LayerState, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None


class TiedLSTMPreTrainedModel(TiedModelMixin, PreTrainedModel):
    """The base class: config class and initial values."""

    config: TiedLSTMConfig
    config_class = TiedLSTMConfig
    base_model_prefix = "lstm"
    _is_stateful = True
    _no_split_modules = ["LSTMLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        scale = self.config.initializer_range
        if isinstance(module, LSTMLayer):
            recurrent = self.config.recurrent_initializer_range
            recurrent = module.hidden_size**-0.5 if recurrent is None else recurrent
            init.uniform_(module.weight_ih_l0, -recurrent, recurrent)
            init.uniform_(module.weight_hh_l0, -recurrent, recurrent)
            init.zeros_(module.bias_ih_l0)
            init.zeros_(module.bias_hh_l0)
        elif isinstance(module, nn.Linear | nn.Embedding):
            init.uniform_(module.weight, -scale, scale)
            if getattr(module, "bias", None) is not None:
                is_output = module.out_features == self.config.vocab_size
                if self.config.zero_output_bias and is_output:
                    init.zeros_(module.bias)
                else:
                    init.uniform_(module.bias, -scale, scale)


class TiedLSTMModel(TiedLSTMPreTrainedModel):
    """The embedding and the layers, without the softmax."""

    def __init__(self, config: TiedLSTMConfig) -> None:
        super().__init__(config)
        widths = [config.embedding_size, *config.layer_widths]
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.layers = nn.ModuleList(LSTMLayer(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        state: tuple[LayerState, ...] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TiedLSTMModelOutput | tuple:
        """Run all layers over a piece of text.

        Args:
            input_ids: (batch, time), int64.
            attention_mask: (batch, time), 0 for padding, which does not change the state. A longer mask belongs to a
                whole text of which `input_ids` is the end. Default: no padding.
            inputs_embeds: (batch, time, embedding_size), in place of `input_ids`.
            state: state after the previous piece of the same texts. It is not detached. Default: zeros.
            use_cache: whether to return the state. Default: `config.use_cache`.
            output_hidden_states: whether to return the outputs of all layers. Default: `config.output_hidden_states`.
            return_dict: whether to return a `ModelOutput` in place of a tuple. Default: `config.return_dict`.
            **kwargs: arguments of other models, which are ignored.

        Returns:
            A `TiedLSTMModelOutput`, or a tuple of its values.

        Raises:
            ValueError: if both or neither of `input_ids` and `inputs_embeds` are given.
            TyingError: if the state has a different batch size, or belongs to another model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected either input_ids or inputs_embeds.")
        config, rate = self.config, self._rate
        locked = config.dropout_kind == "variational"
        hidden = inputs_embeds
        if hidden is None:
            hidden = self.embed_tokens(input_ids)
            hidden = drop_words(hidden, input_ids, len(self.embed_tokens.weight), rate("embedding_dropout"))
        if state is None:
            state = self.initial_state(len(hidden), hidden)
        check_state(state, len(hidden), self.config.layer_widths)
        attended = None
        if attention_mask is not None and not (attention_mask := attention_mask[:, -hidden.shape[1] :]).all():
            attended = attention_mask.bool()

        all_hidden, last_states = [hidden], []
        hidden = drop(hidden, rate("input_dropout"), locked=locked)
        for layer, before in zip(self.layers, state, strict=True):
            name = "output_dropout" if layer is self.layers[-1] else "hidden_dropout"
            width = before[0]
            above = locked_mask(width, rate(name)) if locked and rate(name) else None
            beside = locked_mask(width, rate("recurrent_dropout")) if rate("recurrent_dropout") else None
            beside = above if config.shared_recurrent_mask else beside
            hidden, after = layer(hidden, before, beside, rate("weight_dropout"), attended)
            all_hidden.append(hidden)
            last_states.append(after)
            hidden = drop(hidden, rate(name), above, locked)

        use_cache = config.use_cache if use_cache is None else use_cache
        show = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = TiedLSTMModelOutput(
            last_hidden_state=hidden,
            state=tuple(last_states) if use_cache else None,
            hidden_states=tuple(all_hidden) if show else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def initial_state(self, batch: int, like: torch.Tensor | None = None) -> tuple[LayerState, ...]:
        """Make the state at the beginning of a text: zeros.

        Args:
            batch: number of texts.
            like: tensor whose dtype and device the state has. Default: the embedding.

        Returns:
            Output and cell of each layer, each (batch, width).
        """
        like = self.embed_tokens.weight if like is None else like
        return tuple(
            (like.new_zeros(batch, width), like.new_zeros(batch, width)) for width in self.config.layer_widths
        )

    def _rate(self, name: str) -> float:
        return getattr(self.config, name) if self.training else 0.0


class TiedLSTMForCausalLM(TiedLSTMPreTrainedModel, GenerationMixin):
    """The LSTM language model, tied or untied, with or without an output bias.

    `config.tying` can add a projection before the softmax (PR), and the tied softmax.

    As in all models of transformers, `labels` may be `input_ids`: the model shifts them, and predicts one word less
    than it reads. `shift_labels` are the next words themselves, so that no word is lost between the pieces of a text.

    Args:
        config: sizes, dropout and ties.

    Example:
        >>> model = TiedLSTMForCausalLM(TiedLSTMConfig.named("zaremba_small"))
        >>> model.num_parameters()
        2651600
        >>> first = model(input_ids=ids[:, :20], shift_labels=ids[:, 1:21])
        >>> second = model(input_ids=ids[:, 20:40], shift_labels=ids[:, 21:41], state=first.state)
    """

    _tied_weights_keys = {"lm_head.weight": "lstm.embed_tokens.weight"}

    def __init__(self, config: TiedLSTMConfig) -> None:
        super().__init__(config)
        self.lstm = TiedLSTMModel(config)
        self.lm_head = nn.Linear(config.layer_widths[-1], config.vocab_size, bias=config.output_bias)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        state: tuple[LayerState, ...] | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TiedLSTMOutput | tuple:
        """Compute the logits, and the loss if there are labels.

        Args:
            input_ids: (batch, time), int64; see `TiedLSTMModel.forward`.
            attention_mask: (batch, time); see `TiedLSTMModel.forward`.
            inputs_embeds: (batch, time, embedding_size); see `TiedLSTMModel.forward`.
            state: state after the previous piece; see `TiedLSTMModel.forward`.
            labels: (batch, time), int64. The word at position t is predicted from the words before it; -100 is left
                out.
            use_cache: whether to return the state. Default: `config.use_cache`.
            output_hidden_states: whether to return the outputs of all layers. Default: `config.output_hidden_states`.
            logits_to_keep: number of the last positions whose logits are computed, or their indices. Default 0, which
                means all positions.
            return_dict: whether to return a `ModelOutput` in place of a tuple. Default: `config.return_dict`.
            **kwargs: `shift_labels`, (batch, time), the word after each position, in place of `labels`; -100 is left
                out. It is not a named argument, as in transformers' own models, because `Trainer` evaluates a batch
                only if the batch has all arguments that are named like labels. `num_items_in_batch`: divisor of the
                sum of the losses. `penalty_share`: share of this pass in an update, which weights the penalties
                (`share_of_update`).

        Returns:
            A `TiedLSTMOutput`, or a tuple of its values.
        """
        vars(self).pop("loss_parts", None)  # those of the previous step
        config = self.config
        regularised = config.activation_regularization or config.temporal_activation_regularization
        show = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.lstm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            state=state,
            use_cache=use_cache,
            output_hidden_states=show or bool(self.training and regularised),
            return_dict=True,
        )
        hidden, shift_labels = outputs.last_hidden_state, kwargs.get("shift_labels")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept, :])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),
                vocab_size=logits.shape[-1],
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
            if self.training and regularised:
                predicted = labels[:, 1:] if shift_labels is None else shift_labels
                penalty = self._activation_penalty(hidden, outputs.hidden_states[-1])
                penalty = penalty * share_of_update(predicted, kwargs)
                self.loss_parts = {"cross_entropy": loss.detach(), "activation": penalty.detach()}
                loss = loss + penalty
        output = TiedLSTMOutput(
            loss=loss,
            logits=logits,
            state=outputs.state,
            hidden_states=outputs.hidden_states if show else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _activation_penalty(self, dropped: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """AR of the last output after dropout, plus TAR of it before dropout (Merity et al. 2017 section 4.6)."""
        penalty = self.config.activation_regularization * dropped.float().square().mean()
        if outputs.shape[1] > 1:
            steps = outputs[:, 1:].float() - outputs[:, :-1].float()
            penalty = penalty + self.config.temporal_activation_regularization * steps.square().mean()
        return penalty

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Tell `generate` to make no cache of keys and values. The cache of this model is `state`."""
        return False

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        state: tuple[LayerState, ...] | None = None,
        cache: tuple[LayerState, ...] | None = None,
        is_first_iteration: bool = False,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict:
        """Choose the inputs of one step of `generate`.

        The first step reads the whole prompt, after the text that a given `state` has read. Each later step reads the
        new words.

        Args:
            input_ids: (batch, time), int64, the prompt and all words so far.
            next_sequence_length: number of words that have not been read yet.
            attention_mask: (batch, time), 0 for padding.
            inputs_embeds: (batch, time, embedding_size), the prompt in place of its words.
            state: state after the words that have been read.
            cache: the same state, under the only name that later versions of transformers pass on.
            is_first_iteration: whether nothing has been read yet.
            use_cache: whether the model returns its state.
            **kwargs: arguments of other models, which are ignored.

        Returns:
            The keyword arguments of `forward`.
        """
        inputs = {"attention_mask": attention_mask, "state": state if cache is None else cache, "use_cache": use_cache}
        if is_first_iteration and inputs_embeds is not None:
            return inputs | {"inputs_embeds": inputs_embeds}
        if is_first_iteration or next_sequence_length is None:
            return inputs | {"input_ids": input_ids}
        return inputs | {"input_ids": input_ids[:, -next_sequence_length:]}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> dict:
        """Pass the state on by the name that this version of transformers keeps and reorders."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.get("state") is not None:
            model_kwargs.pop("state", None)
            model_kwargs["state" if "state" in utils.ALL_CACHE_NAMES else "cache"] = outputs.state
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, state: tuple[LayerState, ...] | None = None, **kwargs: Any
    ) -> tuple:
        """Repeat the rows of a given state, one for each beam or each returned sequence."""
        input_ids, model_kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)
        if state is not None:
            check_state(state, len(input_ids) // expand_size, self.config.layer_widths)
            rows = torch.arange(len(state[0][0])).repeat_interleave(expand_size)
            model_kwargs["state"] = state_rows(state, rows)
        return input_ids, model_kwargs

    @staticmethod
    def _reorder_cache(state: tuple[LayerState, ...], beam_idx: torch.LongTensor) -> tuple[LayerState, ...]:
        return state_rows(state, beam_idx)
