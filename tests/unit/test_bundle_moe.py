from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from edgeflex.bundle import MANIFEST_NAME
from edgeflex.bundle_moe import (
    TOKENIZER,
    DecoderBundle,
    bundle_kind,
    open_decoder_bundle,
    seal_file,
    write_decoder_manifest,
)
from edgeflex.errors import BundleError, InputError
from edgeflex.schema import Precision
from edgeflex.schema_moe import StockProgram
from tests.tiny_decoder import write_tiny_bundle
from tests.toy_bundle import write_toy_bundle

if TYPE_CHECKING:
    from pathlib import Path

EXPERT = "weights/layers.1/expert.2.ptd"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle")


def edit(folder: Path, change) -> None:
    path = folder / MANIFEST_NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def entry_of(document, path: str):
    return next(entry for entry in document["files"] if entry["path"] == path)


def test_a_whole_bundle_opens_and_every_file_checks(folder):
    bundle = open_decoder_bundle(folder)
    heard: list[int] = []
    bundle.check_all(heard.append)
    assert sum(heard) == sum(entry.size_bytes for entry in bundle.manifest.files)
    assert bundle.check(EXPERT) == folder / EXPERT
    record = bundle.matrices["layers.1.experts.2.down"]
    assert record.file == EXPERT
    assert bundle.files[EXPERT].size_bytes == (folder / EXPERT).stat().st_size


def test_a_manifest_that_is_written_is_read_back(folder):
    (folder / "tokenizer.json").write_text("{}")
    manifest = open_decoder_bundle(folder).manifest
    entry = seal_file(folder, "tokenizer.json", TOKENIZER)
    more = manifest.model_copy(update={"files": (*manifest.files, entry)})
    bundle = write_decoder_manifest(folder, more)
    assert bundle.manifest == more.model_copy(update={"layout_digest": bundle.manifest.layout_digest})
    assert bundle.role(TOKENIZER) == folder / "tokenizer.json"
    with pytest.raises(BundleError, match="no 'spoken' file"):
        bundle.role("spoken")


def test_what_lies_beside_is_ignored(folder):
    (folder / "packed-other").mkdir()
    (folder / "packed-other" / "layer-000.bin").write_bytes(b"x")
    open_decoder_bundle(folder)


def test_missing_and_truncated_files_are_told_together_when_opening(folder):
    (folder / EXPERT).unlink()
    other = folder / "weights/layers.2/expert.0.ptd"
    other.write_bytes(other.read_bytes()[:-1])
    with pytest.raises(BundleError, match="is missing") as caught:
        open_decoder_bundle(folder)
    assert "layers.2/expert.0.ptd" in str(caught.value)
    assert "the manifest says" in str(caught.value)


def test_a_list_of_a_thousand_faults_stays_readable(folder):
    for path in folder.rglob("*.ptd"):
        path.unlink()
    with pytest.raises(BundleError, match=r"and [0-9]+ more") as caught:
        open_decoder_bundle(folder)
    assert len(str(caught.value)) < 2500


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_flipped_bit_is_found_before_the_file_is_used(folder, place):
    path = folder / EXPERT
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.write_bytes(bytes(raw))
    bundle = open_decoder_bundle(folder)  # opening hashes nothing
    with pytest.raises(BundleError, match=r"expert\.2\.ptd: the content differs"):
        bundle.check(EXPERT)
    with pytest.raises(BundleError, match=r"expert\.2\.ptd: the content differs"):
        bundle.check_all()
    bundle.check("weights/layers.1/expert.1.ptd")


def test_experts_that_changed_places_are_found_before_they_are_used(folder):
    first, second = folder / EXPERT, folder / "weights/layers.2/expert.4.ptd"
    assert first.stat().st_size == second.stat().st_size
    swapped = first.read_bytes(), second.read_bytes()
    first.write_bytes(swapped[1])
    second.write_bytes(swapped[0])
    bundle = open_decoder_bundle(folder)
    for path in (EXPERT, "weights/layers.2/expert.4.ptd"):
        with pytest.raises(BundleError, match="the content differs"):
            bundle.check(path)


def test_a_file_that_goes_away_after_opening_is_an_error_of_the_bundle(folder):
    bundle = open_decoder_bundle(folder)
    (folder / EXPERT).unlink()
    with pytest.raises(BundleError, match="is missing"):
        bundle.check(EXPERT)
    with pytest.raises(BundleError, match="names no file"):
        bundle.check("weights/layers.9/expert.0.ptd")


@pytest.mark.parametrize(
    "path", ["../outside.ptd", "/etc/hostname", "weights/../../outside.ptd", "a\\b", "C:/x", "", "a\0b"]
)
def test_paths_that_leave_the_folder_are_refused(folder, path):
    (folder.parent / "outside.ptd").write_bytes(b"secret")
    edit(folder, lambda document: entry_of(document, EXPERT).update(path=path))
    with pytest.raises(BundleError, match="not relative and inside"):
        open_decoder_bundle(folder)


@pytest.mark.parametrize("linked", [EXPERT, "weights/layers.1"])
def test_links_that_leave_the_folder_are_refused(folder, linked):
    away = folder.parent / "away"
    (folder / linked).rename(away)
    (folder / linked).symlink_to(away)
    with pytest.raises(BundleError, match="leads outside"):
        open_decoder_bundle(folder)


