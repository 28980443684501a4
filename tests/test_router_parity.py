"""The choice of experts beside transformers' own routers: a million rows of each rule, ties included.

Run with `-m parity` where the `parity` extra is installed; `--router-table docs/routers.md` writes the table.
"""

import dataclasses
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_marlin_moe as jmm
from jax_marlin_moe import native

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # what transformers and torch warn of is theirs

HIDDEN, EXPERTS, CHUNK, CHUNKS = 32, 16, 1 << 17, 8
# What float32 rounding may move a score by, relative to the largest.
ROUNDING = 3e-6


@dataclasses.dataclass(frozen=True)
class Case:
    """A router of transformers, and our rule."""

    model_type: str
    router: str
    rule: jmm.Routing
    values: dict = dataclasses.field(default_factory=dict)
    biased: bool = False  # whether it has a correction bias
    experts: int = EXPERTS

    @property
    def name(self):
        return f"`{self.model_type}`" + (f", {self.values['variant']}" if "variant" in self.values else "")


GROUPS = {"n_group": 4, "topk_group": 2}
LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": 4}
CASES = [
    Case("qwen3_moe", "Qwen3MoeTopKRouter", jmm.Routing(4), {"num_experts": EXPERTS, "norm_topk_prob": True}),
    Case(
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        jmm.Routing(4, renormalize=False),
        {"variant": "not renormalised", "num_experts": EXPERTS, "norm_topk_prob": False},
    ),
    Case("mixtral", "MixtralTopKRouter", jmm.Routing(2), LOCAL | {"num_experts_per_tok": 2}),
    Case(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        jmm.Routing(4, renormalize=False, num_groups=4, top_groups=2, group_score="max", scale=16.0),
        {"n_routed_experts": EXPERTS, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, **GROUPS},
    ),
    Case(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        jmm.Routing(4, "sigmoid", num_groups=4, top_groups=2, scale=2.5),
        {"n_routed_experts": EXPERTS, "routed_scaling_factor": 2.5, **GROUPS},
        biased=True,
    ),
    Case(
        "deepseek_v4",
        "DeepseekV4TopKRouter",
        jmm.Routing(4, "sqrtsoftplus", scale=1.5),
        LOCAL | {"routed_scaling_factor": 1.5},
        biased=True,
    ),
    Case("minimax_m2", "MiniMaxM2TopKRouter", jmm.Routing(4, "sigmoid"), LOCAL, biased=True),
    Case(
        "laguna",
        "LagunaTopKRouter",
        jmm.Routing(4, "sigmoid", logits_soft_cap=1.5),
        {"num_experts": EXPERTS, "moe_router_logit_softcapping": 1.5},
        biased=True,
    ),
    Case("gpt_oss", "GptOssTopKRouter", jmm.Routing(4, "identity", softmax_after_topk=True), LOCAL),
    Case(
        "llama4_text", "Llama4Router", jmm.Routing(4, "chosen_sigmoid", renormalize=False, apply_on_input=True), LOCAL
    ),
    Case("gemma4_text", "Gemma4TextRouter", jmm.Routing(4), {"num_experts": EXPERTS, "top_k_experts": 4}),
    Case(
        "phimoe",
        "PhimoeTopKRouter",
        jmm.Routing(2, "sparsemixer", renormalize=False, jitter=0.01),
        LOCAL | {"num_experts_per_tok": 2, "router_jitter_noise": 0.01},
    ),
    Case(
        "longcat_flash",
        "LongcatFlashTopkRouter",
        jmm.Routing(4, renormalize=False, scale=6.0, identity_experts=4),
        {"n_routed_experts": 12, "zero_expert_num": 4, "moe_topk": 4, "routed_scaling_factor": 6.0},
        biased=True,
    ),
]

HEAD = """# Routers beside transformers

Written by `pytest -m parity --router-table docs/routers.md`: do not edit it by hand.

{rows} rows of {hidden} numbers for each router of transformers {version}, {experts} experts each, through its own
module and through `moe_layer` (`implementation="{implementation}"`) and `route`. Half of the rows, and then the
router too, are small integers, so that many scores are equal.

Where the last expert that is chosen leads the next one by more than float32 rounding ({rounding} of the largest score;
likewise groups), the chosen experts are the same; elsewhere both choose experts that are worth the same to within
rounding. Among equal scores `moe_layer` and `route` choose the lower expert, always; `torch.topk` does not say which
one it takes, so that there the sets are compared by what their experts are worth. The last column says how many of
the tied rows have another set in transformers.

| router | equal sets beyond rounding | within rounding | exact ties | of them, another choice of `torch.topk` |
|---|---:|---:|---:|---:|
"""


