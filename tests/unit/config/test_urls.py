"""Base URLs: where a prompt and a key may be sent (U11)."""

from __future__ import annotations

import pytest

from mppnode.config.urls import check_base_url

GOOD = [
    "https://inference.example.com/v1",
    "https://inference.example.com",
    "https://inference.example.com:8443/v1/openai",
    "https://93.184.216.34/v1",
    "https://[2606:2800:220:1::1]/v1",
    "http://127.0.0.1:8000/v1",
    "http://127.8.9.10/v1",
    "http://localhost:11434/v1",
    "http://gpu.localhost/v1",
    "http://10.0.0.5:8000/v1",
    "http://172.31.255.255/v1",
    "http://192.168.1.2/v1",
    "http://100.64.0.9:8000/v1",
    "http://[::1]:8000/v1",
    "http://[fd12:3456::1]/v1",
]

BAD = [
    ("http://inference.example.com/v1", "https"),
    ("http://93.184.216.34/v1", "https"),
    ("http://172.32.0.1/v1", "https"),
    ("http://[2606:2800:220:1::1]/v1", "https"),
    ("http://my-gpu:8000/v1", "https"),
    ("http://localhost.example.com/v1", "https"),
    ("https://169.254.169.254/latest", "no provider"),
    ("https://169.254.0.1", "no provider"),
    ("https://0.0.0.0/v1", "no provider"),
    ("https://0.1.2.3/v1", "no provider"),
    ("https://100.100.100.200/", "no provider"),
    ("https://168.63.129.16/", "no provider"),
    ("https://192.0.0.192/", "no provider"),
    ("https://224.0.0.1/", "no provider"),
    ("https://255.255.255.255/", "no provider"),
    ("https://[fd00:ec2::254]/", "no provider"),
    ("https://[fd20:ce::254]/", "no provider"),
    ("https://[fe80::1]/", "no provider"),
    ("https://[::]/", "no provider"),
    ("https://[::ffff:169.254.169.254]/", "no provider"),
    ("https://[::ffff:7f00:1]/", "no provider"),
    ("https://[::169.254.169.254]/", "no provider"),
    ("https://[64:ff9b::a9fe:a9fe]/", "no provider"),
    ("https://[2002:a9fe:a9fe::]/", "no provider"),
    ("https://metadata.google.internal/", "no provider"),
    ("https://METADATA.google.internal/", "no provider"),
    ("http://metadata/", "no provider"),
    ("http://2130706433/v1", "four decimal"),
    ("http://127.1/v1", "four decimal"),
    ("http://0x7f.0.0.1/v1", "four decimal"),
    ("http://0177.0.0.1/v1", "four decimal"),
    ("http://127.0.0.01/v1", "four decimal"),
    ("http://10.0.0.256/v1", "four decimal"),
    ("https://[::1%25eth0]/", "name a host"),
    ("https://[1::2::3]/", "usual form"),
    ("https://user:secret@example.com/v1", "user name"),
    ("https://example.com@evil.example/v1", "user name"),
    ("https://example.com/v1?key=1", "query"),
    ("https://example.com/v1#x", "query"),
    ("https://exämple.com/v1", "ASCII"),
    ("https://example。com/v1", "ASCII"),
    ("https://example.com\\@evil.example/v1", "must"),
    ("https://example.com/a/../b", "step up"),
    ("https://example.com/a b", "look like"),
    ("https://example.com/v1\n", "look like"),
    ("https://example.com//v1", "look like"),
    ("https:///v1", "name a host"),
    ("https://example.com:0/v1", "name a host"),
    ("https://example.com:65536/v1", "name a host"),
    ("https://example.com./v1", "name a host"),
    ("https://-a.example/v1", "name a host"),
    ("HTTPS://example.com/v1", "look like"),
    ("ftp://example.com/v1", "look like"),
    ("file:///etc/passwd", "look like"),
    ("//example.com/v1", "look like"),
    ("https://" + "a" * 3000 + ".example", "at most"),
]


@pytest.mark.parametrize("url", GOOD)
def test_urls_a_provider_may_have(url: str) -> None:
    """Public hosts over https and private addresses over http are taken as they are."""
    assert check_base_url(url) == url
    assert check_base_url(url + "/") == url


@pytest.mark.parametrize(("url", "words"), BAD)
def test_urls_no_provider_may_have(url: str, words: str) -> None:
    """Every other URL is refused in words that do not repeat it."""
    with pytest.raises(ValueError, match=words) as caught:
        check_base_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", [url for url, words in BAD if words == "https"])
def test_insecure_means_plain_http_and_nothing_else(url: str) -> None:
    """`insecure` lets plain http leave the machine."""
    assert check_base_url(url, insecure=True) == url


@pytest.mark.parametrize(("url", "words"), [pair for pair in BAD if pair[1] != "https"])
def test_insecure_opens_no_other_door(url: str, words: str) -> None:
    """A metadata service, a user name or an odd form stays refused under `insecure`."""
    with pytest.raises(ValueError, match=words):
        check_base_url(url, insecure=True)
