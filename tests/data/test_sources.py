"""Every source of calibration text, and what is wrong with it."""

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from srcr.data import sampling
from srcr.data.decoding import cache_width
from srcr.data.sampling import TextPlan, draw, sampling_rows, write_text
from srcr.data.sources import TextRequest, held_out_request, load_tokens, recovery_requests
from srcr.data.specs import RecoveryText
from srcr.data.tokens import Tokens, seed_stream
from srcr.errors import InputError, NumericalError
from srcr.models.checkpoint import open_model
from srcr.models.load import load_model, load_tokenizer
from srcr.testing import tiny_model

SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models/stories260K"
TEXT = SHARED / "data/tinystories_sample.txt"


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama")  # vocabulary 96, context 64


@pytest.fixture(scope="module")
def stories():
    """A real model with its tokenizer: vocabulary 512, context 512."""
    if not STORIES.is_dir():
        pytest.skip("../shared/models/stories260K (a real model with a tokenizer) is not here")
    return load_model(STORIES), load_tokenizer(STORIES)


def tokens(
    model,
    source,
    tokenizer=None,
    samples=None,
    seq_len=16,
    seed=0,
    purpose="calibration",
    chat=None,
):
    request = TextRequest(source, samples, seq_len, 4, purpose, seed, chat)
    if isinstance(source, Path):
        request = replace(request, source=str(source))
    return load_tokens(request, open_model(model, tokenizer))


def parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def stories_text(n=12):
    if not TEXT.is_file():
        pytest.skip("../shared/data/tinystories_sample.txt is not here")
    return [line for line in TEXT.read_text(encoding="utf-8").splitlines() if line.strip()][:n]


def packed(tokenizer, texts, n, length):
    """Rows of texts, BOS before each, by the obvious way: every row is BOS and what follows in the stream; a
    BOS of the stream that would begin a row is the row's own."""
    bos = tokenizer.bos_token_id
    stream = [i for text in texts for i in tokenizer(text)["input_ids"]][1:]
    rows = []
    for _ in range(n):
        if stream[0] == bos:
            stream = stream[1:]
        rows.append([bos, *stream[: length - 1]])
        stream = stream[length - 1 :]
    return rows


