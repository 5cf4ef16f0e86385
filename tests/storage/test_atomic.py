"""Folders appear whole or not at all, and nothing is lost."""

import errno
import os
from pathlib import Path

import pytest

from srcr.errors import InputError, SrcrError
from srcr.storage.atomic import atomic_output, check_output, partial_path
from srcr.storage.layout import JOURNAL, RECORD


class TestCheckOutput:
    @pytest.fixture
    def model(self, tmp_path):
        (tmp_path / "models/base").mkdir(parents=True)
        return tmp_path / "models/base"

    def test_a_new_name_is_fine(self, model, tmp_path):
        check_output(tmp_path / "out", model, overwrite=False)

    @pytest.mark.parametrize("path", ["", ".", "..", "/", "../.."])
    def test_a_path_without_a_name_is_refused(self, model, path):
        with pytest.raises(InputError, match="has no name of its own"):
            check_output(Path(path), model, overwrite=True)

    @pytest.mark.parametrize("name", ["out", "out.partial"])
    def test_what_exists_is_refused(self, model, tmp_path, name):
        (tmp_path / name).mkdir()
        with pytest.raises(InputError, match=rf"{name} exists: .*--overwrite"):
            check_output(tmp_path / "out", model, overwrite=False)
        check_output(tmp_path / "out", model, overwrite=True)

    def test_an_earlier_result_may_be_overwritten(self, model, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / RECORD).write_text("{}")
        check_output(tmp_path / "out", model, overwrite=True)

    def test_somebody_elses_folder_is_never_replaced(self, model, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("years of work")
        with pytest.raises(InputError, match=r"did not write.*even with --overwrite"):
            check_output(tmp_path / "out", model, overwrite=True)

    @pytest.mark.parametrize("name", ["out", "out.partial"])
    def test_files_and_links_are_never_replaced(self, model, tmp_path, name):
        (tmp_path / name).write_text("a file")
        with pytest.raises(InputError, match="is not a folder"):
            check_output(tmp_path / "out", model, overwrite=True)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(model)
        with pytest.raises(InputError):
            check_output(tmp_path / "out", model, overwrite=True)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError):
            check_output(tmp_path / "out", model, overwrite=False)

    @pytest.mark.parametrize("path", ["models/base", "models", "models/../models/base"])
    def test_the_model_itself_is_never_replaced(self, model, tmp_path, path):
        with pytest.raises(InputError, match="is or holds the model itself"):
            check_output(tmp_path / path, model, overwrite=True)

    def test_the_model_behind_a_link_is_never_replaced(self, model, tmp_path):
        (tmp_path / "link").symlink_to(model)
        with pytest.raises(InputError, match="is or holds the model itself"):
            check_output(model, tmp_path / "link", overwrite=True)

    def test_missing_parents_are_made_but_a_file_in_their_place_is_refused(self, model, tmp_path):
        check_output(tmp_path / "new/deep/out", model, overwrite=False)
        assert not (tmp_path / "new").exists()
        with atomic_output(tmp_path / "new/deep/out", model, overwrite=False):
            pass
        assert (tmp_path / "new/deep/out").is_dir()
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is a file, not a folder"):
            check_output(tmp_path / "file/out", model, overwrite=False)


class TestAtomicOutput:
    def write(self, out, overwrite=True):
        return atomic_output(out, out.parent / "no-model", overwrite)

    def earlier(self, out):
        out.mkdir()
        (out / RECORD).write_text("old")

    def fail_with(self, error, out):
        with self.write(out) as journal:
            (journal.folder / "a").write_text("half")
            raise error

    def test_success_renames(self, tmp_path):
        with self.write(tmp_path / "out") as journal:
            assert journal.folder == partial_path(tmp_path / "out")
            (journal.folder / "a").write_text("new")
            assert not (tmp_path / "out").exists()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_earlier_result_is_replaced_only_at_the_end(self, tmp_path):
        self.earlier(tmp_path / "out")
        with self.write(tmp_path / "out"):
            assert (tmp_path / "out" / RECORD).exists()
        assert not (tmp_path / "out" / RECORD).exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_appears_during_a_long_run_is_not_replaced_unasked(self, tmp_path):
        with pytest.raises(InputError, match="exists"), self.write(tmp_path / "out", False):
            self.earlier(tmp_path / "out")
        assert (tmp_path / "out" / RECORD).read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_result_that_was_put_aside_is_never_lost(self, tmp_path):
        self.earlier(tmp_path / "out.replaced")
        with (
            pytest.raises(InputError, match="Move it back or remove it"),
            self.write(tmp_path / "out"),
        ):
            pass
        assert (tmp_path / "out.replaced" / RECORD).exists()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, InputError])
    def test_failure_leaves_nothing_and_keeps_the_earlier_result(self, tmp_path, error):
        self.earlier(tmp_path / "out")
        with pytest.raises(error):
            self.fail_with(error("stop"), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out" / RECORD).read_text() == "old"

    def test_a_disk_that_refuses_is_named(self, tmp_path):
        with pytest.raises(SrcrError, match=r"writing .*out failed: .*No space left"):
            self.fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), tmp_path / "new/out")
        assert not list(tmp_path.iterdir())

    def test_a_leftover_does_not_leak_into_the_result(self, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial" / JOURNAL).touch()
        (tmp_path / "out.partial/junk").write_text("old")
        with self.write(tmp_path / "out"):
            pass
        assert not list((tmp_path / "out").iterdir())

    def test_a_model_in_the_place_of_the_work_in_progress_is_never_removed(self, tmp_path):
        (tmp_path / "out.partial").mkdir()
        (tmp_path / "out.partial/config.json").write_text("{}")
        model = tmp_path / "out.partial"
        with pytest.raises(InputError, match="holds the model itself"):
            check_output(tmp_path / "out", model, overwrite=True)
        with pytest.raises(InputError, match="did not write"):
            check_output(tmp_path / "out", tmp_path / "elsewhere", overwrite=True)