@pytest.fixture(scope="module")
def table(request):
    """Rows of the table that is printed at the end, and written where the option names a file."""
    import transformers

    rows = []
    yield rows
    lines = [f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |" for name, *counts in rows]
    write = request.config.pluginmanager.get_plugin("terminalreporter").write_line
    for line in ["", *lines]:
        write(line)
    path = request.config.getoption("--router-table")
    if path is not None:
        facts = {
            "version": transformers.__version__,
            "implementation": implementation(),
            "rounding": ROUNDING,
            "rows": f"{CHUNK * CHUNKS:,}",
        }
        head = HEAD.format(hidden=HIDDEN, experts=EXPERTS, **facts)
        pathlib.Path(path).write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


def implementation():
    """The native form, where there is one for this Python."""
    return "xla" if native.unavailable_reason() else "cpu"


def make_router(case):
    """transformers' module, and its parameters by what they are."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[case.model_type]
    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": case.rule.top_k}
    values = sizes | {key: value for key, value in case.values.items() if key != "variant"}
    config = kind(**{key: value for key, value in values.items() if hasattr(kind(), key)})
    module = importlib.import_module(kind.__module__.replace("configuration_", "modeling_"))
    with torch.no_grad():
        router = getattr(module, case.router)(config).eval().float()
    return router


def set_parameters(router, rng, integers):
    """Random parameters for transformers' router, which are returned as ours."""
    import torch

    ours = {}
    for name, value in [*router.named_parameters(), *router.named_buffers()]:
        if integers:
            numbers = rng.integers(-2, 3, value.shape) / 8
        else:
            numbers = rng.normal(size=value.shape) * (HIDDEN**-0.5 if value.ndim == 2 else 0.125)
        if name in ("scale", "per_expert_scale"):
            numbers = 1 + numbers
        numbers = np.asarray(jnp.asarray(numbers, jnp.bfloat16), np.float32)  # as in files
        with torch.no_grad():
            value.copy_(torch.tensor(numbers))
        ours[name.rsplit(".", 1)[-1] if value.ndim == 1 else "router"] = numbers
    return ours


def their_choice(case, router, bias, x):
    """Ids and a row of weights over all experts."""
    import torch

    rows = torch.tensor(x)
    with torch.no_grad():
        if case.model_type == "llama4_text":
            scores, logits = router(rows)
            ids = torch.topk(logits, case.rule.top_k, dim=1)[1]
            return ids.numpy(), scores.numpy()
        if case.model_type == "minimax_m2":
            _, weights, ids = router(rows, torch.tensor(bias))
        elif case.model_type == "phimoe":
            _, weights, ids = router(rows)
        else:
            _, weights, ids = router(rows)
        return ids.numpy(), torch.zeros(len(x), EXPERTS).scatter_(1, ids, weights.float()).numpy()


def exact_scores(case, ours, bias, x):
    """What the choice is by, in float64, with groups that are out at -infinity, and by how much the groups are in."""
    rule = case.rule
    rows, vectors = x.astype(np.float64), {name: value.astype(np.float64) for name, value in ours.items()}
    if "scale" in vectors:
        rows = rows / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-6) * vectors["scale"] * HIDDEN**-0.5
    logits = rows @ vectors["router"].T
    if case.model_type == "gpt_oss":
        logits = logits + vectors["bias"]
    if rule.logits_soft_cap:
        logits = np.tanh(logits / rule.logits_soft_cap) * rule.logits_soft_cap
    if rule.scoring == "softmax":
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        scores = exponentials / exponentials.sum(1, keepdims=True)
    elif rule.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    elif rule.scoring == "sqrtsoftplus":
        scores = np.sqrt(np.log1p(np.exp(logits)))
    else:
        scores = logits
    scores = scores + (0 if bias is None else bias)
    lead = np.full(len(x), np.inf)
    if rule.top_groups < rule.num_groups:
        grouped = scores.reshape(len(x), rule.num_groups, -1)
        best = np.sort(grouped, 2)
        worth = best[..., -2:].sum(2) if rule.group_score == "top2" else best[..., -1]
        order = np.argsort(-worth, 1, kind="stable")
        ranked = np.take_along_axis(worth, order, 1)
        lead = ranked[:, rule.top_groups - 1] - ranked[:, rule.top_groups]
        out = np.ones(worth.shape, bool)
        np.put_along_axis(out, order[:, : rule.top_groups], False, 1)
        scores = np.where(out[..., None], -np.inf, grouped).reshape(scores.shape)
    return scores, lead


