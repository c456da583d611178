"""Names and texts as MLflow takes them."""

from __future__ import annotations

from written_ledger import pipeline

from orchestrator.tracking.mlflow_text import alias_of, artifact_name, cut, flatten, metric_name, source_uri


def test_names_fit_mlflow() -> None:
    assert [alias_of(name) for name in ("stage1", "stage3.b", "latest", "v1")] == ["stage1", "stage3-b", "stage-latest", "stage-v1"]
    assert metric_name("direction@24%") == "direction_24_"
    assert source_uri("s3://bucket/prefix/", "demo/x") == "s3://bucket/prefix/demo/x"
    assert source_uri("file:///a/b", "demo/x") == source_uri("/a/b", "demo/x") == "osctl://folder/demo/x?store=/a/b"
    long = pipeline().stages[0].config.model_copy(update={"prompts": ("x" * 1000,)})
    assert len(flatten(long)["prompts"]) == 500
    assert cut("a\0b\x1b[31m" + "🎉" * 600) == ("a\\x00b\\x1b[31m" + "🎉" * 600)[:499] + "…"
    assert [artifact_name(name) for name in ("00-a.mp4", "00-लाल-वर्ग.mp4", "00-50% off? #1 a+b&c.mp4")] == [
        "00-a.mp4",
        "00-लाल-वर्ग.mp4",
        "00-50- off- -1 a-b-c.mp4",
    ]
