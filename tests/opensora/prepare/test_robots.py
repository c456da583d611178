"""What RFC 9309 says of groups, matches and encodings; patterns of a hostile host cost no more than their length."""

from __future__ import annotations

import pytest

from opensora.prepare.robots import EVERYTHING, parsed


@pytest.mark.parametrize(
    ("text", "path", "allowed"),
    [
        ("", "/a.mp4", True),
        ("User-agent: *\nDisallow: /", "/a.mp4", False),
        ("User-agent: *\nDisallow:", "/a.mp4", True),
        ("User-agent: *\nDisallow: /x\nAllow: /x/y", "/x/y/a.mp4", True),
        ("User-agent: *\nAllow: /x\nDisallow: /x/y", "/x/y/a.mp4", False),
        ("User-agent: *\nAllow: /x\nDisallow: /x", "/x/a.mp4", True),
        ("User-agent: OSCTL\nDisallow: /mine\n\nUser-agent: *\nDisallow: /", "/a.mp4", True),
        ("User-agent: osctl\nUser-agent: other\nDisallow: /mine", "/mine/a.mp4", False),
        ("User-agent: osctl\nDisallow: /one\nUser-agent: other\nDisallow: /\nUser-agent: osctl\nDisallow: /two", "/two/a.mp4", False),
        ("User-agent: osctl\nDisallow: /one\nUser-agent: other\nDisallow: /", "/two/a.mp4", True),
        ("User-agent: *\nDisallow: /*.mp4$", "/x/a.mp4", False),
        ("User-agent: *\nDisallow: /*.mp4$", "/x/a.mp4?x=1", True),
        ("User-agent: *\nDisallow: /*.mp4", "/x/a.mp4?x=1", False),
        ("User-agent: *\nDisallow: /a*b*c$", "/axbxc", False),
        ("User-agent: *\nDisallow: /a*b*c$", "/axbxcx", True),
        ("User-agent: *\nDisallow: /ab*b$", "/ab", True),
        ("User-agent: *\nDisallow: /caf%C3%A9/", "/café/a.mp4", False),
        ("User-agent: *\nDisallow: /café/", "/caf%c3%a9/a.mp4", False),
        ("\ufeffuser-AGENT : * # all\r\nDISALLOW: /x # not here\r\nnonsense\r\n", "/x/a.mp4", False),
        ("Disallow: /", "/a.mp4", True),
        ("User-agent: *\nDisallow: /", "/robots.txt", True),
    ],
)
def test_rules_are_read_as_the_rfc_says(text: str, path: str, allowed: bool) -> None:
    assert parsed(text.encode()).allows(f"https://h{path}") is allowed


def test_a_pattern_of_stars_is_matched_in_the_time_of_its_length() -> None:
    robots = parsed(b"User-agent: *\nDisallow: /" + b"*a" * 20_000 + b"b$")
    assert robots.allows("https://h/" + "a" * 5_000)
    assert EVERYTHING.allows("https://h")
    assert parsed(b"\xff\xfe\x00" * 1000).allows("https://h/a")