def sets(ids):
    """Rows of which experts are among the ids."""
    chosen = np.zeros((len(ids), EXPERTS), bool)
    np.put_along_axis(chosen, ids, True, 1)
    assert (chosen.sum(1) == ids.shape[1]).all()
    return chosen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace("`", ""))
def test_a_million_rows_choose_the_experts_that_transformers_routers_choose(case, table):
    rng = np.random.default_rng(0)
    router = make_router(case)
    real = EXPERTS - case.rule.identity_experts
    shapes = (real, HIDDEN, 128), (real, 64, HIDDEN)
    experts = [jmm.quantize(jnp.zeros(shape), "int4", group_size=32) for shape in shapes]
    elsewhere = jnp.full((real,), -1, jnp.int32)  # only the choice is of interest

    @jax.jit
    def our_choice(x, parameters):
        options = {"routing": case.rule, "expert_map": elsewhere, "return_routing": True}
        options["implementation"] = implementation()
        rows = x.astype(jnp.bfloat16)
        return jmm.moe_layer(rows, parameters.pop("router"), *experts, **options, **parameters)[1:]

    decided = undecided = ties = others = 0
    for chunk in range(CHUNKS):
        integers = chunk % 2 == 1
        ours = set_parameters(router, rng, integers)
        bias = ours.get("e_score_correction_bias")
        if case.biased and bias is None:
            bias = np.asarray(rng.integers(-2, 3, EXPERTS) / 8 if integers else rng.normal(size=EXPERTS), np.float32)
        x = rng.integers(-2, 3, (CHUNK, HIDDEN)) if integers else rng.normal(size=(CHUNK, HIDDEN))
        x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
        parameters = {"router": jnp.asarray(ours["router"].T)}
        names = {"bias": "router_bias", "scale": "router_input_scale", "per_expert_scale": "expert_scale"}
        parameters |= {ours_: jnp.asarray(ours[name]) for name, ours_ in names.items() if name in ours}
        if bias is not None:
            parameters["correction_bias"] = jnp.asarray(bias)
        weights, ids = (np.asarray(array) for array in our_choice(jnp.asarray(x), parameters))
        their_ids, their_weights = their_choice(case, router, bias, x)
        chosen, theirs = sets(ids), sets(their_ids)

        scores, lead = exact_scores(case, ours, bias, x)
        ranked = -np.sort(-scores, 1)
        k = case.rule.top_k
        lead = np.minimum(lead, ranked[:, k - 1] - ranked[:, k])
        tolerance = ROUNDING * np.maximum(np.abs(ranked[:, 0]), 1e-3 if case.rule.scoring == "softmax" else 1)
        clear = lead > tolerance
        np.testing.assert_array_equal(chosen[clear], theirs[clear])
        # Within rounding: what either chooses is worth as much.
        whole = lead <= tolerance
        worth = [np.sort(np.take_along_axis(scores[whole], i[whole], 1), 1) for i in (ids, their_ids)]
        settled = np.isfinite(worth[0]).all(1) & np.isfinite(worth[1]).all(1)  # both kept the same groups
        np.testing.assert_allclose(worth[0][settled], worth[1][settled], atol=2 * tolerance.max())
        same = (chosen == theirs).all(1)
        dense = np.zeros((CHUNK, EXPERTS), np.float32)
        np.put_along_axis(dense, ids, weights, 1)
        np.testing.assert_allclose(dense[same], their_weights[same], rtol=3e-5, atol=1e-6)

        if integers and "scale" not in ours:  # the logits are exact, in float32 too: so is what `route` makes of them
            logits = jnp.asarray(x @ ours["router"].T + ours.get("bias", 0), jnp.float32)
            rule = case.rule.options() | ({} if bias is None else {"correction_bias": jnp.asarray(bias)})
            routed = np.asarray(jmm.route(logits, **rule)[1])
            tied = lead == 0
            differ = (routed != ids).any(1)
            # Exponentials are rounded differently: what differs is worth the same but for that.
            assert differ.mean() < 1e-3
            both = [np.take_along_axis(scores[differ], i[differ], 1) for i in (routed, ids)]
            np.testing.assert_allclose(*both, atol=2 * tolerance.max())
            if case.rule.scoring in ("identity", "chosen_sigmoid", "sparsemixer"):
                lowest = np.argsort(-scores, 1, kind="stable")[:, :k]
                np.testing.assert_array_equal(ids, lowest)
            ties += int(tied.sum())
            others += int((tied & ~same).sum())
        decided += int(clear.sum())
        undecided += int((~clear & ~((lead == 0) & integers)).sum())
    assert decided > CHUNK * CHUNKS / 4
    table.append((case.name, decided, undecided, ties, others))
