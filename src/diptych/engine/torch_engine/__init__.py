"""The engine that computes: Hugging Face checkpoints in torch over a paged KV cache.

runner        TorchEngine: one step from batch to tokens
config        config.json -> ModelConfig
weights       safetensors -> ModelWeights
tensor_names  what each family calls its tensors
model         the decoder; knows nothing of paging or batching
mlp           the dense feed-forward
experts       the sparse one: router, grouping by expert, weighted sum
rope          rotary embeddings and their scalings
plan          batch -> index tensors of one step
dense_view    contexts of decoding sequences, kept in one piece from step to step
attention     the one attention entry
kv_cache      blocks as tensors
sampler       logits -> tokens
"""
