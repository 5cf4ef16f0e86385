"""``--dry-run``: what a command would come to, without running it."""

import pytest

OPTIONS = {
    "uniform": ("--sparsity", 0.25),
    "grouped": ("--group-size", 16, "--asymmetric", "--bits", 3),
    "embeddings": ("--embeddings", 8),
    "smaller": ("--remove", "channels=16", "--bits", 4),
    "dense": ("--bits", 16, "--sparsity", 0.5),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sizes_are_those_that_compress_comes_to(options, srcr, tiny, ids, tmp_path):
    command = ("compress", tiny, "-o", tmp_path / "out", "--calibration", ids, *options, "--json")
    wanted = srcr(*command, "--dry-run")
    assert wanted.code == 0, wanted.err
    assert not (tmp_path / "out").exists()
    shown, done = wanted.json(), srcr(*command).json()
    rates = done["rates"]
    assert shown["format"] == done["format"]
    assert shown["stored_bytes"] == pytest.approx(rates["stored_bytes"], rel=0.02)
    assert shown["tcr"] == pytest.approx(rates["tcr"], abs=1e-3)
    assert shown["sparsity"] == pytest.approx(rates["sparsity"], abs=1e-3)
    assert shown["bits"] == rates["bits"]
    assert shown["base_bytes"] == rates["base_bytes"]
    assert set(shown["notes"]) <= set(done["notes"])
    assert shown["memory_bytes"] > 0 < shown["disk_bytes"]
    assert 0 < shown["seconds"] < 600


def test_what_is_refused_is_refused_here_too(srcr, tiny, ids, tmp_path):
    out = ("-o", tmp_path / "out", "--calibration", ids, "--dry-run")
    for command, message in (
        (("compress", tiny, *out, "--group-size", 7), "does not divide the width"),
        (("compress", tiny, *out, "--memory", "1MB"), "--memory 1MB is too little"),
        (("search", tiny, *out, "--target", "stored=1kB"), "cannot be met"),
        (("recover", tiny, tiny, *out), "has no srcr.json"),
    ):
        result = srcr(*command)
        assert result.code == 2
        assert message in result.error()


def test_search_and_recover(srcr, tiny, ids, tmp_path):
    small, data = tmp_path / "small", ("--calibration", ids)
    assert srcr("compress", tiny, "-o", small, *data, "--quant-method", "rtn").code == 0
    levels = ("--sparsities", "0,0.5", "--widths", "3,4")
    target = ("--target", "tcr=0.8")
    shown = srcr(
        "search", tiny, "-o", tmp_path / "o", *target, *levels, *data, "--dry-run", "--json"
    )
    assert shown.json()["tcr"] == 0.8
    assert "groups at 4 levels" in shown.json()["notes"][0]
    assert shown.json()["seconds"] > 0
    given = ("--minutes", 30, "--held-out", ids)
    table = srcr("recover", tiny, small, "-o", tmp_path / "o", *data, *given, "--dry-run")
    assert table.code == 0
    assert "not run" in table.out
    assert " 30 min" in table.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.safetensors", "small", "tiny"]


def test_time_grows_with_what_is_to_be_done(srcr, tiny, ids, tmp_path):
    def seconds(*options):
        shown = srcr("compress", tiny, "-o", tmp_path / "out", *options, "--dry-run", "--json")
        return shown.json()["seconds"]

    plain = seconds("--calibration", ids)
    assert seconds("--calibration", ids, "--recover", "10min") == pytest.approx(
        plain + 600, rel=0.5
    )
    written = seconds("--samples", 8, "--seq-len", 32)
    assert seconds("--samples", 2048, "--seq-len", 32) > written