class TestSelf:
    def test_the_same_seed_writes_the_same_text(self, tiny):
        first, again = tokens(tiny, "self"), tokens(tiny, "self")
        assert torch.equal(first.input_ids, again.input_ids)
        assert first.sha256 == again.sha256
        assert first.input_ids.shape == (4, 16)
        assert first.input_ids.dtype == torch.int64
        assert bool((first.input_ids[:, 0] == tiny.config.bos_token_id).all())

    def test_other_seeds_and_other_purposes_write_other_text(self, tiny):
        result = {
            tokens(tiny, "self", seed=seed, purpose=purpose).sha256
            for seed in (0, 1, 2)
            for purpose in ("calibration", "evaluation")
        }
        assert len(result) == 6
        assert seed_stream(0, "calibration") != seed_stream(0, "evaluation")

    def test_rows_differ_from_each_other(self, tiny):
        assert len(tokens(tiny, "self", samples=20).input_ids.unique(dim=0)) == 20

    def test_the_global_random_state_is_neither_used_nor_changed(self, tiny):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        before = tokens(tiny, "self").sha256
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert tokens(tiny, "self").sha256 == before

    def test_tokens_come_as_often_as_the_model_thinks(self, tiny):
        """Frequencies of the first written token against the model's own odds."""
        n = 4000
        ids = write_text(open_model(tiny), TextPlan(n, 2, 5, ((1,),)))
        with torch.no_grad():
            odds = tiny(ids[:1, :1]).logits[0, -1].softmax(-1)
        result = torch.bincount(ids[:, 1], minlength=96) / n
        assert float((result - odds).abs().sum()) / 2 < 0.1
        flat = torch.full((96,), 1 / 96)
        assert float((result - flat).abs().sum()) / 2 > 0.2

    def test_a_cached_run_writes_what_a_full_run_would(self, tiny, monkeypatch):
        """More sequences than are written together, and each step from the whole prefix."""
        monkeypatch.setattr(sampling, "SAMPLING_ROWS", 64)
        ids = write_text(open_model(tiny), TextPlan(70, 6, 1, ((tiny.config.bos_token_id,),)))
        generator = torch.Generator().manual_seed(1)
        rows = []
        for size in (64, 6):
            row = torch.full((size, 1), tiny.config.bos_token_id)
            uniform = torch.rand(6, size, generator=generator, dtype=torch.float64)
            for position in range(1, 6):
                with torch.no_grad():
                    odds = tiny(row, use_cache=False).logits[:, -1].double().softmax(-1)
                sums = odds.cumsum(-1) / odds.sum(-1, keepdim=True)
                row = torch.cat([row, torch.searchsorted(sums, uniform[position][:, None])], 1)
            rows.append(row)
        assert (ids == torch.cat(rows)).float().mean() > 0.99

    def test_rows_do_not_depend_on_how_many_there_are(self, tiny, monkeypatch):
        """What compress calibrates on is the beginning of what a search is given."""
        monkeypatch.setattr(sampling, "SAMPLING_ROWS", 8)
        for bos in (tiny.config.bos_token_id, None):
            monkeypatch.setattr(tiny.config, "bos_token_id", bos)
            few, many = (tokens(tiny, "self", samples=n).input_ids for n in (8, 20))
            assert torch.equal(few, many[:8])

    def test_rows_together_are_bounded_by_their_cache(self, tiny):
        config = tiny.config
        assert sampling_rows(config, 512, torch.float32) == 128
        row = cache_width(config) * 4
        most = sampling.SAMPLING_CACHE // row
        assert sampling_rows(config, most // 40, torch.float32) == 32
        assert sampling_rows(config, 4 * most, torch.float32) == 1

    def test_a_model_without_bos_starts_anywhere(self):
        model = tiny_model("gpt_neox")
        model.config.bos_token_id = None
        ids = tokens(model, "self", samples=30).input_ids
        assert len(ids[:, 0].unique()) > 5

    def test_it_begins_with_what_the_tokenizer_puts_before_a_text(self, tiny, stories):
        tokenizer = copy.deepcopy(stories[1])
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="</s> <s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        result = tokens(tiny, "self", tokenizer)
        assert result.prefix == (2, 1)
        assert result.input_ids[:, :2].tolist() == [[2, 1]] * 4
        assert len(result.input_ids.unique(dim=0)) == 4

    def test_a_tokenizer_that_adds_nothing_or_ids_of_another_model_changes_nothing(
        self, tiny, stories
    ):
        expected = tokens(tiny, "self")
        assert expected.prefix == (tiny.config.bos_token_id,)
        for template, number in (("$A", 1), ("<s> $A", 96)):  # the vocabulary is of 96
            tokenizer = copy.deepcopy(stories[1])
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=template, special_tokens=[("<s>", number)]
            )
            assert tokens(tiny, "self", tokenizer).sha256 == expected.sha256

    TURNS = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"

    def test_with_a_chat_template_every_other_row_is_a_chat(self, stories, monkeypatch):
        tokenizer = copy.deepcopy(stories[1])
        tokenizer.chat_template = self.TURNS
        monkeypatch.setattr(sampling, "SAMPLING_ROWS", 4)
        result = tokens(stories[0], "self", tokenizer, samples=10, seq_len=24)
        chat = tokenizer("<s>user: ", add_special_tokens=False)["input_ids"]
        rows = result.input_ids
        assert len(chat) > 2
        assert rows[1::2, : len(chat)].tolist() == [chat] * 5
        assert result.prefix == (1,)
        assert len(rows.unique(dim=0)) == 10
        assert not (rows[::2, 1:3] == rows[1, 1:3]).all(1).any()
        few = tokens(stories[0], "self", tokenizer, samples=4, seq_len=24)
        assert torch.equal(few.input_ids, rows[:4])

    def test_chats_alone_or_none(self, stories):
        plain, tokenizer = stories[1], copy.deepcopy(stories[1])
        tokenizer.chat_template = self.TURNS
        turn = tokenizer("<s>user: ", add_special_tokens=False)["input_ids"]
        chats = tokens(stories[0], "self", tokenizer, seq_len=24, chat=True).input_ids
        assert chats[:, : len(turn)].tolist() == [turn] * len(chats)
        texts = tokens(stories[0], "self", tokenizer, seq_len=24, chat=False)
        assert texts.sha256 == tokens(stories[0], "self", plain, seq_len=24).sha256
        for source in ("self", stories_text()):
            with pytest.raises(InputError, match="chat template, which it does not have"):
                tokens(stories[0], source, plain, seq_len=24, chat=True)

    def test_what_rows_begin_with_changes_nothing_behind_it(self, tiny):
        """A row is written the same beside rows with a longer beginning."""
        plan = TextPlan(6, 12, 3, ((1,), (1, 7, 9)))
        ids = write_text(open_model(tiny), plan)
        alone = write_text(open_model(tiny), replace(plan, prefixes=((1,),)))
        assert (ids[::2] == alone[::2]).float().mean() > 0.99
        assert ids[1::2, :3].tolist() == [[1, 7, 9]] * 3

    @pytest.mark.parametrize(
        "template",
        [
            "{{ raise_exception('no') }}",
            "{% for m in messages %}{{ m['role'] }}{% endfor %}",
            TURNS * 9,
        ],
        ids=["refuses", "leaves the message out", "is longer than half a row"],
    )
    def test_a_chat_template_that_does_not_serve_changes_nothing(self, tiny, stories, template):
        tokenizer = copy.deepcopy(stories[1])
        tokenizer.chat_template = "<s>" * 9 + template if template == self.TURNS * 9 else template
        assert tokens(tiny, "self", tokenizer).sha256 == tokens(tiny, "self", stories[1]).sha256

    def test_a_tokenizer_that_cannot_be_loaded_is_not_needed(self, tiny, tmp_path):
        class Broken:
            """A model whose tokenizer cannot be loaded."""

            config, vocabulary, precision = tiny.config, 96, torch.float32

            @property
            def tokenizer(self):
                raise InputError("no such tokenizer")

            def loaded(self):
                return tiny

        ids = torch.randint(0, 96, (4, 8))
        for source in ("self", ids, TestTensorFile().write(tmp_path, ids)):
            source = str(source) if isinstance(source, Path) else source
            request = TextRequest(source, None, 8, 4, "calibration", 0)
            assert load_tokens(request, Broken()).input_ids.shape == (4, 8)
        with pytest.raises(InputError, match="no such tokenizer"):
            load_tokens(TextRequest("bundled", None, 8, 4, "calibration", 0), Broken())

    def test_nothing_is_longer_than_the_context(self, tiny):
        assert tokens(tiny, "self", samples=2, seq_len=512).input_ids.shape == (2, 64)


