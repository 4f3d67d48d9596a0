import json

import pytest

from diptych.bench import all as bench
from diptych.bench.checkpoint import VOCAB_SIZE, write_tokenizer
from diptych.bench.metrics import summarize
from diptych.bench.report import PACKAGES, cpu_model, fingerprint, markdown, table, write_report
from diptych.bench.server import ServerError
from diptych.front.detokenizer import IncrementalDetokenizer
from diptych.front.tokenizer import Tokenizer


def results(**parts):
    return {"machine": fingerprint("python -m diptych.bench.all"), "errors": {}, **parts}


def serving_run(**changes):
    figures = summarize([])
    run = {"system": "split", "request_rate": 2, "input_len": 1024, "output_len": 64, "client_cpu_percent": 1.0}
    return figures | run | changes


def test_fingerprint_says_where_and_what():
    machine = fingerprint("make bench")
    assert {"cpu", "cores", "date", "git_commit", "command", *PACKAGES} <= machine.keys()
    assert machine["cores"] >= 1


def test_cpu_model():
    assert cpu_model("processor\t: 0\nmodel name\t: Fast 9000: X\n\nmodel name\t: Fast 9000: X\n") == "Fast 9000: X"
    assert cpu_model("") != ""


def test_table():
    assert table(("a", "b"), [("x", 1)]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_failures_are_shown_beside_the_figures():
    run = serving_run(median_ttft_ms=1234.56, completed=7, failed=3, failures={"timeout": 1, "HTTP 429": 2})
    page = markdown(results(serving=[run]))
    assert "3 (1 timeout, 2 HTTP 429)" in page
    assert "1,234.6 / –" in page


def test_parts_that_failed_or_were_not_measured():
    measured = results(idle=[{"system": "s", "num_processes": 3, "seconds": 20.0, "cpu_percent_of_one_core": 0.4}])
    measured["errors"]["engine"] = "out of memory"
    page = markdown(measured)
    assert "## engine failed" in page
    assert "out of memory" in page
    assert "| s | 3 | 20 | 0.40 |" in page
    assert "Serving" not in page


def test_report_files(tmp_path):
    write_report(results(serving=[serving_run()]), tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "results.json").read_text())
    assert saved["serving"][0]["system"] == "split"
    assert (tmp_path / "new" / "results.md").read_text().startswith("# Benchmark results")


def test_one_part_that_fails_does_not_hide_the_others(monkeypatch, tmp_path):
    def fail(run):
        raise ServerError("it died")

    monkeypatch.setattr(bench, "PARTS", {"serving": fail, "idle": lambda run: [run.plan.idle_seconds]})
    measured = bench.measure(["serving", "idle"], bench.Run(tmp_path, bench.QUICK, tmp_path), "command")
    assert measured["errors"] == {"serving": "it died"}
    assert measured["idle"] == [5.0]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "serving,nonsense"])
    assert "unknown part 'nonsense'" in capsys.readouterr().err


def test_no_token_of_the_benchmark_tokenizer_waits_for_the_next(tmp_path):
    write_tokenizer(tmp_path)
    codec = Tokenizer.load(tmp_path)
    detokenizer = IncrementalDetokenizer(codec, [1, 2, 3])
    shown = [detokenizer.add(token_id) for token_id in (0, 17, 17, VOCAB_SIZE - 1)]
    assert shown == [" w0", " w17", " w17", f" w{VOCAB_SIZE - 1}"]
