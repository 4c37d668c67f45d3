"""What a list-wise ranker is made of, as plain values."""

from typing import Any

from transformers import PreTrainedConfig

from .counts import counted


HEADS = ("none", "own", "tied")
LARGEST = {"num_hidden_layers": 1000, "head_layers": 1000}
COUNTS = (
    "hidden_size",
    "input_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "predictor_size",
    "head_layers",
    "label_channels",
)


class ListwiseRankerConfig(PreTrainedConfig):
    """Configuration of a `ListwiseRanker`.

    Args:
        input_size: width of the tokens that come in; default: d. Another width goes through a linear layer.
        hidden_size: width d inside.
        num_hidden_layers: blocks of the trunk, which sees all tokens.
        num_attention_heads: of each block.
        intermediate_size: width of each block's MLP; default: d.
        predictor_size: hidden width of the net that makes a score of an item's token.
        layer_norm_eps: of every LayerNorm.
        head: blocks that the first tokens of the images, alone, pass after the trunk: "none"; "own", `head_layers` of
            their own; or "tied", those of the trunk once more.
        head_layers: of head="own".
        role: whether a learned vector tells the query from the candidates.
        bind: whether each image's other tokens are told its first one.
        label_channels: channels of the candidates' labels; None: the ranker does not look at labels.
        legacy: the released network: head="tied", role=False, bind=False, label_channels=None, whatever is passed.
        list_length: length k of the lists that it was trained on; it ranks lists of any length.
        sort_weight: of NeuralNDCG in the loss.
        sort_temperature: of NeuralNDCG.
        margin: of the pairwise margin, whose weight is 1.
        mse_weight: of the squared error between score and metric.
        encoder: `VisionEncoder.describe()` of the encoder that `pixels` go through; its weights are not stored here.
        encoder_fingerprint: of the encoder whose tokens it was trained on.
        pool_fingerprint: of the pool that it was trained on, for the records.
    """

    model_type = "effdl-listwise-ranker"

    input_size: int | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 3
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    predictor_size: int = 128
    layer_norm_eps: float = 1e-6
    head: str = "none"
    head_layers: int = 2
    role: bool = True
    bind: bool = True
    label_channels: int | None = 3
    legacy: bool = False
    list_length: int = 5
    sort_weight: float = 0.5
    sort_temperature: float = 1.0
    margin: float = 1.0
    mse_weight: float = 0.0
    encoder: dict[str, Any] | None = None
    encoder_fingerprint: str | None = None
    pool_fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.input_size = self.hidden_size if self.input_size is None else self.input_size
        self.intermediate_size = self.hidden_size if self.intermediate_size is None else self.intermediate_size
        if self.legacy:
            self.head, self.role, self.bind, self.label_channels = "tied", False, False, None
        self._check_counts()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} cannot be divided among num_attention_heads="
                f"{self.num_attention_heads}: change one of them"
            )
        if self.head not in HEADS:
            raise ValueError(f"head={self.head!r}: choose one of {HEADS}")
        if self.legacy and self.input_size != self.hidden_size:
            raise ValueError(
                f"legacy=True takes tokens as they are, but input_size={self.input_size} is not "
                f"hidden_size={self.hidden_size}: make them equal"
            )
        super().__post_init__(**kwargs)

    def _check_counts(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if name == "label_channels" and value is None:
                continue
            setattr(self, name, counted(name, value))
            if value > LARGEST.get(name, 2**20):
                raise ValueError(f"{name}={value!r}: no ranker is as large")
        self.list_length = counted("list_length", self.list_length)
        if self.list_length < 2:
            raise ValueError(f"list_length={self.list_length!r}: a list has two items or more")


ListwiseRankerConfig.register_for_auto_class()
