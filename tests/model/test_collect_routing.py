"""collect_routing: which experts the tokens of any forward went to, counted once, padding left out."""

from __future__ import annotations

import pytest
import torch

from graphmoe_model import collect_routing
from graphmoe_model.routing.expert_load import ExpertLoad
from tests.model.test_router_loss import IDS, LEFT_PADDED, ffn_layers
from tests.model.tiny_models import tiny_config, tiny_model, tiny_peft_model


def test_collect_counts_every_choice_once():
    """T * k choices a token, summed over forwards, in evaluation without a graph; the record is by layer and round."""
    model = tiny_peft_model(rounds=3, top_k=2).eval()
    with torch.inference_mode(), collect_routing(model) as routing:
        model(input_ids=IDS, attention_mask=LEFT_PADDED)
        model(input_ids=IDS)
    kept = int(LEFT_PADDED.sum()) + IDS.numel()
    assert list(routing.counts) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for counts in routing.counts.values():
        assert counts.dtype == torch.int64
        assert counts.shape == (3, 4)
        assert counts.sum(dim=1).tolist() == [2 * kept] * 3
    for share in routing.load().values():
        torch.testing.assert_close(share.sum(dim=1), torch.ones(3, dtype=torch.float64))


def test_collect_equals_what_the_layer_chose():
    """Counts against the router's own top-k on the layer's inputs."""
    model = tiny_peft_model(rounds=1).eval()
    layer, seen = ffn_layers(model)[1], []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad(), collect_routing(model) as routing:
        model(input_ids=IDS)
        logits = seen[0] @ layer.lora_graphmoe["default"].router.weight.T
    chosen = logits.topk(2).indices.flatten()
    assert routing.counts["model.layers.1.mlp"].tolist() == [torch.bincount(chosen, minlength=4).tolist()]


def test_collect_during_generate():
    """Every prompt token and every generated one that was fed back, padding left out at each step."""
    model = tiny_peft_model().eval()
    with collect_routing(model) as routing:
        model.generate(input_ids=IDS, attention_mask=LEFT_PADDED, max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = 2 * (int(LEFT_PADDED.sum()) + 4 * len(IDS))
    assert routing.counts["model.layers.0.mlp"].sum(dim=1).tolist() == [expected] * 3
    assert ffn_layers(model)[0].routing_context.running() is None, "a mask must not outlive its forward"


def test_collect_during_generate_with_a_static_cache():
    """generate then makes a 4-D mask, from which padding cannot be read: every token counts, as documented."""
    model = tiny_peft_model().eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    with collect_routing(model) as routing:
        model.generate(input_ids=IDS, attention_mask=LEFT_PADDED, **settings)
    expected = 2 * (IDS.numel() + 4 * len(IDS))
    assert routing.counts["model.layers.0.mlp"].sum(dim=1).tolist() == [expected] * 3


def test_collect_in_training_with_coefficient_zero():
    """Load can be watched where no loss is wanted; the loss stays the language loss."""
    model = tiny_peft_model(router_aux_loss_coef=0.0).train()
    with collect_routing(model) as routing:
        loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(loss, tiny_model()(input_ids=IDS, labels=IDS).loss)
    assert routing.counts["model.layers.0.mlp"].sum() == 3 * 2 * IDS.numel()


def test_collect_nests_and_leaves_the_model_clean():
    """Blocks count for themselves, and an exception ends them like any exit."""
    model = tiny_peft_model().eval()
    context = ffn_layers(model)[0].routing_context

    def interrupted() -> None:
        with collect_routing(model) as inner:
            collected.append(inner)
            model(input_ids=IDS)
            raise ZeroDivisionError

    collected: list[ExpertLoad] = []
    with collect_routing(model) as outer:
        with pytest.raises(ZeroDivisionError):
            interrupted()
        model(input_ids=IDS)
    (inner,) = collected
    assert outer.counts["model.layers.0.mlp"].sum() == 2 * inner.counts["model.layers.0.mlp"].sum()
    assert not context.loads
    assert context.running() is None
    model(input_ids=IDS)
    assert outer.counts["model.layers.0.mlp"].sum() == 2 * 3 * 2 * IDS.numel()


def test_collect_names_what_it_cannot_count():
    with pytest.raises(TypeError, match="no GraphMoE layer"), collect_routing(tiny_model()):
        pass
    model = tiny_peft_model()
    model.add_adapter("other", tiny_config(rounds=1))
    with collect_routing(model):
        model.eval()(input_ids=IDS)
        model.set_adapter("other")
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp ran with \[rounds, experts\]"):
            model(input_ids=IDS)
