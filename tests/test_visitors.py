"""Who is who: the key of a data folder, and what is signed with it."""

import hashlib
import hmac
import os

import pytest

from peftlab import SpecError
from peftlab.room.visitors import Signer


@pytest.mark.parametrize("found", [b"", b"x" * 15, bytes(32)])
def test_a_key_that_could_be_guessed_signs_nothing(found, tmp_path, caplog):
    file = tmp_path / "key"
    file.write_bytes(found)
    signer = Signer(file)
    forged = hmac.new(found, b"ann", hashlib.sha256).hexdigest()[:32]
    assert signer.read(f"ann.{forged}") == "" and len(file.read_bytes()) == 32 != file.read_bytes().count(0)
    assert f"{file}: " in caplog.text and file.stat().st_mode & 0o077 == 0
    assert Signer(file).read(signer.newcomer()) and len(caplog.records) == 1 and [*tmp_path.iterdir()] == [file]


def test_a_key_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, link = [], os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(os, "link", lambda *names: (done.append("link"), link(*names))[1])
    Signer(tmp_path / "key")
    assert done[:2] == ["fsync", "link"]


def test_a_key_that_cannot_be_read_is_said(tmp_path):
    (tmp_path / "key").mkdir()
    with pytest.raises(SpecError, match=r"/key: the key .* cannot be read or made \(Is a directory\); "):
        Signer(tmp_path / "key")


def test_a_link_is_no_token_and_a_token_no_link(tmp_path):
    signer = Signer(tmp_path / "key")
    link, token = signer.opens("run-1"), signer.newcomer()
    assert signer.opened(link) == "run-1" and len(signer.read(token)) == 32
    assert signer.read(link) == signer.opened(token) == signer.opened(signer.sign("run-1~99999999999")) == ""


def test_tokens_of_before_links_had_a_purpose_stay_good(tmp_path):
    (tmp_path / "key").write_bytes(key := b"k" * 32)
    signed = hmac.new(key, b"ann", hashlib.sha256).hexdigest()[:32]
    assert Signer(tmp_path / "key").read(f"ann.{signed}") == "ann"
