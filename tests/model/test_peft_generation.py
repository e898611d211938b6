"""Generation with rethinking: neither the kind of cache, nor padding, nor the batch may change the tokens."""

import pytest
import torch
from peft import PeftModel

from tests.model.tiny_models import PADDING, tiny_peft_model, tokens

MODELS = ["llama", "gemma2", "phi3"]
STEPS = 12


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> PeftModel:
    """Three rounds, and every weight counts, W_g too."""
    return tiny_peft_model(request.param, init_lora_weights=False).eval()


def generate(model: PeftModel, ids: torch.Tensor, **settings) -> torch.Tensor:
    """The new tokens, greedily, always `STEPS` of them."""
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **settings}
    return model.generate(input_ids=ids, **settings)[:, ids.shape[1] :]


def test_the_cache_does_not_change_the_tokens(model):
    """Dynamic, static, and none."""
    ids = tokens(batch=3)
    dynamic = generate(model, ids)
    assert torch.equal(generate(model, ids, cache_implementation="static"), dynamic)
    assert torch.equal(generate(model, ids, use_cache=False), dynamic)


def test_left_padding_and_batching_do_not_change_the_tokens(model):
    """Sequences of 3, 7 and 5 tokens together give what each gives alone."""
    sequences = [tokens(batch=1, length=length, seed=length) for length in (3, 7, 5)]
    longest = max(s.shape[1] for s in sequences)
    ids = torch.full((3, longest), PADDING)
    for row, sequence in zip(ids, sequences, strict=True):
        row[longest - sequence.shape[1] :] = sequence[0]
    together = generate(model, ids, attention_mask=(ids != PADDING).long())
    alone = torch.cat([generate(model, sequence) for sequence in sequences])
    assert torch.equal(together, alone)


def test_later_rounds_change_the_tokens(model):
    """The tests above would also pass on a model that skips the rethinking: without W_g all rounds are the first."""
    three = generate(model, tokens(batch=3))
    outputs = {name: p for name, p in model.named_parameters() if name.endswith("gru.output_proj.weight")}
    assert outputs
    kept = {name: p.detach().clone() for name, p in outputs.items()}
    with torch.no_grad():
        for p in outputs.values():
            p.zero_()
        one = generate(model, tokens(batch=3))
        for name, p in outputs.items():
            p.copy_(kept[name])
    assert not torch.equal(three, one)


def test_beam_search_and_sampling_run(model):
    """Beams reorder the cache, and the layer keeps no state between tokens."""
    ids = tokens()
    assert generate(model, ids, num_beams=3).shape == (2, STEPS)
    torch.manual_seed(3)
    first = generate(model, ids, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(generate(model, ids, do_sample=True), first)