class TestDraw:
    """Tokens drawn from logits."""

    @pytest.mark.parametrize("vocabulary", [7, 256, 600])
    def test_a_token_is_where_the_number_falls_among_the_summed_odds(self, vocabulary):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(500, vocabulary, generator=generator) * 3
        logits[:, ::3] = -torch.inf
        uniform = torch.rand(500, generator=generator, dtype=torch.float64)
        sums = logits.double().softmax(-1).cumsum(-1)
        expected = torch.searchsorted(sums, uniform[:, None], right=True)
        drawn = draw(logits, uniform)
        assert float((drawn == expected).float().mean()) > 0.99  # what is left is rounding
        assert bool(logits.gather(-1, drawn).isfinite().all())

    def test_the_ends_of_the_odds(self):
        logits = torch.full((2, 300), -torch.inf)
        logits[:, [40, 270]] = 0.0
        just_below = 1 - 2**-53
        uniform = torch.tensor([0.0, just_below], dtype=torch.float64)
        assert draw(logits, uniform)[:, 0].tolist() == [40, 270]

    def test_logits_that_are_not_finite(self):
        logits = torch.zeros(3, 10)
        logits[1, 4] = torch.nan
        with pytest.raises(NumericalError, match="not finite"):
            draw(logits, torch.rand(3, dtype=torch.float64))


