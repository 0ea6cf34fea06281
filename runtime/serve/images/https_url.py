"""``https:`` URLs of allowed hosts, parsed strictly: what is ambiguous is refused instead of interpreted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urljoin

from fusion_edge.runtime.serve.images.errors import ImageError, Reason

MAX_LENGTH = 2048
"""Characters of a URL."""

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)+{_LABEL}\Z")
_NUMBER = re.compile(r"[0-9]+\Z|0x[0-9a-f]*\Z")  # a host that ends so is an IPv4 address: 0x7f.1, 2130706433
# RFC 3986's characters; no user, no port but the default, no fragment but an ignored one.
_URL = re.compile(
    r"https://(?P<host>[A-Za-z0-9.-]+)(?::443)?(?P<target>[/?][A-Za-z0-9._~:/?@!$&'()*+,;=%\[\]-]*)?"
    r"(?:#[A-Za-z0-9._~:/?@!$&'()*+,;=%-]*)?\Z",
    re.ASCII | re.IGNORECASE,  # without ASCII, s and k also match U+017F and U+212A
)


@dataclass(frozen=True)
class HttpsUrl:
    """A URL whose host is allowed."""

    host: str
    target: str
    """Path and query, as sent in the request line."""

    def __str__(self) -> str:
        return f"https://{self.host}{self.target}"


def is_host_name(name: str) -> bool:
    """Return whether ``name`` is a full host name in lower case, and not a spelling of an IPv4 address."""
    return _HOST.match(name) is not None and _NUMBER.match(name.rpartition(".")[2]) is None


def parse_https_url(url: str, hosts: tuple[str, ...]) -> HttpsUrl:
    """Parse a URL of one of ``hosts``. Raises :class:`ImageError`."""
    if len(url) > MAX_LENGTH:
        raise ImageError(
            Reason.INVALID_URL, f"The URL has {len(url)} characters, more than the limit of {MAX_LENGTH}; shorten it."
        )
    match = _URL.match(url)
    if match is None:
        raise ImageError(
            Reason.INVALID_URL,
            "The URL is not of the form https://HOST/PATH, without user and port, in ASCII; percent-encode its path.",
        )
    host = match["host"].lower()
    if host not in hosts:
        raise ImageError(
            Reason.NOT_ALLOWED,
            "The URL's host is not allowed; send the picture as a data: URL, or start the server with "
            "--allow-image-host.",
        )
    target = match["target"] or "/"
    return HttpsUrl(host, target if target[0] == "/" else f"/{target}")


def redirected(url: HttpsUrl, location: str, hosts: tuple[str, ...]) -> HttpsUrl:
    """Parse the ``Location`` of a response to ``url``, absolute or relative. Raises :class:`ImageError`."""
    try:
        target = urljoin(str(url), location)
    except ValueError:
        raise ImageError(
            Reason.INVALID_URL, "The URL is redirected to an invalid URL; send the picture itself."
        ) from None
    return parse_https_url(target, hosts)
