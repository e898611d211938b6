"""What the report says about the comparison of all methods: a table, and what it does not show."""

from __future__ import annotations

from graphmoe_model.demo.comparison import ROUNDS, SIZES, Comparison, MethodResult, uncertainty
from graphmoe_model.demo.tables import Table, titled_markdown
from graphmoe_model.demo.task import CHOICES

NO_RANKING = (
    "The task is synthetic, each method had one seed and few steps, and nothing was tuned for any one of them: the "
    "order of methods here says nothing about real tasks, and neither confirms nor refutes the paper's results."
)


def comparison_table(comparison: Comparison) -> Table:
    """The base model, then one row a method; narrow enough for a terminal of 80 columns."""
    base_scoring = f"{comparison.base_scoring_ms:.0f}"
    rows = [["base model", "–", "–", f"{comparison.base_accuracy:.1%}", "–", base_scoring, "–"]]
    rows += [_row(method) for method in comparison.methods]
    header = ("method", "n×r", "params", "accuracy", "ms a step", "ms scoring", "expert load %")
    return Table(f"Every method after {comparison.steps:,} steps", header, rows)


def _row(method: MethodResult) -> list[str]:
    return [
        method.title,
        f"{method.experts}×{method.rank}",
        f"{method.parameters:,}",
        f"{method.accuracy:.1%}",
        f"{method.step_ms:.1f}",
        f"{method.scoring_ms:.0f}",
        "–" if method.load is None else "–".join(f"{100 * share:.0f}" for share in method.load),
    ]


def what_was_measured(comparison: Comparison) -> str:
    """GraphMoE against the method below it, pair by pair, in a sentence."""
    reached = {method.title: method.accuracy for method in comparison.methods}
    pairs = {
        title: reached[f"GraphMoE({title})"] - reached[title] for title in reached if f"GraphMoE({title})" in reached
    }
    more, less = (sum(sign * gain > 0 for gain in pairs.values()) for sign in (1, -1))
    gains = ", ".join(f"{title} {100 * gain:+.1f}" for title, gain in pairs.items())
    return (
        f"Measured here: GraphMoE answered more questions right than its base method in {more} of {len(pairs)} pairs "
        f"and fewer in {less} (points: {gains})."
    )


def comparison_section(comparison: Comparison) -> list[str]:
    """The section of the report, paragraph by paragraph."""
    steps, batch = comparison.steps, comparison.batch_size
    margin, chance = uncertainty(comparison.questions), 1 / CHOICES
    begun = sum(method.accuracy > chance + margin for method in comparison.methods)
    lora, mixlora, loramoe, mola = (SIZES[name] for name in ("lora", "mixlora", "loramoe", "mola"))
    return [
        "## Every method, equal steps",
        f"> **This is no ranking.** {NO_RANKING}",
        f"The eight base methods, and GraphMoE with {ROUNDS} rounds on the six that have experts. Each started from "
        f"the same base model and took {steps:,} steps of {batch} questions: the same questions in the same order, the "
        f"same seed and learning rate ({comparison.learning_rate:g} at its highest). Steps, batch size and learning "
        "rate come from a handful of trials with a few of the methods, so that some learning shows in little time; "
        f"other values gave other orders. Guessing gives {chance:.0%}: {begun} of {len(comparison.methods)} methods "
        f"ended more than {100 * margin:.1f} points above it, the others were not far enough yet.",
        "The sizes are chosen so that all train about as many parameters. Experts and ranks are half the paper's: "
        f"{mixlora['num_experts']} experts of rank {mixlora['r']} in MixLoRA, {loramoe['num_experts']} of rank "
        f"{loramoe['r']} in LoRAMoE (none on the attention), {mola['num_experts']} of rank {mola['r']} in MoLA (on the "
        f"attention too); the top {mixlora['top_k']} of them in MixLoRA and MoLA, all in LoRAMoE. LoRA's rank is "
        f"{lora['r']}, which comes closest to MixLoRA's parameters. DoRA adds its magnitudes and GraphMoE its GRU, and "
        "neither gives up rank for them; the GRU is a quarter of the hidden size wide, as in the adapter above. The "
        "scale is alpha = 2 r everywhere.",
        "![Every method](comparison.png)",
        titled_markdown(comparison_table(comparison)),
        f"{what_was_measured(comparison)} With {comparison.questions:,} questions an accuracy is known to within "
        f"±{100 * margin:.1f} points at worst (95%), another seed not counted.",
        "- **n×r**: experts of an MLP, and their rank\n"
        "- **params**: trainable parameters\n"
        "- **accuracy**: the mean of the skills\n"
        "- **ms a step**: the median of the training steps without the first tenth\n"
        f"- **ms scoring**: the median of the forwards that scored {comparison.scored:,} held-out questions each\n"
        "- **expert load**: the smallest and the largest share of an expert in the last training step, over all "
        "routers and rounds; of the routed tokens, or in LoRAMoE and DoRAMoE, where every token has all experts, of "
        "the routing probability",
        *(f"Not in the table is {title}: {why}." for title, why in comparison.diverged.items()),
        "Methods ran one after the other: whatever else the machine did meets their times differently.",
    ]
