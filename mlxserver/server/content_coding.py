"""Codings of a request's body (RFC 9110, sections 8.3.2 and 8.4): compression, and charsets of its text.

Invariant: what is decompressed comes in parts of at most PART bytes, so that the reader can stop at its limit.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Iterator

from starlette.exceptions import HTTPException

PART = 256 << 10  # bytes
GZIP, ZLIB, RAW_DEFLATE = 31, 15, -15  # zlib's wbits
WBITS = {"gzip": GZIP, "x-gzip": GZIP, "deflate": ZLIB}
ACCEPTED = "gzip, deflate"
CHARSET = re.compile(r';\s*charset\s*=\s*"?([^\s;"]+)', re.IGNORECASE)
BYTE_ORDER_MARKS = (  # UTF-32's first: that of UTF-16 begins one of them
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Python knows more, among them some that are no charsets and some that take quadratic time.
CHARSETS = re.compile(
    r"utf-(8|16|32)(-[bl]e)?|ascii|iso8859-\d+|cp125\d|gb18030|gbk|big5|shift_jis|euc_(jp|kr)|koi8-[ru]"
)


class ContentDecoder:
    """Decoder of a Content-Encoding. Raises HTTPException: 415 for one that is not known, 400 for invalid data."""

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding.strip().lower()
        if self._encoding not in ("", "identity", *WBITS):
            message = f"The body has the Content-Encoding {encoding[:64]!r}; this server takes {ACCEPTED}."
            raise HTTPException(415, message, {"Accept-Encoding": ACCEPTED})
        self._inflater = zlib.decompressobj(WBITS[self._encoding]) if self._encoding in WBITS else None
        self._is_begun = False

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The content of the next bytes, in parts."""
        if self._inflater is None:
            yield received
            return
        is_pending = bool(received)
        while is_pending:
            part, received = self._inflate(received)
            yield part
            is_pending = bool(received) or len(part) == PART  # zlib may hold more than it has returned

    def end(self) -> None:
        """Check that the data are complete."""
        if self._inflater and self._is_begun and not self._inflater.eof:
            raise self._invalid("it ends too early")

    def _inflate(self, received: bytes) -> tuple[bytes, bytes]:
        """The next part, and the bytes that are not decompressed yet."""
        if self._encoding == "deflate" and not self._is_begun and received[0] & 15 != 8:
            self._inflater = zlib.decompressobj(RAW_DEFLATE)  # some programs leave out zlib's header
        assert self._inflater
        if self._inflater.eof and received:  # gzip data may have several members
            self._inflater = zlib.decompressobj(WBITS[self._encoding])
        self._is_begun = True
        try:
            part = self._inflater.decompress(received, PART)
        except zlib.error as error:
            raise self._invalid(str(error)) from None
        return part, self._inflater.unconsumed_tail or self._inflater.unused_data

    def _invalid(self, reason: str) -> HTTPException:
        return HTTPException(400, f"The body is not valid {self._encoding} data: {reason}.")


def in_utf8(body: bytes, content_type: str) -> bytes:
    """The text in UTF-8 without a byte order mark; its charset is declared, or shown by the mark.

    Raises HTTPException: 415 for a charset that is not known, 400 for text that is not in it.
    """
    declared = charset_of(content_type)
    mark, marked = next((each for each in BYTE_ORDER_MARKS if body.startswith(each[0])), (b"", ""))
    charset = marked or declared
    if charset in ("", "utf-8", "ascii"):
        return body.removeprefix(mark)
    if charset in ("utf-16", "utf-32") and body.startswith(b"\0"):  # JSON begins with an ASCII character
        charset += "-be"
    try:
        return body.decode(charset).encode()
    except UnicodeError as error:
        raise HTTPException(400, f"The body is not valid {charset} text: {error}.") from None


def charset_of(content_type: str) -> str:
    """Python's name of the charset in a Content-Type, empty without one. Raises HTTPException 415."""
    parameter = CHARSET.search(content_type)
    if parameter is None:
        return ""
    try:
        name = codecs.lookup(parameter[1]).name
    except (LookupError, ValueError):
        name = ""
    if not CHARSETS.fullmatch(name):
        raise HTTPException(415, f"The body has the charset {parameter[1][:64]!r}, which is not known. Send UTF-8.")
    return name
