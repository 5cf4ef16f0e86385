"""The suites that ship with srcr: what is right passes, and every fault is named."""

from dataclasses import replace

import pytest
import torch

from srcr import methods
from srcr.models.checkpoint import open_model
from srcr.models.topology import Coupling, Port
from srcr.numerics.grid import Grid
from srcr.numerics.scales import fit_grid
from srcr.testing import FAMILIES, check_couplings, check_pruner, check_quantizer, tiny_model

MAGNITUDE, SPARSEGPT = methods.get_pruner("magnitude"), methods.get_pruner("sparsegpt")
RTN = methods.get_quantizer("rtn")


def scored(scores):
    """A pruner that is sound but for its scores."""
    return replace(MAGNITUDE, name="broken", scores=scores)


def fitted(change):
    """A quantizer whose grid is that of round-to-nearest, changed."""

    def fit(W, spec, importance, mask):
        return change(RTN.fit(W, spec, importance, mask), W, spec)

    return replace(RTN, name="broken", fit=fit)


class Counter:
    """Another number each time it is asked."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return self.count


def a_number(W, diagonal, pivots, rounded):
    return W.abs().sum(dim=1)


def not_a_number(W, diagonal, pivots, rounded):
    return W.abs() / 0.0 * 0.0


def in_place(W, diagonal, pivots, rounded):
    return W.abs_()


def in_place_of_the_diagonal(W, diagonal, pivots, rounded):
    return W.abs() * diagonal.sqrt_()


def random(W, diagonal, pivots, rounded):
    return torch.rand(W.shape)


def of_other_rows(W, diagonal, pivots, rounded):
    return W.abs() / W.abs().sum(dim=0)


def of_what_is_not_rounded(W, diagonal, pivots, rounded):
    return (W - rounded).abs()


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        (a_number, r"scores have the shape \[12\], the weights \[12, 32\]"),
        (not_a_number, "scores are NaN"),
        (in_place, "changed its argument W"),
        (in_place_of_the_diagonal, "changed its argument diagonal"),
        (random, "on the global random state"),
        (of_other_rows, "scores of a row depend on other rows"),
        (of_what_is_not_rounded, r"scores raised TypeError"),
        (lambda W, diagonal, pivots, rounded: None, "scores are no tensor"),
    ],
)  # fmt: skip
def test_a_broken_pruner_is_refused(scores, fault):
    with pytest.raises(AssertionError, match=f"pruner 'broken'.*{fault}"):
        check_pruner(scored(scores))


def test_a_pruner_that_remembers_is_refused():
    count = Counter()
    pruner = scored(lambda W, diagonal, pivots, rounded: W.abs() * (count() % 3 + 1))
    with pytest.raises(AssertionError, match=r"'broken'.*depends on the calls before it"):
        check_pruner(pruner)


def test_a_pruner_of_another_scope_is_refused():
    with pytest.raises(AssertionError, match="scope 'column' is no layer or row"):
        check_pruner(replace(MAGNITUDE, scope="column"))


def test_a_method_need_not_be_registered_and_is_not_afterwards():
    before = dict(methods.pruners()), dict(methods.quantizers())
    check_pruner(replace(SPARSEGPT, name="mine"))
    check_pruner(replace(MAGNITUDE, name="sparsegpt"))
    check_quantizer(replace(RTN, name="mine"))
    with pytest.raises(AssertionError):
        check_quantizer(fitted(lambda grid, W, spec: replace(grid, num_bits=3)))
    assert (dict(methods.pruners()), dict(methods.quantizers())) == before


def more_scales(grid, W, spec):
    return replace(grid, scale=grid.scale.repeat(1, 2))


def two_bits(grid, W, spec):
    """Says what was asked for, and is as coarse as two bits."""
    coarse = RTN.fit(W, replace(spec, num_bits=2), W[0], None)
    zero = None if spec.symmetric else grid.zero_point
    return replace(grid, scale=coarse.scale, zero_point=zero)


def half_a_code(grid, W, spec):
    return grid if grid.zero_point is None else replace(grid, zero_point=grid.zero_point + 0.5)


def past_the_codes(grid, W, spec):
    return grid if grid.zero_point is None else replace(grid, zero_point=grid.zero_point + 300)


def always_a_zero_point(grid, W, spec):
    return replace(grid, zero_point=torch.zeros_like(grid.scale))


def not_stored(grid, W, spec):
    return replace(grid, scale=grid.scale * 1.001)


def of_the_whole_layer(grid, W, spec):
    return replace(grid, scale=grid.scale.max().expand_as(grid.scale).contiguous())


def coarse(grid, W, spec):
    return replace(grid, scale=grid.scale * 128)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (more_scales, r"the scales have the shape \[12, 2\], not \[12, 1\]"),
        (lambda grid, W, spec: replace(grid, num_bits=4), "num_bits is 4, not 2"),
        (lambda grid, W, spec: replace(grid, group_size=16), "group_size is 16, not 32"),
        (lambda grid, W, spec: replace(grid, dtype=torch.float16), r"dtype is torch\.float16"),
        (two_bits, "more num_bits do not make the rounding error less"),
        (half_a_code, "zero is not on the grid"),
        (past_the_codes, "zero is not on the grid"),
        (always_a_zero_point, "the grid has a zero-point"),
        (lambda grid, W, spec: replace(grid, zero_point=None), "the grid has no zero-point"),
        (not_stored, r"the scales are not numbers of torch\.bfloat16"),
        (lambda grid, W, spec: replace(grid, scale=grid.scale * 0), "a scale is 0"),
        (lambda grid, W, spec: replace(grid, scale=grid.scale / 0), "a scale is not finite"),
        (lambda grid, W, spec: replace(grid, scale=grid.scale.double()), "held in torch.float64"),
        (of_the_whole_layer, "the grid of a row depends on other rows"),
        (coarse, r"8 bits leave the relative squared error|do not make the rounding error less"),
        (lambda grid, W, spec: grid.scale, "what was fitted is no Grid"),
    ],
)  # fmt: skip
def test_a_broken_quantizer_is_refused(change, fault):
    with pytest.raises(AssertionError, match=f"quantizer 'broken'.*{fault}"):
        check_quantizer(fitted(change))


def test_a_quantizer_that_changes_the_weights_is_refused():
    quantizer = fitted(lambda grid, W, spec: Grid(grid.scale, None, *spec_of(W.mul_(2), spec)))
    with pytest.raises(AssertionError, match="changed its argument W"):
        check_quantizer(quantizer)


def spec_of(_, spec):
    return spec.num_bits, spec.group_size, spec.dtype


def test_a_quantizer_that_draws_is_refused():
    def fit(W, spec, importance, mask):
        return fit_grid(W, spec, importance, mask, shrinks=(float(torch.rand(())),))

    with pytest.raises(AssertionError, match="on the global random state"):
        check_quantizer(replace(RTN, name="broken", fit=fit))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_couplings_of_every_family_conform(family):
    """Removal is compared with a really smaller model where the family's config can express it: without a
    head_dim of its own a model cannot have fewer heads of the same width."""
    kinds = {"channels", "heads", "layers"}
    if family in ("opt", "gpt_neox", "gpt2"):
        kinds.remove("heads")
    assert check_couplings(tiny_model(family)) == kinds


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_couplings_conform_in_16_bits_and_in_a_folder(family, tmp_path):
    tiny_model(family, torch.bfloat16, seed=3).save_pretrained(tmp_path)
    assert "channels" in check_couplings(tmp_path)


def broken(model, kind, change):
    """The couplings of a model, the first of a kind changed."""
    couplings = list(open_model(model).topology.couplings)
    index = next(i for i, coupling in enumerate(couplings) if coupling.kind == kind)
    couplings[index] = change(couplings[index])
    return couplings


def shifted_producer(coupling: Coupling) -> Coupling:
    first, *others = coupling.producers
    return replace(coupling, producers=(replace(first, offset=1), *others), size=coupling.size - 1)


def shifted_consumer(coupling: Coupling) -> Coupling:
    (port,) = coupling.consumers
    return replace(coupling, consumers=(replace(port, offset=1),), size=coupling.size - 1)


def past_the_end(coupling: Coupling) -> Coupling:
    (port,) = coupling.consumers
    return replace(coupling, consumers=(replace(port, offset=1),))


def without_first_producer(coupling: Coupling) -> Coupling:
    return replace(coupling, producers=coupling.producers[1:])


def without_last_producer(coupling: Coupling) -> Coupling:
    return replace(coupling, producers=coupling.producers[:-1])


def halves(coupling: Coupling) -> Coupling:
    """Twice as many elements as there are."""

    def half(port: Port) -> Port:
        return replace(port, stride=port.stride // 2)

    return replace(
        coupling,
        size=2 * coupling.size,
        producers=tuple(map(half, coupling.producers)),
        consumers=tuple(map(half, coupling.consumers)),
    )


def of_no_parameter(coupling: Coupling) -> Coupling:
    return replace(coupling, consumers=(Port("nowhere", 0, 1),))


def with_another_producer(coupling: Coupling) -> Coupling:
    """One that serves everything behind it."""
    (port,) = coupling.consumers
    return replace(coupling, producers=(*coupling.producers, replace(port, axis=0)), size=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "change", "fault"),
    [
        ("llama", "channels", shifted_producer, "a consumer is missing, or a port is shifted"),
        ("llama", "channels", shifted_consumer, "a consumer is missing, or a port is shifted"),
        ("llama", "channels", past_the_end, "reach past"),
        ("llama", "channels", of_no_parameter, "there is no parameter 'nowhere'"),
        ("llama", "channels", without_first_producer, "belong to no producer"),
        ("llama", "channels", without_last_producer, "belong to no producer"),
        ("llama", "channels", with_another_producer, "of the producer .*down_proj.* still count"),
        ("llama", "heads", without_first_producer, "belong to no producer"),
        ("llama", "heads", without_last_producer, "belong to no producer"),
        ("llama", "heads", halves, "still count|belong to no producer"),
        ("llama", "layers", without_first_producer, "the layer is not the same as none"),
        ("llama", "layers", without_last_producer, "the layer is not the same as none"),
        ("gpt2", "heads", without_last_producer, "belong to no producer"),
        ("gpt2", "heads", shifted_consumer, "a consumer is missing, or a port is shifted"),
        ("opt", "channels", without_last_producer, "belong to no producer"),
        ("opt", "layers", without_last_producer, "the layer is not the same as none"),
        ("gpt_neox", "heads", without_last_producer, "belong to no producer"),
        ("phi3", "heads", without_last_producer, "belong to no producer"),
        ("phi3", "channels", without_last_producer, "belong to no producer"),
    ],
)  # fmt: skip
def test_a_broken_coupling_is_refused(family, kind, change, fault):
    model = tiny_model(family)
    with pytest.raises(AssertionError, match=f"{kind} of .*{fault}"):
        check_couplings(model, broken(model, kind, change))


def test_a_missing_consumer_is_refused():
    """Attention and feed-forward network of a parallel block share an input; here it would be the two
    consumers of what the norm gives, of which one is left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "doge", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    check_couplings(model)
    # Doge's values go to the output projection and to the one that makes the attention's mask.
    attention = "model.layers.0.self_attn"
    coupling = Coupling(
        "channels",
        "model.layers.0",
        (Port(f"{attention}.v_proj.weight", 0, 1),),
        (Port(f"{attention}.dt_proj.weight", 1, 1),),
        16,
    )
    with pytest.raises(AssertionError, match=r"v_proj\.weight still count: a consumer is missing"):
        check_couplings(model, [coupling])
