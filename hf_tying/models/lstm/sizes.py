"""The models of the papers by name: widths, initial values and dropout rates, as keywords of `TiedLSTMConfig`.

Sources: Zaremba et al. 2014 sections 4.1 and 4.2 (also the small and the large model of Press & Wolf 2016); Inan et
al. 2016 section 5, with Zaremba's widths; Merity et al. 2017 section 5, with the rates of the released code for
WikiText-2. `hf_tying.training.recipes` says how the models are trained.
"""


def _zaremba(width: int, scale: float, dropout: float) -> dict:
    return {
        "embedding_size": width,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "initializer_range": scale,
        "recurrent_initializer_range": scale,
        "dropout_kind": "standard",
        "input_dropout": dropout,
        "hidden_dropout": dropout,
        "output_dropout": dropout,
    }


def _inan(width: int, scale: float, dropout: float) -> dict:
    """A model with one mask for the output of each layer, both towards the next layer and towards the next step."""
    return _zaremba(width, scale, dropout) | {"dropout_kind": "variational", "shared_recurrent_mask": True}


# The text of the paper that was used does not state Inan's rates. These are the settings of another implementation for
# the Penn Treebank (icoxfog417's tying-wv-and-wc), read as shares to keep.
SIZES: dict[str, dict] = {
    "zaremba_small": _zaremba(200, 0.1, 0.0),
    "zaremba_medium": _zaremba(650, 0.05, 0.5),
    "zaremba_large": _zaremba(1500, 0.04, 0.65),
    "inan_small": _inan(200, 0.1, 0.3),
    "inan_medium": _inan(650, 0.05, 0.5),
    "inan_large": _inan(1500, 0.04, 0.65),
    "awd": {
        "embedding_size": 400,
        "hidden_size": 1150,
        "num_hidden_layers": 3,
        "initializer_range": 0.1,
        "recurrent_initializer_range": None,
        "zero_output_bias": True,
        "dropout_kind": "variational",
        "embedding_dropout": 0.1,
        "input_dropout": 0.65,
        "hidden_dropout": 0.2,
        "output_dropout": 0.4,
        "weight_dropout": 0.5,
        "activation_regularization": 2.0,
        "temporal_activation_regularization": 1.0,
    },
}
