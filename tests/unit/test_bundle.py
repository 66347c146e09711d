from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from edgeflex.bundle import (
    EXPECTED,
    MANIFEST_NAME,
    PROGRAM,
    open_bundle,
    seal,
    seen_digests,
    seen_text,
    write_manifest,
)
from edgeflex.errors import BundleError, InputError
from tests.toy_bundle import toy_program, write_toy_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edgeflex.bundle import Bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_toy_bundle(tmp_path / "bundle", seen=("b" * 16, "a" * 16, "a" * 16))


def edit_manifest(bundle: Bundle, **fields: object) -> None:
    path = bundle.path / MANIFEST_NAME
    document = json.loads(path.read_text())
    document.update(fields)
    path.write_text(json.dumps(document))


def edit_entry(bundle: Bundle, role: str, **fields: object) -> None:
    entries = [entry.model_dump() for entry in bundle.manifest.files]
    for entry in entries:
        if entry["role"] == role:
            entry.update(fields)
    edit_manifest(bundle, files=entries)


def flip_bit(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(bytes(raw))


def test_opening_gives_back_what_was_written(bundle: Bundle) -> None:
    again = open_bundle(bundle.path)
    assert again == bundle
    assert again.manifest.digest() == bundle.manifest.digest()
    assert again.file(PROGRAM).read_bytes() == toy_program()


def test_a_bundle_can_be_moved(bundle: Bundle, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(bundle.path, moved)
    assert open_bundle(moved).file(EXPECTED).parent == moved


def test_seen_digests_are_sorted_once_each_and_read_back(bundle: Bundle) -> None:
    assert seen_text(["b", "a", "b"]) == "a\nb\n"
    assert seen_digests(bundle) == {"a" * 16, "b" * 16}


def test_extra_files_are_ignored(bundle: Bundle) -> None:
    (bundle.path / "notes.txt").write_text("mine")
    assert open_bundle(bundle.path) == bundle


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_one_flipped_bit_is_found_and_the_file_named(bundle: Bundle, position: int) -> None:
    flip_bit(bundle.file(PROGRAM), position)
    with pytest.raises(BundleError, match=r"program\.pte: the content differs.*Export it again"):
        open_bundle(bundle.path)


def test_a_truncated_file_is_found_with_both_sizes(bundle: Bundle) -> None:
    path = bundle.file(PROGRAM)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BundleError, match=rf"program\.pte: {size - 7} bytes, the manifest says {size}"):
        open_bundle(bundle.path)


def test_every_fault_is_named_at_once(bundle: Bundle) -> None:
    bundle.file(PROGRAM).unlink()
    flip_bit(bundle.file(EXPECTED), 40)
    with pytest.raises(BundleError, match=r"expected\.safetensors: the content.*program\.pte: the file is missing"):
        open_bundle(bundle.path)


def test_a_missing_manifest_is_a_damaged_bundle(bundle: Bundle) -> None:
    (bundle.path / MANIFEST_NAME).unlink()
    with pytest.raises(BundleError, match=r"manifest\.json.*no bundle.*export it again"):
        open_bundle(bundle.path)


@pytest.mark.parametrize("text", ["", "{", "\xff\x00", "[]", "{}", "[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_refused(bundle: Bundle, text: str) -> None:
    (bundle.path / MANIFEST_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match="manifest"):
        open_bundle(bundle.path)


def test_another_version_is_named_before_anything_else(bundle: Bundle) -> None:
    edit_manifest(bundle, schema_version=2, unheard_of=1)
    with pytest.raises(BundleError, match=r"schema version 2; this edgeflex reads version 1"):
        open_bundle(bundle.path)


def test_an_unknown_field_is_refused(bundle: Bundle) -> None:
    edit_manifest(bundle, surprise=1)
    with pytest.raises(BundleError, match="surprise"):
        open_bundle(bundle.path)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../outside.pte", "a/../../outside.pte", "C:\\outside.pte", "..\\outside.pte", "", "a\0b"]
)
def test_a_path_that_leaves_the_folder_is_refused(bundle: Bundle, path: str) -> None:
    (bundle.path.parent / "outside.pte").write_bytes(toy_program())
    edit_entry(bundle, PROGRAM, path=path)
    with pytest.raises(BundleError, match="not relative and inside the folder"):
        open_bundle(bundle.path)


def test_a_link_that_leaves_the_folder_is_refused_even_with_the_right_content(bundle: Bundle) -> None:
    outside = bundle.path.parent / "outside.pte"
    shutil.move(bundle.file(PROGRAM), outside)
    bundle.file(PROGRAM).symlink_to(outside)
    with pytest.raises(BundleError, match="outside the folder through a link"):
        open_bundle(bundle.path)


def test_a_linked_parent_folder_is_refused_too(bundle: Bundle) -> None:
    outside = bundle.path.parent / "outside"
    outside.mkdir()
    shutil.copy(bundle.file(PROGRAM), outside / "program.pte")
    (bundle.path / "inner").symlink_to(outside)
    edit_entry(bundle, PROGRAM, path="inner/program.pte")
    with pytest.raises(BundleError, match="outside the folder through a link"):
        open_bundle(bundle.path)


def test_a_folder_in_place_of_a_file_is_missing(bundle: Bundle) -> None:
    bundle.file(PROGRAM).unlink()
    bundle.file(PROGRAM).mkdir()
    with pytest.raises(BundleError, match="the file is missing"):
        open_bundle(bundle.path)


def test_two_entries_of_one_role_are_refused(bundle: Bundle) -> None:
    entries = [entry.model_dump() for entry in bundle.manifest.files]
    edit_manifest(bundle, files=[*entries, {**entries[0], "path": "seen.txt"}])
    with pytest.raises(BundleError, match="named 2 times"):
        open_bundle(bundle.path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_a_damaged_bundle(bundle: Bundle) -> None:
    bundle.file(PROGRAM).chmod(0)
    with pytest.raises(BundleError, match="Permission denied"):
        open_bundle(bundle.path)


def test_an_unknown_role_names_those_that_are_there(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no 'engine' file \(it names: expected, program, seen\)"):
        bundle.file("engine")


def test_no_folder_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        open_bundle(tmp_path / "nothing")


def test_sealing_refuses_what_lies_outside(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    (tmp_path / "in").mkdir()
    with pytest.raises(BundleError, match="cannot seal"):
        seal(tmp_path / "in", {"program": "../outside"})
    with pytest.raises(BundleError, match="missing"):
        seal(tmp_path / "in", {"program": "absent"})


def test_writing_a_manifest_over_other_files_is_found_at_once(bundle: Bundle) -> None:
    flip_bit(bundle.file(PROGRAM), 100)
    with pytest.raises(BundleError, match="differs"):
        write_manifest(bundle.path, bundle.manifest)


def test_opening_a_bundle_loads_no_framework(bundle: Bundle) -> None:
    code = (
        "import sys, pathlib, edgeflex.registry; from edgeflex.bundle import open_bundle; "
        "open_bundle(pathlib.Path(sys.argv[1])); print({'torch', 'numpy', 'executorch', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle.path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