class TestTensorFile:
    def write(self, folder, ids, name="input_ids"):
        save_file({name: ids}, folder / "ids.safetensors")
        return folder / "ids.safetensors"

    def test_rows_are_taken_in_order_and_cropped(self, tiny, tmp_path):
        ids = torch.randint(0, 96, (6, 100))
        path = self.write(tmp_path, ids)
        assert torch.equal(tokens(tiny, path, samples=3).input_ids, ids[:3, :16])
        assert torch.equal(tokens(tiny, path, samples=6, seq_len=500).input_ids, ids[:, :64])

    def test_without_samples_all_rows_up_to_the_default(self, tiny, tmp_path):
        assert len(tokens(tiny, self.write(tmp_path, torch.zeros(3, 8).long())).input_ids) == 3
        assert len(tokens(tiny, self.write(tmp_path, torch.zeros(9, 8).long())).input_ids) == 4

    @pytest.mark.parametrize("left", [True, False])
    def test_padding_by_the_attention_mask_is_left_out(self, tiny, tmp_path, left):
        rows = [torch.randint(2, 96, (n,)) for n in (5, 9, 20, 3)]
        shape = len(rows), 24
        ids, mask = torch.full(shape, 95), torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            place = slice(-len(row), None) if left else slice(len(row))
            ids[number, place], mask[number, place] = row, 1
        path = tmp_path / "ids.safetensors"
        save_file({"input_ids": ids, "attention_mask": mask}, path)
        result = tokens(tiny, path, samples=3)
        assert [row.tolist() for row in result.rows()] == [row[:16].tolist() for row in rows[:3]]
        assert result.record().size == "3 x up to 16 tokens"
        assert result.notes == (
            f"{path}: 38 tokens are padding by its attention_mask, and are left out",
        )
        in_memory = tokens(tiny, [row.tolist() for row in rows], samples=3)
        assert in_memory.sha256 == result.sha256
        assert in_memory.notes == ()

    def test_a_mask_of_ones_changes_nothing(self, tiny, tmp_path):
        ids = torch.randint(0, 96, (4, 12))
        path = tmp_path / "ids.safetensors"
        save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, path)
        result = tokens(tiny, path)
        assert (result.lengths, result.notes) == (None, ())
        assert result.sha256 == tokens(tiny, ids).sha256

    def test_masks_that_cannot_be(self, tiny, tmp_path):
        ids = torch.randint(0, 96, (4, 12))
        path = tmp_path / "ids.safetensors"
        for mask in (torch.ones(4, 11).long(), torch.ones(()).long(), torch.ones(4, 12)):
            save_file({"input_ids": ids, "attention_mask": mask}, path)
            with pytest.raises(InputError, match="attention_mask must be integers or booleans"):
                tokens(tiny, path)

    def test_the_prefix_is_bos_where_all_rows_begin_with_it(self, tiny, tmp_path):
        ids = torch.randint(2, 96, (4, 12))
        assert tokens(tiny, self.write(tmp_path, ids)).prefix == ()
        ids[:, 0] = tiny.config.bos_token_id
        assert tokens(tiny, self.write(tmp_path, ids)).prefix == (tiny.config.bos_token_id,)
        assert tokens(tiny, Tokens.of(ids)).prefix == (tiny.config.bos_token_id,)

    def test_int32_is_read_as_int64(self, tiny, tmp_path):
        path = self.write(tmp_path, torch.ones(2, 8, dtype=torch.int32))
        assert tokens(tiny, path).input_ids.dtype == torch.int64

    def test_the_record_says_what_was_used(self, tiny, tmp_path):
        ids = torch.randint(0, 96, (2, 8))
        path = self.write(tmp_path, ids)
        record = tokens(tiny, path).record()
        assert (record.source, record.samples, record.seq_len) == (str(path), 2, 8)
        assert record.sha256 == hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        assert len(set(record.rows)) == 2

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.full((2, 8), 96), r"token id 96, outside the model's vocabulary of 96"),
            (torch.full((2, 8), -1), r"token id -1, outside"),
            (torch.zeros(2, 8), r"must be int64 \[n, len\], got torch\.float32"),
            (torch.zeros(8, dtype=torch.int64), r"must be int64 \[n, len\]"),
            (torch.zeros(1, 2, 8, dtype=torch.int64), r"must be int64 \[n, len\]"),
            (torch.zeros(0, 8, dtype=torch.int64), "too little to predict"),
            (torch.zeros(2, 1, dtype=torch.int64), "too little to predict"),
            (torch.zeros(2, 0, dtype=torch.int64), "too little to predict"),
        ],
    )
    def test_ids_that_cannot_be_used(self, tiny, tmp_path, ids, message):
        with pytest.raises(InputError, match=message):
            tokens(tiny, self.write(tmp_path, ids))

    def test_too_few_rows(self, tiny, tmp_path):
        path = self.write(tmp_path, torch.zeros(2, 8).long())
        with pytest.raises(InputError, match=r"has 2 sequences, 3 were asked for: use --samples 2"):
            tokens(tiny, path, samples=3)

    def test_another_tensor_name(self, tiny, tmp_path):
        with pytest.raises(InputError, match="no tensor 'input_ids', only tokens"):
            tokens(tiny, self.write(tmp_path, torch.zeros(2, 8).long(), "tokens"))

    @pytest.mark.parametrize("data", [b"", b"not safetensors at all"])
    def test_not_a_tensor_file(self, tiny, tmp_path, data):
        path = tmp_path / "ids.safetensors"
        path.write_bytes(data)
        with pytest.raises(InputError, match="not a valid safetensors file"):
            tokens(tiny, path)

    def test_missing(self, tiny, tmp_path):
        with pytest.raises(InputError, match="does not exist"):
            tokens(tiny, tmp_path / "nowhere.safetensors")


