import pytest

from srcr.planning.texts import search_sequences


@pytest.mark.parametrize(
    ("parameters", "sequences"),
    [(1, 24), (260_000, 24), (1_500_000, 16), (2_100_000, 12), (8_000_000_000, 12)],
)
def test_small_models_are_searched_on_more_text(parameters, sequences):
    assert search_sequences(parameters) == sequences
