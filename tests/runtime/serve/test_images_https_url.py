"""URLs of pictures by HTTPS: hostile ones reach nobody."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.image_hosts import HOST, LIMITS, Network, refused

from fusion_edge.runtime.serve.images.errors import ImageError, Reason
from fusion_edge.runtime.serve.images.https_url import is_host_name, parse_https_url, redirected

HOSTILE = [
    f"http://{HOST}/x.png",
    f"HTTP://{HOST}/x.png",
    f"ftp://{HOST}/x.png",
    f"gopher://{HOST}:70/_GET",
    f"//{HOST}/x.png",
    f"https:/{HOST}/x.png",
    f"https:{HOST}/x.png",
    f"https:///{HOST}/x.png",
    f"https:\\\\{HOST}\\x.png",
    f"https://{HOST}\\@evil.example/x.png",
    f"https://user@{HOST}/x.png",
    f"https://user:secret@{HOST}/x.png",
    f"https://{HOST}@evil.example/x.png",
    f"https://{HOST}:80/x.png",
    f"https://{HOST}:8443/x.png",
    f"https://{HOST}:0443/x.png",
    f"https://{HOST}:/x.png",
    f"https://{HOST}./x.png",
    f"https://{HOST}.evil.example/x.png",
    f"https://evil-{HOST}/x.png",
    f"https://evil.example/{HOST}/x.png",
    f"https://evil.example#@{HOST}/x.png",
    f"https://evil.example?@{HOST}/x.png",
    f"https://{HOST}%2eevil.example/x.png",
    "https://image\u017f.example.com/x.png",
    f"https://{HOST}/\u212a.png",
    f"https://{HOST}%00.evil.example/x.png",
    f"https://{HOST}\t/x.png",
    f"https://{HOST}/x.png\r\nHost: evil.example",
    f"https://{HOST}/x.png HTTP/1.1\r\nX: y",
    f" https://{HOST}/x.png",
    f"https://{HOST}/x.png\n",
    f"https://{HOST}/ü.png",
    f"https://{HOST}/\x00.png",
    "https://imäges.example.com/x.png",
    "https://images。example。com/x.png",
    "https://127.0.0.1/x.png",
    "https://0x7f.1/x.png",
    "https://0x7f000001/x.png",
    "https://2130706433/x.png",
    "https://0177.0.0.1/x.png",
    "https://127.1/x.png",
    "https://0/x.png",
    "https://[::1]/x.png",
    "https://[::ffff:127.0.0.1]/x.png",
    "https://[64:ff9b::7f00:1]/x.png",
    "https://[fe80::1%25eth0]/x.png",
    "https://169.254.169.254/latest/meta-data/",
    "https://metadata.google.internal/computeMetadata/v1/",
    "https://localhost/x.png",
    "https://localhost.localdomain/x.png",
    "https://./x.png",
    "https:///x.png",
    "https://",
    "https://" + "a" * 3000,
    "file:///etc/passwd",
    "file://images.example.com/x.png",
    "javascript:alert(1)",
    "unix:/run/docker.sock",
    "jar:https://images.example.com/x.zip!/x.png",
]


@pytest.mark.parametrize("url", HOSTILE)
def test_hostile_urls_are_refused_before_anything_is_resolved(url: str) -> None:
    network = Network()
    assert refused(network, url).reason in (Reason.INVALID_URL, Reason.NOT_ALLOWED)
    assert (network.resolved, network.connected) == ([], [])


@given(
    st.text(alphabet=st.sampled_from("https://images.example.com:443@\\#?%[]0x7f \t\n\x00ü\u017f\u212a/"), max_size=60)
)
def test_a_url_that_parses_has_an_allowed_host_for_other_parsers_too(text: str) -> None:
    for url in (text, f"https://{HOST}{text}", f"https://{text}{HOST}/"):
        try:
            parsed = parse_https_url(url, LIMITS.hosts)
        except ImageError:
            continue
        split = urlsplit(url)
        assert (split.scheme, split.hostname, split.username) == ("https", parsed.host, None)
        assert split.port in (None, 443)
        assert parsed.host in LIMITS.hosts
        assert parsed.target.isascii()
        assert not any(c.isspace() for c in parsed.target)


@given(st.text(max_size=60))
def test_a_redirect_leads_to_an_allowed_host_or_is_refused(location: str) -> None:
    origin = parse_https_url(f"https://{HOST}/a/b", LIMITS.hosts)
    with suppress(ImageError):
        assert redirected(origin, location, LIMITS.hosts).host in LIMITS.hosts


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("images.example.com", True),
        ("xn--bcher-kva.example", True),
        ("images", False),
        ("Images.example.com", False),
        ("images.example.com.", False),
        ("-a.example", False),
        ("127.0.0.1", False),
        ("0x7f.1", False),
        ("a.0x7f", False),
        ("*.example.com", False),
        ("a_b.example.com", False),
        ("a.example.com:443", False),
        ("[::1]", False),
        ("a.example.com\n", False),
        ("", False),
        (".".join(["a" * 60] * 5), False),
    ],
)
def test_names_of_hosts(name: str, valid: bool) -> None:
    assert is_host_name(name) is valid