class TestText:
    def sources(self, folder):
        texts = stories_text()
        (folder / "a.txt").write_text("\n".join(texts), encoding="utf-8")
        rows = "\n".join(json.dumps({"text": text, "n": 1}) for text in texts)
        (folder / "a.jsonl").write_text(rows + "\n\n", encoding="utf-8")
        parquet(folder / "a.parquet", text=texts, n=[1] * len(texts))
        return texts

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_documents_are_packed_in_order(self, stories, tmp_path, suffix):
        model, tokenizer = stories
        texts = self.sources(tmp_path)
        result = tokens(model, tmp_path / f"a.{suffix}", tokenizer, samples=3, seq_len=40)
        assert result.input_ids.tolist() == packed(tokenizer, texts, 3, 40)
        assert result.prefix == (tokenizer.bos_token_id,)

    def test_plain_text_is_one_document(self, stories, tmp_path):
        model, tokenizer = stories
        self.sources(tmp_path)
        text = (tmp_path / "a.txt").read_text(encoding="utf-8")
        result = tokens(model, tmp_path / "a.txt", tokenizer, samples=3, seq_len=40)
        assert result.input_ids.tolist() == packed(tokenizer, [text], 3, 40)

    def test_rows_are_cropped_to_the_context(self, stories):
        model, tokenizer = stories
        stories_text()
        assert tokens(model, TEXT, tokenizer, samples=2, seq_len=4000).input_ids.shape == (2, 512)

    def test_bundled_text_differs_by_seed_and_purpose_and_repeats(self, stories):
        model, tokenizer = stories
        result = [
            tokens(model, "bundled", tokenizer, seed=seed, purpose=purpose).sha256
            for seed, purpose in
            ((0, "calibration"), (0, "calibration"), (1, "calibration"), (0, "evaluation"))
        ]  # fmt: skip
        assert result[0] == result[1]
        assert len(set(result)) == 3

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
    def test_a_local_folder_through_the_datasets_library(
        self, stories, tmp_path, suffix, monkeypatch
    ):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        model, tokenizer = stories
        self.sources(tmp_path)
        data = tmp_path / "data"
        data.mkdir()
        (tmp_path / f"a.{suffix}").rename(data / f"train.{suffix}")
        expected = packed(tokenizer, stories_text(), 2, 40)
        for source in (f"hf:{data}", f"hf:{data}::train:text"):
            result = tokens(model, source, tokenizer, samples=2, seq_len=40)
            assert result.input_ids.tolist() == expected
        with pytest.raises(InputError, match=r"no text column 'body' \(it has: "):
            tokens(model, f"hf:{data}:::body", tokenizer)
        with pytest.raises(InputError, match="no text column 'n'"):
            tokens(model, f"hf:{data}:::n", tokenizer)
        with pytest.raises(InputError, match="cannot be read"):
            tokens(model, f"hf:{data}::no_such_split", tokenizer)

    def test_a_dataset_that_is_nowhere(self, stories, tmp_path):
        pytest.importorskip("datasets")
        model, tokenizer = stories
        with pytest.raises(InputError, match="cannot be read"):
            tokens(model, f"hf:{tmp_path / 'nowhere'}", tokenizer)

    @pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d:e"])
    def test_a_dataset_name_that_is_none(self, stories, source):
        with pytest.raises(InputError, match=r"use hf:NAME"):
            tokens(stories[0], source, stories[1])

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet", "dataset"])
    def test_null_rows_are_left_out(self, stories, tmp_path, suffix):
        model, tokenizer = stories
        texts = stories_text()
        rows = [texts[0], None, *texts[1:], None]
        if suffix == "dataset":
            source = pytest.importorskip("datasets").Dataset.from_dict({"text": rows})
        elif suffix == ".parquet":
            source = parquet(tmp_path / "a.parquet", text=rows)
        else:
            source = tmp_path / "a.jsonl"
            source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        result = tokens(model, source, tokenizer, samples=3, seq_len=40)
        assert torch.equal(
            result.input_ids, tokens(model, texts, tokenizer, samples=3, seq_len=40).input_ids
        )

    @pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
    def test_a_byte_order_mark_is_no_text(self, stories, tmp_path, suffix):
        model, tokenizer = stories
        text = " ".join(stories_text())
        content = text if suffix == ".txt" else json.dumps({"text": text})
        results = []
        for encoding in ("utf-8", "utf-8-sig"):
            path = tmp_path / f"{encoding}{suffix}"
            path.write_text(content, encoding=encoding)
            results.append(tokens(model, path, tokenizer, samples=3, seq_len=40).input_ids)
        assert torch.equal(*results)

    @pytest.mark.parametrize("cut", ["\ud83d", "a \ud83d\ud83d"])
    def test_half_a_surrogate_pair_is_a_character_that_is_not_known(self, stories, tmp_path, cut):
        model, tokenizer = stories
        rest = " ".join(stories_text())
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"text": cut + rest}))
        shown = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in cut)
        expected = tokens(model, [shown + rest], tokenizer, samples=3, seq_len=40)
        for source in (path, [cut + rest]):
            result = tokens(model, source, tokenizer, samples=3, seq_len=40)
            assert torch.equal(result.input_ids, expected.input_ids)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"text": null}\n', "is empty"),
            ("a.txt", "", "is empty"),
            ("a.txt", " \n\n ", "is empty"),
            ("a.txt", b"\xff\xfe\xfa", "not UTF-8"),
            ("a.jsonl", "", "is empty"),
            ("a.jsonl", '{"text": ""}\n', "is empty"),
            ("a.jsonl", '{"text": "a"}\nnot json\n', r"line 2 is not JSON"),
            (
                "a.jsonl",
                '{"body": "a", "n": 1}\n',
                r"line 1 has no string field 'text' \(it has: body, n",
            ),
            ("a.jsonl", '{"text": 3}\n', r"line 1 has no string field 'text'"),
            ("a.jsonl", '["a"]\n', r"line 1 has no string field 'text' \(it has: list"),
            ("a.jsonl", b"\xff\xfe\xfa", "not UTF-8"),
            ("a.parquet", "no parquet", "not a valid parquet file"),
            ("a.csv", "text\na\n", r"'.*a\.csv' is not known: use bundled, self, a \.txt"),
            ("a", "text", "is not known"),
        ],
    )
    def test_files_that_cannot_be_used(self, stories, tmp_path, name, content, message):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(InputError, match=message):
            tokens(stories[0], path, stories[1])

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"body": ["a"]}, r"no column 'text' \(it has: body\)"),
            ({"text": [1, 2]}, r"row 0 has no string field 'text' \(it holds int\)"),
            ({"text": ["", None]}, "is empty"),
        ],
    )
    def test_parquet_columns_that_cannot_be_used(self, stories, tmp_path, columns, message):
        with pytest.raises(InputError, match=message):
            tokens(stories[0], parquet(tmp_path / "a.parquet", **columns), stories[1])

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
    def test_missing(self, stories, tmp_path, name):
        with pytest.raises(InputError, match="does not exist"):
            tokens(stories[0], tmp_path / name, stories[1])

    def test_the_message_names_how_many_sequences_there_are(self, stories, tmp_path):
        model, tokenizer = stories
        path = tmp_path / "a.txt"
        path.write_text(stories_text(1)[0], encoding="utf-8")
        # Each row begins with BOS, which leaves room for 7 tokens of the text.
        n = (len(tokenizer(path.read_text(encoding="utf-8"))["input_ids"]) - 1) // 7
        with pytest.raises(InputError, match=rf"enough for {n} sequences of 8.*--samples {n}"):
            tokens(model, path, tokenizer, samples=n + 1, seq_len=8)
        assert tokens(model, path, tokenizer, samples=n, seq_len=8).input_ids.shape == (n, 8)
        path.write_text("Once upon a time.", encoding="utf-8")
        with pytest.raises(InputError, match=r"gives \d+ tokens, enough for 0 sequences of 16; 4 "):
            tokens(model, path, tokenizer, samples=4)

    def test_without_a_number_what_there_is_is_used_aloud(self, stories, tmp_path):
        model, tokenizer = stories
        path = tmp_path / "a.txt"
        text = stories_text(1)[0]
        path.write_text(text, encoding="utf-8")
        n = (len(tokenizer(text)["input_ids"]) - 1) // 149
        assert 1 < n < 4
        result = tokens(model, path, tokenizer, seq_len=150)
        assert result.input_ids.tolist() == packed(tokenizer, [text], n, 150)
        assert result.notes == (
            f"{path} gives {n} sequences of 150 tokens, fewer than the 4 taken by default",
        )
        assert tokens(model, path, tokenizer, seq_len=8).notes == ()

    def test_less_than_a_row_is_one_that_is_shorter(self, stories):
        model, tokenizer = stories
        result = tokens(model, ["Once upon a time."], tokenizer, seq_len=60)
        assert result.input_ids.tolist() == [tokenizer("Once upon a time.")["input_ids"]]
        assert "gives 1 sequence of 6 tokens, fewer than the 4 taken" in result.notes[0]
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
        with pytest.raises(InputError, match="gives 1 tokens, too little to predict: use more"):
            tokens(model, ["a"], tokenizer, seq_len=60)

    @pytest.mark.parametrize("source", ["a.txt", "bundled", "hf:name"])
    def test_text_needs_a_tokenizer(self, tiny, source):
        with pytest.raises(InputError, match="is text, but the model has no tokenizer"):
            tokens(tiny, source)

    def test_a_tokenizer_of_another_model(self, tiny, stories, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text(" ".join(stories_text()), encoding="utf-8")
        with pytest.raises(InputError, match=r"outside the model's vocabulary of 96"):
            tokens(tiny, path, stories[1])


class TestChats:
    """Chats of every kind of source are what the tokenizer's template makes of them."""

    TEMPLATE = (
        "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    )

    def chats(self):
        return [
            [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:]}]
            for text in stories_text()
        ]

    def templated(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = self.TEMPLATE
        return tokenizer

    def sources(self, folder, column):
        """Each kind of source, with messages in a column."""
        datasets = pytest.importorskip("datasets")
        rows = [{"n": number, column: chat} for number, chat in enumerate(self.chats())]
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = datasets.Dataset.from_list(rows)
        dataset.to_parquet(folder / "a.parquet")
        (folder / "data").mkdir()
        (folder / "data/train.jsonl").write_text((folder / "a.jsonl").read_text())
        return folder / "a.jsonl", folder / "a.parquet", dataset, f"hf:{folder / 'data'}"

    @pytest.mark.parametrize("column", ["messages", "conversations"])
    def test_the_template_makes_the_text(self, stories, tmp_path, column, monkeypatch):
        sources = self.sources(tmp_path, column)
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_OFFLINE", True)
        model, tokenizer = stories[0], self.templated(stories[1])
        stream = [
            i
            for chat in self.chats()
            for message in chat
            for i in tokenizer(
                f"<s>{message['role']}: {message['content']} ", add_special_tokens=False
            )["input_ids"]
        ]
        for source in sources:
            result = tokens(model, source, tokenizer, samples=3, seq_len=40)
            assert result.notes == ()
            assert bool((result.input_ids[:, 0] == 1).all())
            assert result.input_ids[0].tolist() == stream[:40]  # the template's BOS, once

    def test_a_column_that_is_named(self, stories, tmp_path, monkeypatch):
        name = self.sources(tmp_path, "talk")[3]
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_OFFLINE", True)
        model, tokenizer = stories[0], self.templated(stories[1])
        result = tokens(model, f"{name}:::talk", tokenizer, samples=3, seq_len=40)
        expected = tokens(model, self.dataset("messages"), tokenizer, samples=3, seq_len=40)
        assert torch.equal(result.input_ids, expected.input_ids)
        with pytest.raises(InputError, match="has no text column 'text'"):
            tokens(model, name, tokenizer)

    def dataset(self, column):
        datasets = pytest.importorskip("datasets")
        return datasets.Dataset.from_list([{column: chat} for chat in self.chats()])

    def test_without_a_template_the_contents_are_joined_aloud(self, stories):
        model, tokenizer = stories
        result = tokens(model, self.dataset("messages"), tokenizer, samples=3, seq_len=40)
        texts = ["\n\n".join(message["content"] for message in chat) for chat in self.chats()]
        assert result.input_ids.tolist() == packed(tokenizer, texts, 3, 40)
        assert "the tokenizer has no chat template" in result.notes[0]

    def test_the_template_for_all_text_or_for_none(self, stories):
        model, tokenizer = stories[0], self.templated(stories[1])
        texts = stories_text()
        users = [[{"role": "user", "content": text}] for text in texts]
        chats = pytest.importorskip("datasets").Dataset.from_list([{"messages": u} for u in users])
        asked = {"samples": 3, "seq_len": 40}
        as_chats = tokens(model, texts, tokenizer, chat=True, **asked)
        assert as_chats.sha256 == tokens(model, chats, tokenizer, **asked).sha256
        as_texts = tokens(model, chats, tokenizer, chat=False, **asked)
        assert as_texts.sha256 == tokens(model, texts, tokenizer, **asked).sha256
        assert as_texts.notes == ()

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"messages": 3}', "line 2 has no list of messages field 'messages'"),
            ('{"messages": [{"role": "user"}, 3]}', "line 2: 'messages' holds int"),
            ('{"messages": [{"role": "system", "content": "a"}]}', "line 2: .*refuses.*no system"),
        ],
    )
    def test_rows_that_cannot_be_used(self, stories, tmp_path, line, message):
        model, tokenizer = stories[0], self.templated(stories[1])
        tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + self.TEMPLATE
        )
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"messages": self.chats()[0]}) + f"\n{line}\n")
        with pytest.raises(InputError, match=message):
            tokens(model, path, tokenizer, seq_len=400)


