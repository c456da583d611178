"""Prompts that are hard for whoever makes something of a text: names of files, labels, keys."""

from __future__ import annotations

HARD = [
    "https://example.org/a/b?c=d",
    "50/50",
    "",
    "   ",
    ".",
    "..",
    "../../etc/passwd",
    "/",
    "a\nb\r\nc",
    "a\0b",
    "\ud800\udfff",
    "a" * 10_000,
    "字" * 10_000,
    "🎉🎉",
    "красный квадрат",
    "赤い四角",
    "लाल वर्ग",
    "مربع أحمر",
    "con",
    "NUL.txt",
    'a\\b:c*d?e"f<g>h|i',
    "-rf",
    "~root",
    "A B",
    "a  b",
    "a-b",
    "é",
    "e\u0301",
]
