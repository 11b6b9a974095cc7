"""Where callbacks may go, how they are signed, when they are repeated."""

from __future__ import annotations

import base64
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.tasks.callbacks import (
    NotAllowed,
    Repetition,
    Rules,
    answer,
    headers,
    is_public,
    origin_of,
    read,
    read_secrets,
    without_query,
)


def rules(*hosts: str, private: tuple[str, ...] = (), insecure: bool = False) -> Rules:
    return Rules.of(hosts, private, insecure)


@pytest.mark.parametrize(
    ("pattern", "url"),
    [
        ("hooks.example.org", "https://hooks.example.org/a"),
        ("hooks.example.org", "https://HOOKS.example.org:443/a?b=c&d=%20"),
        ("*.example.org", "https://a.b.example.org"),
        ("*", "https://anything.example"),
        ("hooks.example.org:8443", "https://hooks.example.org:8443/"),
        ("hooks.example.org:*", "https://hooks.example.org:1/"),
        ("[2606:4700::1111]", "https://[2606:4700::1111]/x"),
        ("1.1.1.1", "https://1.1.1.1/"),
    ],
)
def test_allowed(pattern: str, url: str) -> None:
    assert rules(pattern).check(url).scheme == "https"


@pytest.mark.parametrize(
    ("pattern", "url", "why"),
    [
        ("hooks.example.org", "https://hooks.example.com/", "does not allow"),
        ("hooks.example.org", "https://xhooks.example.org/", "does not allow"),
        ("hooks.example.org", "https://hooks.example.org.evil.test/", "does not allow"),
        ("*.example.org", "https://example.org/", "does not allow"),
        ("*.example.org", "https://evilexample.org/", "does not allow"),
        ("hooks.example.org", "https://hooks.example.org:22/", "does not allow"),
        ("*", "http://hooks.example.org/", "must be https"),
        ("*", "ftp://hooks.example.org/", "must be https://host"),
        ("*", "https://user:secret@hooks.example.org/", "without user"),
        ("*", "https://user@hooks.example.org/", "without user"),
        ("*", "https://hooks.example.org\\@evil.test/", "must be"),
        ("*", "https://hooks.example.org/a b", "must be"),
        ("*", "https://hooks.example.org/\r\nHost: x", "must be"),
        ("*", "https://hooks.example.org/#x", "must be"),
        ("*", "https://ho\u00f6ks.example.org/", "ASCII"),
        ("*", "https:///x", "must be"),
        ("*", "https://hooks.example.org:0/", "no port"),
        ("*", "https://hooks.example.org:99999/", "no port"),
        ("*", "https://[::1/", "must be"),
        ("*", "https://[1::2::3]/", "no valid IP"),
        ("*", "https://" + "a" * 2001, "2000"),
        ("*", "https://127.1/", "no valid IP"),
        ("*", "https://2130706433/", "no valid IP"),
        ("*", "https://0x7f.0.0.0x1/", "no valid IP"),
        ("*", "https://0177.0.0.1/", "no valid IP"),
        ("*", "", "must be"),
        ("*:*", "https://127.0.0.1/", "not public"),
        ("*:*", "https://[::1]/", "not public"),
        ("*:*", "https://10.1.2.3/", "not public"),
        ("*:*", "https://169.254.169.254/latest", "not public"),
        ("*:*", "https://[::ffff:169.254.169.254]/", "not public"),
        ("*:*", "https://[fd00::1]/", "not public"),
        ("*:*", "https://[fe80::1]/", "not public"),
    ],
)
def test_refused(pattern: str, url: str, why: str) -> None:
    with pytest.raises(NotAllowed, match=why):
        rules(pattern).check(url)


def test_without_hosts_nothing_is_allowed_and_the_setting_is_named() -> None:
    with pytest.raises(NotAllowed, match=r"tasks\.callbacks\.hosts"):
        rules().check("https://hooks.example.org/")


def test_http_is_for_loopback_with_the_setting_only() -> None:
    allowed = rules(private=("127.0.0.1:*", "localhost:*", "10.0.0.1:*"), insecure=True)
    assert allowed.check("http://127.0.0.1:8080/").port == 8080
    assert allowed.check("http://localhost:8080/").host == "localhost"
    with pytest.raises(NotAllowed, match="https"):
        allowed.check("http://10.0.0.1/")
    with pytest.raises(NotAllowed, match="insecure_loopback"):
        rules(private=("127.0.0.1:*",)).check("http://127.0.0.1:8080/")
    # A name that is not loopback after all.
    with pytest.raises(NotAllowed, match="not on the loopback"):
        allowed.check_address(read("http://localhost:8080/"), ipaddress.ip_address("1.1.1.1"))


