"""What one rank holds of a model. Loads no torch.

KV heads and layers follow `core.kv_layout`, and so does the order of ranks. Query heads lie with their KV head,
the inner size of a feed-forward and the vocabulary are cut into equal runs by tensor rank. Experts:

    expert_parallel 1               each is cut like a feed-forward, and held by every data-parallel rank
    data * tensor parallelism       each lies whole on one rank: a tensor rank has a run of them, which is
                                    spread over the data-parallel ranks of that tensor rank, its *column*
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from diptych.core.errors import ConfigError
from diptych.core.kv_layout import KVLayout
from diptych.engine.torch_engine.config import ExpertsConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of a model that is cut as `layout` says. Raises ConfigError if it cannot be."""

    config: ModelConfig
    layout: KVLayout
    rank: int = 0

    def __post_init__(self) -> None:
        _check_cut(self.config, self.layout)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.layout.tensor_parallel

    @property
    def stage(self) -> int:
        return self.rank // self.layout.tensor_parallel % self.layout.pipeline_parallel

    @property
    def data_rank(self) -> int:
        return self.rank // (self.layout.tensor_parallel * self.layout.pipeline_parallel)

    @property
    def is_first(self) -> bool:
        """Whether its stage turns tokens into vectors."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether its stage turns vectors into logits."""
        return self.stage == self.layout.pipeline_parallel - 1

    @property
    def samples(self) -> bool:
        """Whether it is the one that chooses its data-parallel rank's tokens."""
        return self.is_last and self.tensor_rank == 0

    @property
    def layers(self) -> range:
        return self.layout.layers_of(self.rank)

    @property
    def kv_heads(self) -> range:
        return self.layout.heads_of(self.rank)

    @property
    def query_heads(self) -> range:
        return self.part(self.config.num_heads)

    @property
    def vocabulary(self) -> range:
        """The tokens whose logits are computed here. All tensor ranks have equally many; what does not divide
        evenly is filled up past the vocabulary's end."""
        size = -(-self.config.vocab_size // self.layout.tensor_parallel)
        return range(self.tensor_rank * size, (self.tensor_rank + 1) * size)

    def part(self, size: int) -> range:
        """This tensor rank's run of something that is cut evenly."""
        share = size // self.layout.tensor_parallel
        return range(self.tensor_rank * share, (self.tensor_rank + 1) * share)

    @property
    def spreads_experts(self) -> bool:
        """Whether experts lie whole on ranks, instead of being cut."""
        return self.layout.expert_parallel > 1

    def column_experts(self, experts: ExpertsConfig) -> range:
        """The experts that this tensor rank sees to, together with those of other data-parallel ranks."""
        return self.part(experts.num_experts) if self.spreads_experts else range(experts.num_experts)

    def experts(self, experts: ExpertsConfig) -> range:
        """The experts that lie here."""
        column = self.column_experts(experts)
        if not self.spreads_experts:
            return column
        share = len(column) // self.layout.data_parallel
        return column[self.data_rank * share : (self.data_rank + 1) * share]

    @property
    def own_config(self) -> ModelConfig:
        """The config of the model that this rank computes: its own heads."""
        return replace(self.config, num_heads=len(self.query_heads), num_kv_heads=len(self.kv_heads))

    @property
    def own_layout(self) -> KVLayout:
        """The layout of this rank's KV, seen on its own: its own layers and heads, counted from 0."""
        return KVLayout(
            num_layers=len(self.layers),
            num_kv_heads=len(self.kv_heads),
            head_dim=self.layout.head_dim,
            dtype=self.layout.dtype,
            block_size=self.layout.block_size,
        )


def _check_cut(config: ModelConfig, layout: KVLayout) -> None:
    """KV heads and layers are the layout's own business."""
    tensor, spread = layout.tensor_parallel, layout.expert_parallel
    if config.num_heads % tensor:
        raise ConfigError(f"{config.num_heads} attention heads cannot be cut evenly for {tensor} tensor ranks")
    experts = config.experts
    sparse = experts.layers if experts is not None else ()
    if len(sparse) < config.num_layers and config.intermediate_size % tensor:
        raise ConfigError(f"an intermediate size of {config.intermediate_size} cannot be cut for {tensor} tensor ranks")
    if experts is None or not sparse:
        if spread > 1:
            raise ConfigError(f"expert parallelism {spread} is for mixtures of experts; this model has none")
    elif spread > 1 and experts.num_experts % spread:
        raise ConfigError(f"{experts.num_experts} experts cannot be spread evenly over {spread} ranks")
    elif spread == 1 and experts.intermediate_size % tensor:
        raise ConfigError(
            f"experts of intermediate size {experts.intermediate_size} cannot be cut for {tensor} tensor ranks; "
            "expert parallelism would leave them whole"
        )
