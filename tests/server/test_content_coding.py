"""Bodies that are compressed or not in UTF-8: decoded as they arrive, within their limit."""

import gzip
import json
import zlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from mlxserver.server.content_coding import PART, ContentDecoder, in_utf8
from tools.harness.running_server import chat_body, running_server

TEXT = json.dumps({"text": "naïve ☃ " * 40}, ensure_ascii=False)
RAW = zlib.compressobj(wbits=-15)
CODED = {
    "gzip": gzip.compress(TEXT.encode()),
    "x-gzip": gzip.compress(TEXT[:99].encode()) + gzip.compress(TEXT[99:].encode()),  # of two members
    "deflate": zlib.compress(TEXT.encode()),
    "Deflate ": RAW.compress(TEXT.encode()) + RAW.flush(),  # without zlib's header
    "identity": TEXT.encode(),
    "": TEXT.encode(),
}
LIMIT = 1 << 20


def decoded(encoding, *received):
    decoder = ContentDecoder(encoding)
    parts = [part for each in received for part in decoder.feed(each)]
    decoder.end()
    return b"".join(parts)


@given(st.sampled_from(sorted(CODED)), st.lists(st.integers(0, 200), max_size=4))
def test_any_cut_of_a_compressed_body_is_decoded(encoding, cuts):
    body, places = CODED[encoding], [0, *sorted(cuts), len(CODED[encoding])]
    parts = [body[start:end] for start, end in pairwise(places)]
    assert decoded(encoding, *parts).decode() == TEXT


@given(st.sampled_from(["gzip", "deflate"]), st.binary(min_size=1))
def test_what_is_not_compressed_is_400(encoding, body):
    try:
        decoded(encoding, body)
    except HTTPException as error:
        assert (error.status_code, f"not valid {encoding} data" in error.detail) == (400, True)


def test_what_is_decompressed_comes_in_parts():
    bomb = zlib.compress(bytes(50 << 20))
    sizes = [len(part) for part in ContentDecoder("deflate").feed(bomb)]
    assert (max(sizes), sum(sizes)) == (PART, 50 << 20)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 1000])
def test_an_unknown_coding_is_415_and_names_what_is_known(encoding):
    with pytest.raises(HTTPException) as refusal:
        ContentDecoder(encoding)
    assert (refusal.value.status_code, refusal.value.headers) == (415, {"Accept-Encoding": "gzip, deflate"})
    assert "gzip, deflate" in refusal.value.detail


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("", TEXT.encode()),
        ("text/plain", TEXT.encode("utf-8-sig")),
        ("application/json; charset=UTF-8", TEXT.encode("utf-8-sig")),
        ("application/json; charset=us-ascii", TEXT.encode()),
        ('application/json; charset="utf-16"', TEXT.encode("utf-16")),
        ("application/json;charset=utf-16", TEXT.encode("utf-16-le")),
        ("application/json;charset=utf-16", TEXT.encode("utf-16-be")),
        ("application/json;charset=utf-16le", TEXT.encode("utf-16-le")),
        ("application/json; charset=utf-32", TEXT.encode("utf-32-be")),
        ("application/json", TEXT.encode("utf-16")),  # shown by its mark
        ("application/json", TEXT.encode("utf-32")),
    ],
)
def test_text_in_any_form_of_unicode_becomes_utf_8(content_type, body):
    assert in_utf8(body, content_type).decode() == TEXT


@pytest.mark.parametrize("charset", ["latin-1", "ISO-8859-15", "windows-1252"])
def test_text_in_a_declared_charset_becomes_utf_8(charset):
    assert in_utf8("naïve".encode(charset), f"application/json; charset={charset}") == "naïve".encode()


@pytest.mark.parametrize("charset", ["klingon", "utf-7", "punycode", "unicode_escape", "\x00", "base64"])
def test_an_unknown_charset_is_415(charset):
    with pytest.raises(HTTPException) as refusal:
        in_utf8(b"{}", f"application/json; charset={charset}")
    assert refusal.value.status_code == 415


def test_text_that_is_not_in_its_charset_is_400():
    with pytest.raises(HTTPException) as refusal:
        in_utf8(b'{"a"', "application/json; charset=utf-32")
    assert refusal.value.status_code == 400


@given(st.binary(), st.text())
def test_any_body_of_any_type_is_decoded_or_refused(body, content_type):
    try:
        in_utf8(body, content_type)
    except HTTPException as error:
        assert error.status_code in (400, 415)


@pytest.fixture(scope="module")
def server(scripted_path):
    flags = ("--no-defaults", "--model", f"talker={scripted_path}", "--max-body-bytes", str(LIMIT))
    with running_server(*flags, "--log-level", "warning") as server:
        yield server


def sent(server, body, **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.ask("POST", "/v1/chat/completions", body, headers)


def test_a_server_takes_bodies_that_are_coded(server):
    body = json.dumps(chat_body("talker", "hello"))
    answers = [
        sent(server, gzip.compress(body.encode()), Content_Encoding="gzip"),
        sent(server, body.encode("utf-8-sig")),
        sent(server, body.encode("utf-16"), Content_Type="application/json; charset=utf-16"),
        sent(server, zlib.compress(body.encode("utf-16")), Content_Encoding="deflate", Content_Type="text/plain"),
        sent(server, body.encode(), Content_Type="text/plain"),
    ]
    assert [answer.status for answer in answers] == [200] * 5


def test_a_server_refuses_what_it_can_not_decode_and_goes_on(server):
    assert sent(server, b"{}", Content_Encoding="br").status == 415
    assert sent(server, b"{}", Content_Type="application/json; charset=klingon").status == 415
    assert sent(server, b"{}", Content_Encoding="gzip").status == 400
    assert sent(server, gzip.compress(b'{"model"')[:-4], Content_Encoding="gzip").status == 400
    bomb = sent(server, gzip.compress(bytes(500 << 20)), Content_Encoding="gzip")
    assert (bomb.status, f"{LIMIT} bytes" in bomb.error["message"]) == (413, True)
    assert sent(server, json.dumps(chat_body("talker", "hello")).encode()).status == 200
