"""Builds the byte-level BPE tokenizer: any text round-trips, and each name is one token."""

from data import NAMES
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"

# Every message ends with a newline, and an answer with the end token before it. There is no role marker:
# a list in the system message and one in the user message render to the same text.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or message['role'] == 'assistant' or add_generation_prompt %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)

# A name is the same token wherever it stands, so the space before it goes to the punctuation ahead of it,
# or stands alone. Digits come one at a time, the first of a number with its space.
SPLIT = r"\p{L}+| ?\p{N}|[^\s\p{L}\p{N}]+ ?|\s"


def build_tokenizer(context_length: int) -> PreTrainedTokenizerFast:
    """Learn merges until every word of the training text is a single token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = NAMES + ["Codes", "Code", "code", "What", "is", "the", "of", ": ", ", ", ". "]
    words += [f" {digit}" for digit in range(10)]
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