def test_private_addresses_need_the_host_to_be_named() -> None:
    target = read("https://hooks.corp.example/")
    inside = ipaddress.ip_address("10.0.0.7")
    rules("*", private=("hooks.corp.example",)).check_address(target, inside)
    with pytest.raises(NotAllowed, match="private_hosts"):
        rules("*").check_address(target, inside)
    assert rules(private=("hooks.corp.example",)).check("https://hooks.corp.example/x").port == 443


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.168.0.1",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "2001:0:7f00:1::", "fc00::1", "fe80::1", "ff02::1", "2001:db8::1",
    ],
)  # fmt: skip
def test_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.text(max_size=60) | st.from_regex(r"https?://[!-~]{0,40}", fullmatch=True))
def test_what_is_read_means_one_host_to_everybody(url: str) -> None:
    import urllib.parse

    import yarl

    try:
        target = read(url)
    except NotAllowed:
        return
    assert urllib.parse.urlsplit(url).hostname == target.host
    try:
        other = yarl.URL(url)
    except ValueError:  # refused there, then: nothing is sent
        return
    assert (other.raw_host or "").lower() == target.host or ":" in target.host
    assert other.port == target.port


@pytest.mark.parametrize("text", ["", "a b", "http://x", "*x.org", "x.*.org", "a:0", "a:x", "a:70000", "[::x]", "*."])
def test_bad_patterns(text: str) -> None:
    with pytest.raises(ValueError, match=r"host|port"):
        rules(text)


def test_queries_are_not_shown() -> None:
    assert without_query("https://a.example/x?token=1") == "https://a.example/x"
    assert origin_of("https://a.example/x") == "a.example:443"
    assert origin_of("nonsense") == ""


# ------------------------------------------------------------------ signed ---


def test_signature_of_the_specification() -> None:
    # The example of https://github.com/standard-webhooks/standard-webhooks, reference libraries.
    secrets = read_secrets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330.9, b'{"test": 2432232314}', secrets)
    assert signed["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert signed["webhook-timestamp"] == "1614265330"
    assert signed["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"


def test_several_secrets_give_several_signatures() -> None:
    new, old = base64.b64encode(b"n" * 32).decode(), base64.b64encode(b"o" * 32).decode()
    both = headers("a.1", 1.0, b"{}", read_secrets(f"whsec_{new}, {old}\n"))["webhook-signature"]
    each = [headers("a.1", 1.0, b"{}", read_secrets(one))["webhook-signature"] for one in (new, old)]
    assert both == " ".join(each)


@pytest.mark.parametrize("text", ["", " \n", "whsec_", "whsec_c2hvcnQ=", "not base64!"])
def test_bad_secrets_are_refused_without_quoting_them(text: str) -> None:
    with pytest.raises(ValueError, match="secret") as refused:
        read_secrets(text)
    assert not text.strip() or text not in str(refused.value)


# ------------------------------------------------------------------- again ---


def test_pauses_grow_to_the_cap_and_end() -> None:
    repetition = Repetition(max_attempts=5, base=1.0, factor=10.0, cap=50.0)
    assert [repetition.pause(n, 1.0) for n in range(1, 6)] == [1.0, 10.0, 50.0, 50.0, None]
    assert repetition.pause(1, 0.0) == 0.5
    assert repetition.pause(1, 0.0, asked=7.0) == 7.0
    assert repetition.pause(1, 0.0, asked=7000.0) == 50.0
    assert Repetition(10**6, 1.0, 1e300, 9.0).pause(10**5, 1.0) == 9.0


def test_what_statuses_mean() -> None:
    assert answer(200).accepted and answer(204).accepted
    assert answer(410).final and not answer(410).accepted
    assert not answer(302).accepted and not answer(302).final
    assert answer(429, "30").retry_after == 30.0
    assert answer(503, "Fri, 01 Jan").retry_after is None
    assert answer(503, "9" * 400).retry_after is None
