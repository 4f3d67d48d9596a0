"""The engine that computes: Hugging Face checkpoints in torch over a paged KV cache.

runner           TorchEngine: all of a model in this process
parallel_engine  ParallelEngine: a model cut into ranks, in processes that this one leads
checkpoint       a model directory and how it is served
config           config.json -> ModelConfig
shard            what one rank holds of a model
weight_files     safetensors: found, checked, read in part
tensor_names     what each family calls its tensors
weights          a shard's ModelWeights
stage            a shard's part in every step, from batch to tokens
model            the decoder; knows nothing of paging, batching or ranks
mlp              the dense feed-forward
experts          the sparse one: router, grouping by expert, weighted sum; experts on other ranks
linear           projections
rope             rotary embeddings and their scalings
plan             batch -> index tensors of one step
dense_view       contexts of decoding sequences, kept in one piece from step to step
attention        the one attention entry
narrowing        rows that leave a running step
kv_cache         blocks as tensors
sampler          logits -> tokens
penalties        what the sampler remembers of a log
links            a rank's ties to others: collectives
rank             a rank process
rank_processes   all of them, as the leader sees them
rank_messages    what they tell each other
mirror           sequences in two places
"""
