import pytest

from alps_exp.allocation.selection import Selection
from alps_exp.base.errors import UserError
from alps_exp.patterns import NM, Unstructured

SHAPES = {
    f"model.layers.{block}.{layer}": shape
    for block in range(12)
    for layer, shape in {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 12)}.items()
}


def chosen(**options):
    return Selection.parse(**options).patterns_for(SHAPES, Unstructured(0.5))


def test_everything_by_default():
    assert chosen() == dict.fromkeys(SHAPES, Unstructured(0.5))


@pytest.mark.parametrize("glob", ["q_proj", "*.q_proj", "self_attn.q_proj", "model.layers.*.q_proj"])
def test_forms_of_one_layer(glob):
    assert set(chosen(include=[glob])) == {name for name in SHAPES if name.endswith("q_proj")}


def test_a_block_is_named_exactly():
    assert set(chosen(include=["layers.1.*"])) == {name for name in SHAPES if name.startswith("model.layers.1.")}


def test_exclude_wins_and_a_plain_string_is_one_pattern():
    assert set(chosen(include="self_attn.*", exclude="k_proj")) == {n for n in SHAPES if n.endswith("q_proj")}


def test_sparsity_by_layer_last_match_counts():
    patterns = chosen(sparsity={"self_attn.*": 0.9, "k_proj": "2:4"})
    assert patterns["model.layers.3.self_attn.q_proj"] == Unstructured(0.9)
    assert patterns["model.layers.3.self_attn.k_proj"] == NM(2, 4)
    assert patterns["model.layers.3.mlp.down_proj"] == Unstructured(0.5)


def test_what_is_never_pruned_may_be_excluded():
    patterns = Selection.parse(exclude=["lm_head"]).patterns_for(SHAPES, Unstructured(0.5), ["lm_head"])
    assert set(patterns) == set(SHAPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["q_porj"]}, "did you mean q_proj"),
        ({"exclude": [0]}, "give globs"),
        ({"sparsity": 0.5}, "give globs with their sparsity"),
        ({"include": ["q_porj"]}, "did you mean q_proj"),
        ({"sparsity": {"*.qproj": 0.5}}, "matches no layer"),
        ({"exclude": ["*"]}, "nothing to prune"),
        ({"sparsity": {"down_proj": "4:8"}}, "model.layers.0.mlp.down_proj.*12 inputs are not a multiple of 8"),
        ({"sparsity": {"down_proj": 124}}, "quote it"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message) as error:
        chosen(**options)
    assert "\n" not in str(error.value)