class TestMemory:
    """Texts and token ids that are not in files."""

    def test_token_ids(self, tiny):
        ids = torch.randint(0, 96, (6, 20))
        for source in (ids, ids.to(torch.int32), ids.tolist()):
            result = tokens(tiny, source, samples=5)
            assert torch.equal(result.input_ids, ids[:5, :16])
            assert result.source == "token ids in memory"

    @pytest.mark.parametrize(
        "source", [[[1, 2], [3.5, 4, 5]], [[0.5, 1.0]], [["a"]], [[1, 2], "ab"]]
    )
    def test_what_are_no_token_ids(self, tiny, source):
        with pytest.raises(InputError, match="input_ids must be int64"):
            tokens(tiny, source)

    def test_a_list_of_strings_is_documents(self, stories):
        model, tokenizer = stories
        texts = stories_text()
        result = tokens(model, texts, tokenizer, samples=3, seq_len=40)
        assert result.input_ids.tolist() == packed(tokenizer, texts, 3, 40)
        assert result.source == "texts in memory"

    def test_a_dataset_is_documents(self, stories):
        datasets = pytest.importorskip("datasets")
        model, tokenizer = stories
        texts = stories_text()
        dataset = datasets.Dataset.from_dict({"text": texts, "n": [1] * len(texts)})
        result = tokens(model, dataset, tokenizer, samples=3, seq_len=40)
        assert result.input_ids.tolist() == packed(tokenizer, texts, 3, 40)
        assert result.source == "a dataset in memory"
        with pytest.raises(InputError, match="no column 'text'"):
            tokens(model, dataset.remove_columns("text"), tokenizer)

    def test_rows_of_differing_length(self, tiny):
        rows = [[5, 6, 7], [8, 9], list(range(2, 30))]
        result = tokens(tiny, rows)
        assert [row.tolist() for row in result.rows()] == [rows[0], rows[1], rows[2][:16]]
        with pytest.raises(InputError, match="row 1 has 1 token, too little to predict"):
            tokens(tiny, [[1, 2], [3]])

    def test_loaded_tokens_stay_as_they_are(self, tiny):
        loaded = tokens(tiny, "self")
        assert tokens(tiny, loaded) is loaded

    @pytest.mark.parametrize("source", [3, {"text": "a"}, None])
    def test_what_is_no_source(self, stories, source):
        with pytest.raises(InputError, match=f"of type {type(source).__name__} is not known"):
            tokens(stories[0], source, stories[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, r"samples 0 must be at least 1"),
        ({"samples": -3}, r"samples -3 must be at least 1"),
        ({"seq_len": 1}, r"seq-len 1 must be at least 2"),
        ({"seq_len": 0}, r"seq-len 0 must be at least 2"),
    ],
)
def test_counts_that_cannot_be(tiny, settings, message):
    with pytest.raises(InputError, match=message):
        tokens(tiny, "self", **settings)


def test_a_recovery_takes_an_equal_part_of_each_source():
    text = RecoveryText(("self", "a.txt", "b.txt"), samples=10, seq_len=64)
    requests = recovery_requests(text, 3)
    assert [each.source for each in requests] == ["self", "a.txt", "b.txt"]
    assert sorted(each.samples for each in requests) == [3, 3, 4]
    assert {(each.seq_len, each.purpose, each.seed) for each in requests} == {(64, "recovery", 3)}
    assert [each.default_samples for each in recovery_requests(RecoveryText(("self", "a.txt")), 0)] == [
        256, 256,
    ]  # fmt: skip
    held = held_out_request(text, 3)
    assert (held.source, held.purpose, held.samples, held.default_samples) == (
        "self", "held-out", None, 64,
    )  # fmt: skip
    with pytest.raises(InputError, match="samples 2 must be at least 3"):
        recovery_requests(replace(text, samples=2), 0)