def test_links_inside_the_folder_are_followed_and_circles_refused(folder):
    (folder / EXPERT).rename(folder / "moved.ptd")
    (folder / EXPERT).symlink_to(folder / "moved.ptd")
    open_decoder_bundle(folder).check(EXPERT)
    (folder / EXPERT).unlink()
    (folder / EXPERT).symlink_to(folder / EXPERT)
    with pytest.raises(BundleError, match="damaged"):
        open_decoder_bundle(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document["matrices"][3].update(offset=1 << 40), "reaches beyond"),
        (lambda document: document["matrices"][3].update(offset=-8), "reaches beyond"),
        (lambda document: document["matrices"][3].update(rows=0), "reaches beyond"),
        (lambda document: document["matrices"][0].update(scales_offset=None), "lacks its scales"),
        (lambda document: document["matrices"][0].update(scales_offset=1 << 40), "reaches beyond"),
        (lambda document: document["matrices"][3].update(file="weights/none.ptd"), "does not name"),
        (lambda document: document["matrices"].append(document["matrices"][3]), "named 2 times"),
        (lambda document: document["files"].append(document["files"][3]), "named 2 times"),
        (lambda document: document.update(schema_version=2), "schema version 2"),
        (lambda document: document.pop("graph"), "graph"),
        (lambda document: document.update(kind="spoken"), "no decoder's bundle"),
    ],
)
def test_manifests_that_lie_are_refused(folder, change, said):
    edit(folder, change)
    with pytest.raises(BundleError, match=said):
        open_decoder_bundle(folder)


def test_no_digit_of_graph_matrices_or_programs_changes_unseen(folder):
    manifest = open_decoder_bundle(folder).manifest
    program = StockProgram(role="expert", layer=2, precision=Precision.INT8_DYNAMIC, path=EXPERT, data=(EXPERT,))
    sealed = write_decoder_manifest(folder, manifest.model_copy(update={"programs": (program,)})).manifest
    path = folder / MANIFEST_NAME
    text = path.read_text()
    digits = [found.start() for found in re.finditer("[0-9]", text)]
    draw = random.Random(0)
    unseen = 0
    for place in draw.sample(digits, 1500):
        digit = draw.choice([one for one in "0123456789" if one != text[place]])
        path.write_text(text[:place] + digit + text[place + 1 :])
        try:
            found = open_decoder_bundle(folder).manifest
        except BundleError:
            continue
        unseen += 1
        # hashes of files are compared when these are read, the plan's figures change no text, some digits no number
        same = {name: getattr(sealed, name) for name in ("files", "plan", "layout_digest")}
        assert found.model_copy(update=same) == sealed
    assert unseen < 1500


def test_bundles_without_a_digest_of_their_layout_still_open(folder):
    manifest = open_decoder_bundle(folder).manifest
    assert manifest.layout_digest is None
    assert "layout_digest" not in manifest.model_dump(mode="json")
    sealed = write_decoder_manifest(folder, manifest).manifest
    assert sealed.model_copy(update={"layout_digest": None}) == manifest


def test_kinds_of_bundles_are_told_apart(folder, tmp_path):
    assert bundle_kind(folder) == "decoder"
    exits = write_toy_bundle(tmp_path / "exits").path
    assert bundle_kind(exits) == "exits"
    with pytest.raises(BundleError, match="no decoder's bundle"):
        open_decoder_bundle(exits)
    edit(folder, lambda document: document.update(kind="spoken"))
    with pytest.raises(BundleError, match="kind 'spoken'"):
        bundle_kind(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_broken_manifests_are_errors_of_the_bundle(folder, text):
    (folder / MANIFEST_NAME).write_text(text, encoding="latin-1")
    for ask in (open_decoder_bundle, bundle_kind):
        with pytest.raises(BundleError):
            ask(folder)


def test_what_is_no_bundle_is_told(tmp_path):
    for ask in (open_decoder_bundle, bundle_kind):
        with pytest.raises(InputError, match="not a folder"):
            ask(tmp_path / "none")
        with pytest.raises(BundleError, match="holds no manifest"):
            ask(tmp_path)


def test_opening_thousands_of_files_reads_none_of_them(folder):
    def grow(document):
        expert = entry_of(document, EXPERT)
        for index in range(3000):
            path = f"weights/layers.3/more.{index}.ptd"
            (folder / path).write_bytes(b"x" * expert["size_bytes"])
            document["files"].append({**expert, "path": path, "role": path})

    edit(folder, grow)
    started = time.process_time()
    bundle = open_decoder_bundle(folder)
    assert time.process_time() - started < 0.5
    with pytest.raises(BundleError, match="the content differs"):
        bundle.check("weights/layers.3/more.7.ptd")


def test_opening_needs_no_torch(folder):
    script = (
        "import sys; from pathlib import Path; from edgeflex.bundle_moe import open_decoder_bundle;"
        f"open_decoder_bundle(Path({str(folder)!r}));"
        "sys.exit(bool({'torch', 'executorch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_bundles_are_values(folder):
    assert open_decoder_bundle(folder) == DecoderBundle(folder, open_decoder_bundle(folder).manifest)
